"""Check a device before anything on it is changed: one inspection, all problems at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import msgspec

from eyas_device.agent.service import AGENT_UNITS
from eyas_device.support.versions import version_numbers
from eyas_host.fleet.connect.ssh import FleetError, Remote

MACHINES = ("x86_64", "aarch64")
MIN_PYTHON = (3, 10)
MIN_GLIBC = (2, 28)
"""The wheels of LiteRT and OpenCV need it."""
ENVIRONMENT_BYTES = 700_000_000
"""Peak size of a virtual environment with its wheels while it is built."""
MAX_CLOCK_SKEW_S = 120

_PROBE = """
import importlib.util as u, pathlib, sys
here = pathlib.Path(sys.executable).resolve()
hidden = ("/home", "/root", "/run/user")  # by the service's ProtectHome=
closed = [str(folder) for folder in here.parents if str(folder) in hidden or not folder.stat().st_mode & 1]
if sys.argv[1:] == ["open"]:
    sys.exit(bool(closed))
print("python=" + sys.executable)
print("python_closed=" + "".join(closed[-1:]))
print("python_version=%d.%d.%d" % sys.version_info[:3])
print("venv=" + ("yes" if u.find_spec("venv") and u.find_spec("ensurepip") else "no"))
print("picamera2=" + ("yes" if u.find_spec("picamera2") else "no"))
modules = dict(litert="ai_edge_litert", tflite="tflite_runtime", openvino="openvino", onnx="onnxruntime")
print("runtimes=" + " ".join(name for name, module in modules.items() if u.find_spec(module)))
try:
    import numpy
    print("numpy=" + numpy.__version__)
except ImportError:
    pass
"""

_INSPECT = """
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "bits=$(getconf LONG_BIT 2>/dev/null || echo unknown)"
echo "glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null)"
echo "os=$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
echo "uid=$(id -u)"
echo "user=$(id -un)"
echo "time=$(date +%s)"
echo "sudo=$(sudo -n true >/dev/null 2>&1 && echo yes)"
as=; [ "$(id -u)" = 0 ] || { sudo -n true >/dev/null 2>&1 && as="sudo -n"; }
echo "rsync=$(command -v rsync)"
echo "systemd=$(command -v systemctl >/dev/null && systemctl is-system-running 2>/dev/null)"
for word in opt state; do
  [ $word = opt ] && d=$1 || d=$2
  while [ ! -d "$d" ]; do d=$(dirname "$d"); done
  echo "${word}_free_kb=$(df -Pk "$d" | awk 'NR == 2 { print $4 }')"
  [ -w "$d" ] && echo "${word}_writable=yes"
done
echo "venv_link=$(readlink "$1/venv")"
[ -d "$1/venv" ] && [ ! -L "$1/venv" ] && echo "venv_link=."
for d in "$1"/venv-*; do [ -f "$d/eyas.stamp" ] && echo "environment=${d##*/}"; done
$as test -f "$3" && echo "config=yes"
$as sed -n '/^[[:space:]]*\\[update\\]/,/^[[:space:]]*\\[[a-z]/{
  s/^[[:space:]]*agent[[:space:]]*=[[:space:]]*true.*/agent_updates=yes/p
}' "$3" 2>/dev/null
$as sed -n '/^[[:space:]]*\\[model\\]/,/^[[:space:]]*\\[[a-z]/{
  s/^[[:space:]]*\\(runtime\\|artefact\\)[[:space:]]*=[[:space:]]*"\\([A-Za-z0-9_.-]*\\)".*/model_\\1=\\2/p
}' "$3" 2>/dev/null
for f in "$3" "$6"/ca.crt "$6"/client.crt "$6"/client.key "$6"/root.json "$7" "$8" "$9" "${10}" "${11}"; do
  $as test -f "$f" && echo "file=$($as sha256sum "$f" | cut -c1-64) $($as stat -c '%a %G' "$f") $f"
done
[ -f "$1/.flashing" ] && echo "unfinished=yes"
current=$($as readlink "$2/slots/current") && echo "slot=$current" &&
  echo "slot_sha256=$($as cat "$2/slots/$current.good" 2>/dev/null)"
python=
for p in "$5" python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
  [ -n "$p" ] || continue
  command -v "$p" >/dev/null || { [ "$p" = "$5" ] && break; continue; }
  "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { [ "$p" = "$5" ] && break; continue; }
  [ -n "$python" ] || python=$p
  [ "$p" = "$5" ] && break
  "$p" -c "$4" open && python=$p && break
