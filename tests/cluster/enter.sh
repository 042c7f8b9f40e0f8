#!/usr/bin/env bash
# Run CMD... on the cluster's login machine (the controller), in the present folder: enter.sh sbatch job.sbatch
# Needs the exports of up.sh. With TEST_CLUSTER_NET=loopback plain sbatch and squeue work without it, too.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: enter.sh CMD..." >&2; exit 2; }
pid=$(<"${TEST_CLUSTER_STATE:?run: eval \"\$(up.sh)\" first}/ctl.pid")
exec nsenter --target "$pid" --mount --uts --net --wdns="$PWD" -- "$@"
