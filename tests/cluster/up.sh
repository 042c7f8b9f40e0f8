#!/usr/bin/env bash
# Start a real Slurm cluster (munged, slurmctld, N slurmd) of private processes on this host. Root, no systemd needed.
#   eval "$(./up.sh [N_NODES=2] [STATE_DIR])"; ./enter.sh sbatch job.sbatch
# Every node has a host name, process table and /etc/hosts of its own.
#   TEST_CLUSTER_NET=loopback  nodes share the host's network, all are 127.0.0.1 (default)
#   TEST_CLUSTER_NET=veth      every node has a network namespace: "localhost" is a different machine on each
#   TEST_CLUSTER_GPUS=8        GPUs each node claims to have (device files that are /dev/null)
# Prints shell exports on stdout, everything else on stderr. Safe to call twice.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
nodes=${1:-2} state=${2:-${TMPDIR:-/tmp}/slurm-cluster} net=${TEST_CLUSTER_NET:-loopback} gpus=${TEST_CLUSTER_GPUS:-8}
die() { echo "up.sh: $*" >&2; exit 1; }
alive() { [ -s "$state/$1.pid" ] && kill -0 "$(<"$state/$1.pid")" 2>/dev/null; }
wait_for() { for ((t = 0; t < 200; t++)); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; die "gave up waiting for: $*"; }

[ "$(id -u)" = 0 ] || die "must be root (namespaces)"
[[ $nodes =~ ^[1-9][0-9]?$ ]] || die "N_NODES must be 1..99, got '$nodes'"
[[ $gpus =~ ^[0-9]+$ ]] || die "TEST_CLUSTER_GPUS must be a number, got '$gpus'"
[[ $net == loopback || $net == veth ]] || die "TEST_CLUSTER_NET must be loopback or veth, got '$net'"
for tool in munged slurmctld slurmd sinfo; do
  command -v $tool >/dev/null || die "$tool is missing: apt-get install -y slurm-wlm munge"
done
[ "$net" = loopback ] || command -v ip >/dev/null || die "ip is missing: apt-get install -y iproute2"
mkdir -p "$state" && state=$(cd "$state" && pwd)
[ ${#state} -le 80 ] || die "STATE_DIR is too long for a unix socket: $state"
[ -e "$state/shape" ] || [ -z "$(ls -A "$state")" ] || die "STATE_DIR is neither empty nor a cluster's: $state"

shape="$nodes nodes, $net, $gpus GPUs a node"
exports="export SLURM_CONF=$state/slurm.conf TEST_CLUSTER_STATE=$state"
if alive ctl; then
  [ "$(<"$state/shape")" = "$shape" ] || die "already up with $(<"$state/shape"): run down.sh $state first"
  echo "$exports"
  exit
fi
"$here/down.sh" "$state" # what a killed run left
mkdir -p "$state/ctl" "$state/dev"
for ((i = 1; i <= nodes; i++)); do mkdir -p "$state/spool.n$i"; done
echo "$shape" >"$state/shape"

# Loopback: all nodes are 127.0.0.1 and differ by port, which comes from the folder's name: clusters side by side.
port=$((11000 + $(cksum <<<"$state" | cut -d' ' -f1) % 80 * 100))
address() { if [ "$net" = veth ]; then echo "10.77.0.$1"; else echo 127.0.0.1; fi; } # 1..99: nodes, 100: controller
{
  echo "127.0.0.1 localhost"
  echo "$(address 100) ctl"
  for ((i = 1; i <= nodes; i++)); do echo "$(address $i) n$i"; done
} >"$state/hosts"

gres=""
if [ "$gpus" -gt 0 ]; then
  for ((i = 0; i < gpus; i++)); do mknod "$state/dev/gpu$i" c 1 3; done
  echo "Name=gpu File=$state/dev/gpu[0-$((gpus - 1))]" >"$state/gres.conf"
  gres="Gres=gpu:$gpus"
fi
echo "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf" # not used (linuxproc, task/none), but autodetect wants more on some hosts
echo "include $state/plugstack.conf.d/*.conf" >"$state/plugstack.conf"
mkdir "$state/plugstack.conf.d"

cat >"$state/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl($(address 100))
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits cred_expire seconds (default 120) before it starts again.
AuthInfo=socket=$state/munge.socket,cred_expire=5
# Listen on the machine's own address only.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$state/ctl
SlurmctldPidFile=$state/ctl/slurmctld.pid
SlurmctldLogFile=$state/ctl.log
SlurmdSpoolDir=$state/spool.%n
SlurmdPidFile=$state/spool.%n.pid
SlurmdLogFile=$state/%n.log
PlugStackConfig=$state/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# sacct needs a database; finished jobs are in this file, and stay visible to scontrol for an hour.
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$state/jobs.txt
MinJobAge=3600
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,preempt_send_user_signal
JobRequeue=1
KillWait=10
SlurmdTimeout=10
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=$((gpus > 4 ? gpus * 2 : 8)) RealMemory=100000 $gres State=UNKNOWN
$(for ((i = 1; i <= nodes; i++)); do echo "NodeName=n$i NodeHostname=n$i NodeAddr=$(address $i) Port=$((port + i))"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF

start() { # NAME COMMAND...: a daemon in the background, its pid in NAME.pid, its noise in NAME.out
  local name=$1
  shift
  setsid "$@" </dev/null >"$state/$name.out" 2>&1 &
  echo $! >"$state/$name.pid"
}
# shellcheck disable=SC2317  # called through wait_for
own_net() { [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }
on_switch() { nsenter --target "$(<"$state/ctl.pid")" --net ip "$@"; }
cable() { # NAME: from NAME's eth0 to the switch, which is on the controller
  local pid
  pid=$(<"$state/$1.pid")
  wait_for own_net "$pid"
  on_switch link add "$1" type veth peer name eth0 netns "$pid"
  on_switch link set "$1" master br0 up
}

export SLURM_CONF=$state/slurm.conf TEST_CLUSTER_STATE=$state TEST_CLUSTER_NET=$net
(umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
start munged munged --foreground --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
  --pid-file="$state/munged.run" --log-file="$state/munged.log" --seed-file="$state/munged.seed"
wait_for test -S "$state/munge.socket"

private=(--mount --uts)
[ "$net" = loopback ] || private+=(--net)
start ctl unshare "${private[@]}" "$here/node.sh" ctl "$(address 100)"
[ "$net" = loopback ] || wait_for on_switch link show br0
for ((i = 1; i <= nodes; i++)); do
  start "n$i" unshare "${private[@]}" --pid --fork --kill-child --mount-proc "$here/node.sh" "n$i" "$(address $i)"
  [ "$net" = loopback ] || cable "n$i"
done

for ((t = 0; t < 300; t++)); do
  alive ctl || break
  idle=$("$here/enter.sh" timeout 5 sinfo -h -N -p main -o %T 2>/dev/null | grep -cx idle || true)
  if [ "$idle" = "$nodes" ]; then
    echo "up.sh: $shape: all idle after $SECONDS s" >&2
    echo "$exports"
    exit
  fi
  sleep 0.2
done
tail -n 5 "$state"/*.out "$state"/*.log >&2 || true
"$here/down.sh" "$state"
die "the nodes did not become idle in $SECONDS s"
