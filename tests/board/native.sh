#!/usr/bin/env bash
# A root file system above this machine's, and its systemd, or another command, as the first process there:
#
#   unshare --mount --pid --fork --uts --ipc --cgroup native.sh FOLDER [COMMAND...]
#
# What is written goes into memory. The network is this machine's; its devices and services are not there.
set -euo pipefail
layer=$1/layer root=$1/root
shift
[ $# -gt 0 ] || set -- /lib/systemd/systemd --system
# what waits for devices, seats and terminals, or mounts what is mounted
without="dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount sys-kernel-config.mount
    sys-kernel-debug.mount sys-kernel-tracing.mount console-getty.service getty.target systemd-logind.service
    systemd-modules-load.service systemd-networkd.service systemd-remount-fs.service systemd-resolved.service
    systemd-sysctl.service systemd-timesyncd.service systemd-udev-trigger.service systemd-udevd.service
    systemd-udevd-control.socket systemd-udevd-kernel.socket"

mount --make-rprivate /
mkdir -p "$layer" "$root"
mount -t tmpfs layer "$layer"
mkdir "$layer/upper" "$layer/work"
mount -t overlay root -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
for place in run tmp dev; do
    mount -t tmpfs "$place" "$root/$place"
done
for node in null zero full random urandom tty; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
# systemd's "hybrid" tree: processes in one of its own without controllers, as it finds them where the machine has others
mount -t tmpfs cgroup "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/systemd" "$root/sys/fs/cgroup/unified"
mount -t cgroup -o none,name=systemd systemd "$root/sys/fs/cgroup/systemd"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"

rm -rf "$root"/etc/systemd/system/* "$root"/etc/rc?.d "$root/etc/eyas" "$root/opt/eyas" "$root"/var/lib/eyas*
ln -s /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
for unit in $without; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
exec chroot "$root" env -i container=eyas-board PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
