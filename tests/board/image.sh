#!/usr/bin/env bash
# The disk, kernel and ssh key of the virtual board: Debian bookworm for aarch64, kept outside the checkout.
#
#   ${XDG_CACHE_HOME:-~/.cache}/eyas/board/HASH/    HASH over this folder's recipe: another recipe is another folder
#     disk.img          the root file system; never written once it is there: each start has an overlay of its own
#     vmlinuz initrd    what the emulator loads
#     id_ed25519        the key that root's ssh accepts; known_hosts: the board's own
#
# `image.sh` prints that folder and builds it if it is not there. Nothing runs under user emulation: packages are
# unpacked here, and configured by the board itself at its first start. The Debian mirror is that of this machine's apt;
# DEBIAN_MIRROR=ADDRESS names another one. No root is needed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../support/debian.sh"

suite=bookworm
packages=apt,busybox-static,dbus,iproute2,kmod,libgomp1,libstdc++6,nano,openssh-client,openssh-server
packages+=,procps,python3,python3-venv,rsync,systemd,systemd-sysv,systemd-timesyncd,udev,usr-is-merged,util-linux-extra
packages+=,sudo,v4l-utils
# what the kernel has to find before it can mount the root file system
early="virtio_mmio virtio_blk crc32c_generic ext4"
# drivers that a board without such hardware never loads: three quarters of all modules
without="drivers/net/ethernet drivers/net/wireless drivers/gpu drivers/iio drivers/infiniband drivers/scsi drivers/ata
    drivers/staging drivers/hwmon drivers/mtd drivers/mmc drivers/hid drivers/usb/gadget drivers/media/dvb-frontends
    drivers/media/tuners drivers/media/pci drivers/media/usb/dvb-usb drivers/media/usb/dvb-usb-v2
    drivers/media/i2c drivers/phy drivers/regulator drivers/pinctrl sound fs/nfs fs/ocfs2 fs/btrfs fs/xfs fs/ceph
    fs/gfs2 fs/jfs fs/f2fs fs/reiserfs net/netfilter net/sched net/ipv4/netfilter net/ipv6/netfilter net/bluetooth
    net/mac80211 net/wireless"

