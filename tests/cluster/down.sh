#!/usr/bin/env bash
# Stop the cluster in STATE_DIR with everything its jobs started, and remove the folder. Safe to call twice.
#   ./down.sh [STATE_DIR]
set -euo pipefail
state=${1:-${TMPDIR:-/tmp}/slurm-cluster}
[ -e "$state/shape" ] || exit 0 # never ours, or already gone
state=$(cd "$state" && pwd)

ours() { # a pid may have been given to somebody else since: look for our mark in its environment
  { tr '\0' '\n' <"/proc/$1/environ" | grep -qxF "TEST_CLUSTER_STATE=$state"; } 2>/dev/null
}
stop() { # SIGNAL PIDFILE...
  local signal=$1 file pid
  shift
  for file in "$@"; do
    [ -s "$file" ] || continue
    pid=$(<"$file")
    ! ours "$pid" || kill "-$signal" "$pid" 2>/dev/null || true
    for ((t = 0; t < 50; t++)); do ours "$pid" || break; sleep 0.1; done
    ! ours "$pid" || kill -KILL "$pid" 2>/dev/null || true
  done
}
stop KILL "$state"/n[0-9]*.pid # a node's process namespace dies with it: slurmd, steps and ranks
stop TERM "$state/ctl.pid"
stop TERM "$state/munged.pid"
rm -rf "$state"
