#!/bin/sh
# Boots a root file system with its own systemd, in namespaces and cgroups of its own. Machine.Start
# runs it twice: "enter" joins the cgroups and makes the namespaces, "init" furnishes them and
# becomes process 1. What is set in the environment:
#   LOWER    the root file system, which is not written to
#   WORK     an empty directory
#   CGROUPS  the machine's cgroups, one in each hierarchy of the host
#   LEGACY   controllers of cgroup v1 that the host has mounted
#   DEVICES  what of /dev it gets beside the usual
#   TMPFS    directories that are tmpfs: an overlay cannot lie above the root's own overlay
#   BINDS    lines of <ro|rw> <file or directory of the host> <place in the machine>
set -e

case $1 in
enter)
	for cgroup in $CGROUPS; do
		echo $$ >"$cgroup/cgroup.procs"
	done
	exec unshare --pid --mount --fork --cgroup --ipc --uts --net --kill-child -- /bin/sh "$0" init
	;;
esac

mount --make-rprivate /
mount -t tmpfs tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=$LOWER,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/root"
cd "$WORK/root"

echo "$BINDS" | while read -r mode from to; do
	[ -n "$to" ] || continue
	if [ -d "$from" ]; then
		mkdir -p ".$to"
	else
		mkdir -p "$(dirname ".$to")"
		touch ".$to"
	fi
	mount --bind "$from" ".$to"
	[ "$mode" = rw ] || mount -o remount,ro,bind ".$to"
done
for dir in $TMPFS; do
	mkdir -p ".$dir"
	mount -t tmpfs -o mode=755 tmpfs ".$dir"
done

mount -t proc proc proc
# Most of /proc/sys is the host's own, and systemd would rewrite it. The network's part is that of
# the network namespace one is in, and CNI plugins write to it.
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mkdir "$WORK/proc"
mount -t proc proc "$WORK/proc"
mount --bind "$WORK/proc/sys/net" proc/sys/net
umount -l "$WORK/proc"

mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty $DEVICES; do
	[ -e "/dev/$node" ] || continue
	mkdir -p "dev/$(dirname "$node")"
	touch "dev/$node"
	mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs tmpfs dev/shm
ln -s /proc/self/fd dev/fd

mount -t sysfs sysfs sys
mount -o remount,ro,bind sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
# systemd sees version 2 only; who looks for the controllers finds those of version 1 here.
for controller in $LEGACY; do
	mkdir -p "cgroup/$controller"
	mount -t cgroup -o "$controller" cgroup "cgroup/$controller"
done

hostname kuasar
ip link set lo up
mkdir oldroot
pivot_root . oldroot
umount -l /oldroot
rmdir /oldroot
# Process 1 leaves this out where it takes itself for a container's.
mount --make-rshared /
exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=linux LANG=C.UTF-8 /lib/systemd/systemd --system
