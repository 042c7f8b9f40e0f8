#!/usr/bin/env bash
# Called by up.sh inside fresh namespaces: become the machine NAME with address ADDR, then run its Slurm daemon.
set -euo pipefail
name=$1 addr=$2
mount --make-rprivate /
hostname "$name"
mount --bind "$TEST_CLUSTER_STATE/hosts" /etc/hosts

if [ "$TEST_CLUSTER_NET" = veth ]; then
  ip link set lo up
  dev=eth0
  if [ "$name" = ctl ]; then
    dev=br0
    ip link add br0 type bridge
  fi
  for ((t = 0; t < 200; t++)); do ip link show $dev >/dev/null 2>&1 && break; sleep 0.1; done
  ip addr add "$addr/24" dev $dev
  ip link set $dev up
fi

[ "$name" != ctl ] || exec slurmctld -D
slurmd -D -N "$name" & # this shell is process 1 of the node: it reaps orphans, and its death ends the node
wait
