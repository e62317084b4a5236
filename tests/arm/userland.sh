#!/usr/bin/env bash
# Two emulated boards below .arm/, kept from run to run: a piece is built again when what it is made from changed.
#
#   .arm/bookworm  .arm/trixie    Debian arm64 with its own Python: what Raspberry Pi OS is made from
#   .arm/wheels-*                 the device's dependencies for aarch64, from constraints/device-*.txt
#   .arm/opencv5                  OpenCV 5 for aarch64, whose pixels differ a little
#   .arm/qemu-aarch64             the emulator of Debian trixie (Debian 12's own crashes LiteRT)
#
# The Debian mirror is that of this machine's apt; DEBIAN_MIRROR=ADDRESS names another one. No root is needed.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/support/debian.sh
arm=.arm
uv=${UV:-.venv/bin/uv}
mkdir -p "$arm"

for tool in mmdebstrap proot dpkg apt-get flock; do
    command -v "$tool" >/dev/null || die "$tool is not installed; run: make system-deps"
done
test -x "$uv" || command -v "$uv" >/dev/null || die "$uv is not there; run: make install"
exec 9>"$arm/.lock"
flock --timeout 900 9 || die "another run has been building in $arm for 15 minutes; end it, or remove $arm/.lock"

# made PLACE WHAT: whether PLACE was made from WHAT.
made() {
    test -e "$1" && test "$(cat "$1.made" 2>/dev/null)" = "$2"
}

# begin PLACE WORDS: say what begins, and remove what an earlier, interrupted run left.
begin() {
    echo "test-arm: $2 ..." >&2
    rm -rf "$1" "$1.part" "$1.made"
    started=$SECONDS
}

# finish PLACE WHAT: put PLACE.part in place; a run that is killed before this builds it again.
finish() {
    mv "$1.part" "$1"
    echo "$2" >"$1.made"
    echo "test-arm: $1, $(du -sh "$1" | cut -f1), $((SECONDS - started)) s" >&2
}

# extract FOLDER SUITE ARCHITECTURE PACKAGES: the files of packages and of all that they need; nothing is configured.
extract() {
    apt_settings >"$arm/apt.conf"
    # chrootless only unpacks here, as any user, and makes no device files
    mmdebstrap --mode=chrootless --variant=extract --quiet --aptopt="$arm/apt.conf" \
        --architectures="$3" --include="$4" "$2" "$1" "$mirror"
}

# userland SUITE: python3, and the libraries that the wheels of OpenCV and the runtimes expect of the system.
userland() {
    local place=$arm/$1 packages=base-files,libgomp1,libstdc++6,python3
    made "$place" "$packages" && return
    begin "$place" "userland of Debian $1 for arm64"
    extract "$place.part" "$1" arm64 "$packages"
    finish "$place" "$packages"
}

emulator() {
    local place=$arm/qemu-aarch64 what="qemu-user of trixie"
    made "$place" "$what" && return
    begin "$place" "emulator"
    rm -rf "$arm/qemu.all"
    extract "$arm/qemu.all" trixie "$(dpkg --print-architecture)" qemu-user
    cp "$arm/qemu.all/usr/bin/qemu-aarch64" "$place.part"
    rm -rf "$arm/qemu.all"
    finish "$place" "$what"
}

# wheels PROFILE PYTHON GLIBC PACKAGES: what `pip install -c constraints/PROFILE.txt ./device PACKAGES` brings to a board.
wheels() {
    local profile=$1 python=$2 glibc=$3 place=$arm/wheels-$1 what
    shift 3
    what=$(cat device/pyproject.toml "constraints/$profile.txt" <(echo "$python $glibc $*") | sha256sum)
    made "$place" "$what" && return
    begin "$place" "wheels of $profile for Python $python"
    fetch "$place.part" "$python" "$glibc" \
        --constraint "constraints/$profile.txt" --requirement device/pyproject.toml "$@"
    finish "$place" "$what"
}

# opencv5 PYTHON GLIBC VERSION: OpenCV 5 alone, which a board gets that is installed without its constraints file.
opencv5() {
    local place=$arm/opencv5
    made "$place" "$*" && return
    begin "$place" "OpenCV $3"
    fetch "$place.part" "$1" "$2" --no-deps "opencv-python-headless==$3"
    finish "$place" "$*"
}

# fetch FOLDER PYTHON GLIBC WORDS: install wheels for another machine and Python than this one.
fetch() {
    local folder=$1 python=$2 glibc=$3
    shift 3
    "$uv" pip install --quiet --target "$folder" --python-version "$python" \
        --python-platform "aarch64-manylinux_$glibc" --only-binary :all: "$@"
}

mirror=$(mirror)
userland bookworm
userland trixie
emulator
wheels device-numpy1 3.11 2_36 tflite-runtime
wheels device-numpy2 3.13 2_40 onnxruntime
opencv5 3.13 2_40 "$(sed -n 's/^opencv-python-headless==\(5[^ ;]*\).*/\1/p' constraints/host.txt)"
mkdir -p "$arm/pycache"
