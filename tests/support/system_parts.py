"""Programs that the tests need from the system, and what happens to a test whose program is missing.

`make test` runs this file before the tests: it names what is missing, installs it where it may (`make system-deps`, as
root or by password-less sudo), and otherwise prints the one command that does. With `CI=true` a missing part fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

SYSTEM_PYTHON = "/usr/bin/python3"
"""The interpreter that sees the distribution's GObject bindings."""
_SBIN = ("/usr/sbin", "/usr/local/sbin")
_POSTGRESQL = Path("/usr/lib/postgresql")
"""Debian keeps the server's programs of each version in `VERSION/bin` below it."""
_RTSP = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


class SystemPart(NamedTuple):
    """A program, the Debian package that holds it, and what is tested with it."""

    program: str
    package: str
    purpose: str


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Any of these draws the reports."""
BROWSER = SystemPart(BROWSERS[0], "chromium-headless-shell", "how reports look in a browser")
RTSP = SystemPart("GstRtspServer", "gir1.2-gst-rtsp-server-1.0", "RTSP cameras")
PARTS = (
    SystemPart("mosquitto", "mosquitto", "telemetry, collector and live view"),
    SystemPart("nginx", "nginx-light", "a repository behind a web server"),
    SystemPart("openssl", "openssl", "certificates"),
    SystemPart("ssh", "openssh-client", "flash and remote benchmarks"),
    SystemPart("sshd", "openssh-server", "flash and remote benchmarks"),
    SystemPart("rsync", "rsync", "flash"),
    SystemPart("softhsm2-util", "softhsm2", "signing keys in hardware"),
    SystemPart("strace", "strace", "how often the spool syncs, and which changes of the disk an installation makes"),
    SystemPart("cc", "gcc", "kills and errors of the disk at each change of an installation"),
    SystemPart("mkfs.ext4", "e2fsprogs", "power cuts of a recorded disk"),
    SystemPart("initdb", "postgresql-15", "the telemetry store on PostgreSQL"),
    SystemPart("systemd-analyze", "systemd", "the hardening of the service"),
    SystemPart("qemu-system-aarch64", "qemu-system-arm", "a whole board"),
    SystemPart("qemu-img", "qemu-utils", "a whole board"),
    SystemPart("mmdebstrap", "mmdebstrap", "aarch64 programs and a whole board"),
    SystemPart("sudo", "sudo", "flash by a user who may become root"),
    SystemPart("cpio", "cpio", "a whole board"),
    SystemPart("depmod", "kmod", "a whole board"),
    BROWSER,
    RTSP,
)


def find(program: str) -> str | None:
    """Path of a program, also where only root's PATH has it or none does; None if it is not installed."""
    servers = sorted(_POSTGRESQL.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", ""), *_SBIN, *map(str, servers))))


def is_there(part: SystemPart) -> bool:
    """Whether a part can be used here."""
    if part is BROWSER:
        return any(map(find, BROWSERS))
    if part is not RTSP:
        return find(part.program) is not None
    if not os.access(SYSTEM_PYTHON, os.X_OK):
        return False
    return subprocess.run([SYSTEM_PYTHON, "-c", _RTSP], capture_output=True, check=False).returncode == 0


def in_ci() -> bool:
    """Whether this is continuous integration, where nothing may be missing."""
    return os.environ.get("CI") == "true"


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it in continuous integration."""
    import pytest

    if in_ci():
        pytest.fail(reason)
    pytest.skip(reason)


def require(*programs: str) -> tuple[str, ...]:
    """Paths of `programs`; without one of them the test is skipped, or fails in continuous integration."""
    paths = {program: find(program) for program in programs}
    missing = [program for program, path in paths.items() if path is None]
    if missing:
        unavailable(f"not installed: {', '.join(missing)} (make system-deps)")
    return tuple(path for path in paths.values() if path is not None)


def main(arguments: Sequence[str]) -> int:
    """Report missing parts and, with `--install`, try to install them; 1 if CI misses one."""
    missing = [part for part in PARTS if not is_there(part)]
    if missing and "--install" in arguments and _may_install():
        print("tests: installing what is missing:", *(part.package for part in missing), flush=True)
        subprocess.run(["make", "--no-print-directory", "system-deps"], check=False)
        missing = [part for part in missing if not is_there(part)]
    if not missing:
        print("tests: every system part is there")
        return 0
    for part in missing:
        verdict = "fail" if in_ci() else "are skipped"
        print(f"tests: {part.program} is missing (package {part.package}): tests of {part.purpose} {verdict}")
    print("tests: `make system-deps` installs it (Debian, Ubuntu, Raspberry Pi OS; as root or with sudo)", flush=True)
    return 1 if in_ci() else 0


def _may_install() -> bool:
    """Whether apt can be run without asking for a password."""
    if shutil.which("apt-get") is None:
        return False
    if os.geteuid() == 0:
        return True
    return (
        shutil.which("sudo") is not None and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