done
[ -z "$python" ] || "$python" -c "$4"
true
"""


class Layout(msgspec.Struct, frozen=True):
    """Paths on a device."""

    root: str = "/"
    """Everything is installed below; anything but `/` is for trials and gets no service."""

    @property
    def opt(self) -> str:
        """Folder of the virtual environments."""
        return self._below("opt/eyas")

    @property
    def state(self) -> str:
        """Folder of the slots."""
        return self._below("var/lib/eyas")

    @property
    def config(self) -> str:
        """Path of the configuration file."""
        return self._below("etc/eyas/device.toml")

    @property
    def credentials(self) -> str:
        """Folder of certificate and key."""
        return self._below("etc/eyas/credentials")

    @property
    def unit(self) -> str:
        """Path of the service's unit file."""
        return self._below("etc/systemd/system/eyas-device.service")

    @property
    def updater(self) -> str:
        """Path of the updater's unit file."""
        return self._below("etc/systemd/system/eyas-device-update.service")

    @property
    def agent_units(self) -> tuple[str, ...]:
        """Paths of root's unit files that exchange the agent by a signed release."""
        return tuple(self._below(f"etc/systemd/system/{unit.name}") for unit in AGENT_UNITS)

    @property
    def rules(self) -> str:
        """Path of the udev rules."""
        return self._below("etc/udev/rules.d/70-eyas-camera.rules")

    def _below(self, path: str) -> str:
        return str(PurePosixPath(self.root) / path)


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a device, as its shell printed them; empty where unknown."""

    system: str = ""
    machine: str = ""
    bits: str = ""
    glibc: str = ""
    os: str = ""
    uid: str = ""
    user: str = ""
    sudo: str = ""
    rsync: str = ""
    systemd: str = ""
    """Output of `systemctl is-system-running`."""
    time: str = ""
    opt_free_kb: str = ""
    opt_writable: str = ""
    state_free_kb: str = ""
    state_writable: str = ""
    venv_link: str = ""
    """Environment in use; `.` if it is a plain folder, not a link."""
    environments: tuple[str, ...] = ()
    """Complete environments."""
    config: str = ""
    model_runtime: str = ""
    """`[model] runtime` of the configuration there."""
    model_artefact: str = ""
    agent_updates: str = ""
    """`yes` if the configuration there has `[update] agent = true`."""
    files: tuple[str, ...] = ()
    """Configuration, credentials, units and udev rules: sha256, mode, group and path of each."""
    unfinished: str = ""
    """`yes` if an earlier flash was interrupted."""
    slot: str = ""
    slot_sha256: str = ""
    python: str = ""
    """Absolute path of the first Python that is recent enough, of those that a service can run if there is one."""
    python_closed: str = ""
    """A folder above it into which a service's user cannot look."""
    python_version: str = ""
    venv: str = ""
    picamera2: str = ""
    runtimes: str = ""
    """Runtimes that this Python can import, separated by blanks."""
    numpy: str = ""
    """Version of numpy in this Python."""
    skew_s: float = 0.0
    """Device clock minus ours, seconds."""

    @property
    def file_facts(self) -> Iterator[tuple[str, str, str, str]]:
        """sha256, mode, group and path of each file in `files`."""
        for line in self.files:
            digest, mode, group, path = line.split(" ", 3)
            yield digest, mode, group, path

    @property
    def has_systemd(self) -> bool:
        """Whether systemd runs."""
        return self.systemd in ("running", "degraded", "starting", "initializing", "maintenance")

    @property
    def python_numbers(self) -> tuple[int, ...]:
        """Version of Python as a tuple, e.g. (3, 11, 2)."""
        return version_numbers(self.python_version)

    @property
    def profile(self) -> str:
        """Name of the matching constraints: apt's picamera2 with numpy 1 needs numpy 1; Python 3.10 has its own set."""
        if self.python_numbers[:2] == MIN_PYTHON:
            return "device-jetpack6"
        return "device-numpy1" if self.picamera2 == "yes" and self.numpy.startswith("1.") else "device-numpy2"


