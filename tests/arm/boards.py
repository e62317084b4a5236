"""Programs on an emulated aarch64 board: the userlands that `userland.sh` built, and what runs in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.support.paths import ROOT

ARM = ROOT / ".arm"
LIMIT_S = 300
"""A command takes 5 to 30 s; the processor may be shared."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Board:
    """A kind of board, as its pinned set of versions serves it."""

    name: str
    """Of the Debian suite, and of the folder below `.arm/`."""
    profile: str
    """Name of the constraints file."""
    python: str
    cpu: str
    """What the emulator pretends to be. Its default has instructions that no such board has (SVE, SME)."""
    runtimes: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def pins(self) -> dict[str, str]:
        """Package -> version that the constraints file states for this board."""
        lines = (ROOT / "constraints" / f"{self.profile}.txt").read_text(encoding="utf-8").splitlines()
        parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
        here = {"platform_machine": "aarch64", "python_version": self.python}
        return {
            pin.name: str(pin.specifier).removeprefix("==")
            for pin in parsed
            if pin.marker is None or pin.marker.evaluate(here)
        }

    @property
    def wheels(self) -> Path:
        """Where the dependencies are unpacked."""
        return ARM / f"wheels-{self.profile}"

    def python_run(
        self, *words: str, mounts: Mapping[Path, str] | None = None, path: str = "/eyas:/wheels"
    ) -> subprocess.CompletedProcess[str]:
        """The board's own Python with these arguments; `mounts` shows folders of this machine there."""
        assert (ARM / self.name / "usr/bin/python3").exists(), f"{ARM / self.name} is not built; run `make test-arm`"
        seen = {
            Path("/dev"): "/dev",
            Path("/proc"): "/proc",
            Path("/sys"): "/sys",
            ROOT / "device": "/eyas",
            self.wheels: "/wheels",
            ARM / "pycache": "/pycache",
            **(mounts or {}),
        }
        binds = [word for here, there in seen.items() for word in ("-b", f"{here}:{there}")]
        proot = [shutil.which("proot") or "proot", "-q", str(ARM / "qemu-aarch64"), "-r", str(ARM / self.name)]
        environment = {
            "PATH": "/usr/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONPATH": path,
            "PYTHONPYCACHEPREFIX": "/pycache",  # compiled once: that takes long under emulation
            "QEMU_CPU": self.cpu,
        }
        return run([*proot, *binds, "-w", "/", "/usr/bin/python3", *words], env=environment)

    def eyas(self, *words: str, opencv5: bool = False, **mounts: Path) -> subprocess.CompletedProcess[str]:
        """`eyas-device` on the board; `bundle=FOLDER` shows a folder as `/bundle` there, and so on."""
        folders = {here: f"/{name}" for name, here in mounts.items()}
        if not opencv5:
            return self.python_run("-m", "eyas_device", *words, mounts=folders)
        folders[ARM / "opencv5"] = "/opencv5"
        return self.python_run("-m", "eyas_device", *words, mounts=folders, path="/eyas:/opencv5:/wheels")


BOARDS = (
    Board("bookworm", "device-numpy1", "3.11", "cortex-a72", ("litert", "tflite")),  # a Raspberry Pi 4
    Board("trixie", "device-numpy2", "3.13", "cortex-a76", ("litert", "onnx")),  # a Raspberry Pi 5
)


def eyas_here(*words: str) -> subprocess.CompletedProcess[str]:
    """`eyas-device` on this machine."""
    return run([sys.executable, "-m", "eyas_device", *words])


def run(command: list[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; after `LIMIT_S` it is killed with all that it started, and `TimeoutExpired` raised."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


def rows(done: subprocess.CompletedProcess[str]) -> Rows:
    """The JSON lines that a command printed; it must have ended well."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]
