#!/bin/bash
# PID 1 of a host made of namespaces (tests/cluster/hosts.py): its own name, addresses, /run, /dev/shm and sshd.
#   node.sh NAME FOLDER
set -eu
name=$1 folder=$2
hostname "$name"
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for file in hosts hostname resolv.conf; do mount --bind "$folder/$name/$file" "/etc/$file"; done
mount --bind "$folder/$name/ssh" /etc/ssh
ip link set lo up
/usr/sbin/sshd -D -e 2>>"$folder/$name/sshd.log" &
trap 'exit 0' TERM INT
# As PID 1 it inherits orphans: `wait` reaps them.
while :; do
  wait || true
  sleep 3600 &
  wait $! || true
done