def inspect_device(remote: Remote, layout: Layout, python: str | None = None) -> DeviceFacts:
    """Inspect a device without changing it. `python`: the only interpreter to consider."""
    arguments = (
        layout.opt,
        layout.state,
        layout.config,
        _PROBE,
        python or "",
        layout.credentials,
        layout.unit,
        layout.rules,
        layout.updater,
        *layout.agent_units,
    )
    result = remote.run("sh", "-c", _INSPECT, "sh", *arguments, timeout_s=90)
    if result.code:
        raise FleetError(f"cannot be inspected ({result.last_line}); a POSIX shell is needed there", remote.target)
    here = time.time()
    values: dict[str, str] = {}
    environments, files = [], []
    for line in result.out.splitlines():
        key, equals, value = line.partition("=")
        if equals and key == "environment":
            environments.append(value)
        elif equals and key == "file":
            files.append(value)
        elif equals and key in DeviceFacts.__struct_fields__ and key not in ("environments", "files", "skew_s"):
            values[key] = value.strip()
    skew = float(values["time"]) - here if values.get("time", "").isdecimal() else 0.0
    return DeviceFacts(**values, environments=tuple(environments), files=tuple(files), skew_s=skew)


def missing_files(remote: Remote, facts: DeviceFacts, layout: Layout, paths: Sequence[str], *, service: bool) -> str:
    """Which of these files are not on the device, in a sentence; empty if all are there."""
    if not paths:
        return ""
    script = 'for f in "$@"; do [ -e "$f" ] || printf "%s\\n" "$f"; done'
    missing = remote.run("sh", "-c", script, "sh", *paths, become=sudo_prefix(facts, layout, service=service)).out
    names = ", ".join(missing.splitlines())
    fix = "bring them with --name, for an enrolled device, or by hand"
    return f"{names}: named in the configuration, but missing there; {fix}" if names else ""


def closed_python(facts: DeviceFacts, user: str) -> str:
    """Why the service cannot run the device's Python as `user`, in a sentence; empty if it can."""
    if not facts.python_closed or user == facts.user:
        return ""
    fix = "apt-get install python3 python3-venv, or give --python"
    return f"{facts.python}: the service cannot look into {facts.python_closed}; {fix}"


def problems(facts: DeviceFacts, layout: Layout, *, bundle_bytes: int, environment: bool, service: bool) -> list[str]:
    """List everything that has to be fixed on the device first.

    Args:
        facts: What is known about the device.
        layout: Paths on the device.
        bundle_bytes: Size of the bundle.
        environment: Whether an environment has to be built.
        service: Whether the service is installed.

    """
    found = []
    if facts.system != "Linux":
        found.append(f"runs {facts.system or 'an unknown system'}; Linux is needed")
    if facts.machine not in MACHINES or facts.bits != "64":
        found.append(f"{facts.machine} with {facts.bits}-bit programs; a 64-bit system is needed (aarch64 or x86_64)")
    if not facts.python:
        found.append("no Python 3.10 or newer; apt-get install python3 python3-venv, or give --python")
    if not facts.rsync:
        found.append("no rsync; apt-get install rsync")
    if not _may_write(facts, layout, service):
        found.append(f"{facts.user} cannot write to {layout.root}; log in as root or allow password-less sudo")
    if environment:
        if facts.python and facts.venv != "yes":
            found.append("Python has no venv; apt-get install python3-venv")
        libc = facts.glibc.removeprefix("glibc ")
        if version_numbers(libc) < MIN_GLIBC:
            found.append(f"glibc {libc or 'unknown'}; 2.28 or newer is needed: install a newer system image")
        if facts.venv_link == ".":
            found.append(f"{layout.opt}/venv is a folder, not a link of eyas: move it away, or give --python")
        found += _disk_problem(facts.opt_free_kb, ENVIRONMENT_BYTES, layout.opt)
    found += _disk_problem(facts.state_free_kb, 2 * bundle_bytes + (1 << 20), layout.state)
    return found


def warnings(facts: DeviceFacts) -> list[str]:
    """List what does not prevent a flash but should be known."""
    if abs(facts.skew_s) <= MAX_CLOCK_SKEW_S:
        return []
    return [f"its clock is {abs(facts.skew_s):.0f} s {'ahead' if facts.skew_s > 0 else 'behind'}: set up NTP"]


def sudo_prefix(facts: DeviceFacts, layout: Layout, *, service: bool) -> tuple[str, ...]:
    """Prefix of commands that change the device: sudo where it is needed."""
    direct = facts.uid == "0" or (not service and facts.opt_writable == "yes" == facts.state_writable)
    return () if direct else ("sudo", "-n")


def _may_write(facts: DeviceFacts, layout: Layout, service: bool) -> bool:
    return not sudo_prefix(facts, layout, service=service) or facts.sudo == "yes"


def _disk_problem(free_kb: str, needed: int, folder: str) -> list[str]:
    if not free_kb.isdecimal():
        return [f"{folder}: free space unknown (output of df: {free_kb!r})"]
    free = int(free_kb) * 1024
    return (
        [] if free >= needed else [f"{folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed; free some space"]
    )
