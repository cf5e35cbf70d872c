#!/bin/bash
# The first process of a cell, in its own mount, pid, uts and network namespaces: cell.sh FOLDER NAME INIT
# Waits for a line from its starter, so that a starter killed before it wrote down the process id leaves nothing.
set -eu
folder=$1 name=$2 init=$3
read -r _ || exit 1

mount --make-rprivate /
mount -t proc proc /proc
# A sysfs of this network namespace; the control groups stay those of the machine.
mkdir -p "$folder/cgroup"
mount --rbind /sys/fs/cgroup "$folder/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$folder/cgroup" /sys/fs/cgroup
umount -l "$folder/cgroup"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns
hostname "$name"
ip link set lo up

if [ -d "$folder/node" ]; then
    cd "$folder/node"
    # What programs of a node write to their usual places lands in the cell's folder.
    for place in etc opt var; do
        mkdir -p "$place" "$place.work"
        mount -t overlay overlay -o "lowerdir=/$place,upperdir=$PWD/$place,workdir=$PWD/$place.work" "/$place"
    done
    # Snapshots of images are overlays themselves: their upper folders must not lie on one.
    for place in containerd kubelet; do
        mkdir -p "$place" "/var/lib/$place"
        mount --bind "$place" "/var/lib/$place"
    done
    # The kubelet sets these of the whole machine, unless they are already as it wants them.
    for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
        kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
        file=${setting%=*}
        shield=sysctl-${file//\//-}
        echo "${setting#*=}" >"$shield"
        mount --bind "$shield" "/proc/sys/$file"
    done
    mkdir -p /var/log/pods /var/log/containers /opt/cni/bin /etc/cni/net.d
    # A reboot finds the configuration as it was left; only the first start writes it.
    if [ ! -e installed ]; then
        cp /usr/lib/cni/{bridge,ptp,host-local,loopback,portmap} /opt/cni/bin/
        rm -f /etc/cni/net.d/*
        cp cni.conflist /etc/cni/net.d/10-lab.conflist
        touch installed
    fi
    sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
fi
mount --make-rshared /
cd /
: >"$folder/ready"
exec "$init" </dev/null
