#!/busybox sh
# Load the modules that the root file system needs, mount it, and go on there.
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
while read -r module; do
    /busybox insmod "/modules/$module"
done </order
init=/sbin/init mode=ro root=/dev/vda
for word in $(/busybox cat /proc/cmdline); do
    case $word in
        init=*) init=${word#init=} ;;
        root=*) root=${word#root=} ;;
        ro | rw) mode=$word ;;
    esac
done
until [ -b "$root" ]; do
    /busybox usleep 10000
done
/busybox mount -t ext4 -o "$mode" "$root" /root
/busybox umount /proc
/busybox mount --move /dev /root/dev 2>/dev/null || /busybox umount /dev
exec /busybox switch_root /root "$init"