# database ROOT PACKAGE.deb: record an unpacked package in dpkg's database, as `dpkg --unpack` does.
database() {
    local root=$1 info=$1/var/lib/dpkg/info control=$1/control name
    dpkg-deb --control "$2" "$control"
    name=$(sed -n 's/^Package: //p' "$control/control")
    if grep -qx 'Multi-Arch: same' "$control/control"; then
        name+=:$(sed -n 's/^Architecture: //p' "$control/control")
    fi
    dpkg-deb --fsys-tarfile "$2" | tar -t | sed -e 's#/$##' -e 's#^\.##' -e 's#^$#/.#' >"$info/$name.list"
    {
        sed -e '/^Package:/a Status: install ok unpacked' "$control/control"
        if [ -s "$control/conffiles" ]; then
            echo "Conffiles:"
            grep '^/' "$control/conffiles" | while read -r file; do
                echo " $file $(md5sum <"$root$file" | cut -d' ' -f1)"
            done
        fi
        echo
    } >>"$root/var/lib/dpkg/status"
    rm "$control/control"
    for file in "$control"/*; do
        mv "$file" "$info/$name.$(basename "$file")"
    done
    rmdir "$control"
}

# extracted ROOT: called by mmdebstrap, between unpacking and tidying up.
extracted() {
    local root=$1 kernel package
    mkdir -p "$root/var/lib/dpkg/info" "$root/var/lib/dpkg/updates"
    : >"$root/var/lib/dpkg/status"
    echo 1 >"$root/var/lib/dpkg/info/format"
    for package in "$root"/var/cache/apt/archives/*.deb; do
        database "$root" "$package"
    done
    export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
    kernel=$(apt-cache depends linux-image-arm64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)/\1/p')
    cd "$PWD/kernel" && apt-get download -qq -o APT::Sandbox::User=root "$kernel"
}

# tree: the root file system as packages leave it, and the kernel's package.
tree() {
    mkdir kernel
    apt_settings >apt.conf
    mmdebstrap --mode=chrootless --variant=extract --quiet --aptopt=apt.conf --architectures=arm64 \
        --setup-hook='for name in bin sbin lib; do mkdir -p "$1/usr/$name" && ln -s "usr/$name" "$1/$name"; done' \
        --extract-hook="'$here/image.sh' --extracted \"\$1\"" --include='?priority(required)' --include="$packages" "$suite" root "$mirror"
}

# kernel_and_initrd: the kernel is the emulator's, not a package of the board; so is what loads the first modules.
kernel_and_initrd() {
    local version modules folder module
    dpkg-deb --extract kernel/*.deb kernel
    modules=$(echo kernel/lib/modules/*)
    version=$(basename "$modules")
    mv "kernel/boot/vmlinuz-$version" vmlinuz
    for folder in $without; do
        rm -rf "${modules:?}/kernel/$folder"
    done
    mkdir -p root/usr/lib/modules
    mv "$modules" root/usr/lib/modules/
    depmod --basedir root "$version"
    mkdir -p early/modules early/proc early/sys early/dev early/root
    cp root/usr/bin/busybox early/
    for module in $early; do
        modprobe --dirname root --set-version "$version" --config /dev/null --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >order
    while read -r module; do
        cp "$module" early/modules/
        basename "$module"
    done <order >early/order
    install -m 755 "$here/initrd.sh" early/init
    (cd early && find . | cpio --quiet --create --format=newc --owner=0:0) | gzip -1 >initrd
}

# authorities: what `update-ca-certificates` makes, which takes an emulated processor two minutes; here it does nothing
# until board-setup puts it back.
authorities() {
    local certificate name
    mkdir -p authorities root/etc/ssl/certs
    for certificate in root/usr/share/ca-certificates/mozilla/*.crt; do
        name=$(basename "$certificate" .crt).pem
        ln -s "${certificate#root}" "root/etc/ssl/certs/$name"
        cp "$certificate" "authorities/$name"
        sed '$a\' "$certificate" >>root/etc/ssl/certs/ca-certificates.crt
    done
    openssl rehash authorities
    find authorities -type l -exec cp --no-dereference {} root/etc/ssl/certs/ \;
    mv root/usr/sbin/update-ca-certificates{,.later}
    ln -s ../bin/true root/usr/sbin/update-ca-certificates
}

# settings: what makes it a board; the files below rootfs/ lie in it as they are.
settings() {
    cp -r "$here/rootfs/." root/
    chmod 755 root/usr/sbin/board-setup
    ssh-keygen -q -t ed25519 -N '' -C board -f id_ed25519
    install -d -m 700 root/root/.ssh
    install -m 600 id_ed25519.pub root/root/.ssh/authorized_keys
    local kind
    for kind in ed25519 ecdsa rsa; do
        ssh-keygen -q -t $kind -N '' -C board -f "root/etc/ssh/ssh_host_${kind}_key"
    done
    sed 's/^/* /' root/etc/ssh/ssh_host_*_key.pub >known_hosts
}

# disk: the file system, which the board then finishes itself.
disk() {
    truncate --size=4G disk.img
    mke2fs -q -t ext4 -L board -E lazy_itable_init=0,lazy_journal_init=0 -d root disk.img
    timeout 1500 qemu-system-aarch64 -machine virt -cpu cortex-a72 -accel tcg,thread=multi -smp 2 -m 1024 -nographic \
        -no-reboot -nic none -monitor none -serial stdio -kernel vmlinuz -initrd initrd \
        -append "root=/dev/vda rw console=ttyAMA0 quiet panic=-1 init=/usr/sbin/board-setup" \
        -drive file=disk.img,format=raw,if=none,id=disk,cache=unsafe -device virtio-blk-device,drive=disk </dev/null | while IFS= read -r line; do echo "$SECONDS $line"; done >setup.log
    grep -q 'board-setup: finished' setup.log || { tail -n 30 setup.log >&2; die "the board did not finish its set-up"; }
}

step() {
    local since=$SECONDS
    echo "board: $1 ..." >&2
    "$2"
    echo "board: $1, $((SECONDS - since)) s" >&2
}

build() {
    step "unpacking Debian $suite for arm64" tree
    step "kernel and initrd" kernel_and_initrd
    settings
    authorities
    step "first start, in which the board configures its packages" disk
    rm -rf root kernel early order apt.conf authorities
}

if [ "${1-}" = --extracted ]; then
    extracted "$2"
    exit
fi
hash=$(cd "$here" && { find rootfs -type f | LC_ALL=C sort | xargs sha256sum; sha256sum image.sh initrd.sh; } | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/eyas/board
place=$cache/$hash
if [ -e "$place/disk.img" ]; then
    echo "$place"
    exit
fi
needs="mmdebstrap dpkg-deb apt-get flock mke2fs cpio depmod openssl qemu-system-aarch64 ssh-keygen"
[ "$(id -u)" = 0 ] || needs+=" fakeroot"
for tool in $needs; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || die "$tool is not installed; run: make system-deps"
done
PATH=$PATH:/usr/sbin:/sbin
if [ "$(id -u)" != 0 ] && [ -z "${FAKEROOTKEY-}" ]; then
    exec fakeroot "$0"
fi
mkdir -p "$cache"
exec 9>"$cache/.lock"
flock --timeout 900 9 || die "another run has been building in $cache for 15 minutes; end it, or remove $cache/.lock"
if [ ! -e "$place/disk.img" ]; then
    mirror=$(mirror)
    rm -rf "$place" "$place.part"
    mkdir "$place.part"
    cd "$place.part"
    build 9>&-
    mv "$place.part" "$place"
fi
echo "$place"
