"""Let a change of the disk fail, or end the process there: one fault at one place of a real run of `eyas-device`.

`fault_shim.c` is preloaded into one process that has imported the device's programs; each run is a fork of it, so that
hundreds of faults take seconds each dozen. `python -m tests.support.faults` is that process: requests and replies are
lines of JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.support.closing import Closing
from tests.support.paths import ROOT
from tests.support.system_parts import require

SOURCE = Path(__file__).with_name("fault_shim.c")
TIMEOUT_S = 60.0
_IMPORTED = ("eyas_device", "absl", "email", "http", "urllib3", "tuf", "securesystemslib", "numpy", "importlib")
"""Packages that the process imports as soon as a run has: none of them starts threads."""


class Fault(IntEnum):
    """What happens at the chosen change; the numbers are those of `fault_shim.c`."""

    NONE = 0
    KILL = 1
    """SIGKILL before the change."""
    TORN = 2
    """SIGKILL after half of a write."""
    NO_SPACE = 3
    """ENOSPC once."""
    FULL = 4
    """ENOSPC for all that takes space from there on."""
    IO_ERROR = 5
    """EIO once."""
    DEAD = 6
    """EIO for every change from there on."""
    HANG = 7
    """SIGSTOP, and SIGKILL later: what a watchdog does to a process that hangs."""
    TERM = 8
    """SIGTERM."""
    LOST_SYNC = 9
    """No sync does anything: what a program without them leaves on a disk."""


class Change(msgspec.Struct, frozen=True):
    """One change of the disk."""

    what: str
    """`open`, `write`, `fsync`, `rename` and so on."""
    path: str
    """Relative to the watched folder."""

    def __str__(self) -> str:
        return f"{self.what} {self.path}"


class Run(msgspec.Struct, frozen=True):
    """How a run ended."""

    code: int
    """Exit code; a negative one is the signal that ended it."""
    output: str
    changes: list[Change]
    """Changes below the watched folder, also those that failed."""
    meanwhile: Run | None = None
    """How the other program ended that ran while this one hung; None if it did not hang."""


class Request(msgspec.Struct, frozen=True):
    """What to run, and which of its changes meets a fault."""

    arguments: list[str]
    """Words after `MODULE`'s program name."""
    folder: str
    at: int = 0
    fault: int = 0
    meanwhile: list[str] = []
    """What runs while a program hangs, before it is killed."""
    module: str = "eyas_device.cli"


class FaultyDisk(Closing):
    """Runs programs in forks of one process that has imported them, below whose files faults happen."""

    def __init__(self, scratch: Path, *imports: str, environment: dict[str, str] | None = None) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch
        library = build(scratch)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults", str(library), str(scratch), *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "LD_PRELOAD": str(library),
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "device", ROOT / "host", ROOT))),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **(environment or {}),
            },
        )

    def run(
        self,
        folder: Path,
        *arguments: object,
        at: int = 0,
        fault: Fault = Fault.NONE,
        meanwhile: Sequence[object] = (),
        module: str = "eyas_device.cli",
    ) -> Run:
        """Run `module`'s `main`; the change number `at` (from 1) below `folder` meets `fault`.

        A program that hangs is killed once the words `meanwhile` have run.
        """
        words, others = list(map(str, arguments)), list(map(str, meanwhile))
        request = Request(words, os.path.realpath(folder), at, int(fault), others, module)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, "the process with the faults has ended"
        return msgspec.json.decode(reply, type=Run)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)


def build(folder: Path) -> Path:
    """Compile the preloaded library."""
    (compiler,) = require("cc")
    library = folder / "fault_shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE, "-ldl"], check=True
    )
    return library


def verified(slots: Path) -> str | None:
    """The version of the bundle that the link `current` names, every byte of which is as its manifest says.

    Written without the device's own code. None if there is no link; `AssertionError` if it leads to anything else.
    """
    link = slots / "current"
    if not os.path.lexists(link):
        return None
    assert link.is_symlink(), f"{link}: no link"
    target = str(link.readlink())
    assert target in ("a", "b"), f"{link}: names {target!r}"
    content = (slots / target / "manifest.json").read_bytes()
    marker = (slots / f"{target}.good").read_text()
    assert marker == hashlib.sha256(content).hexdigest(), f"slot {target}: marked {marker!r}"
    manifest: dict[str, Any] = json.loads(content)
    files = [file for artefact in manifest["artefacts"] for file in artefact["files"]]
    files += [manifest[key] for key in ("golden", "reference") if manifest.get(key)]
    assert files, f"slot {target}: no file in its manifest"
    for file in files:
        data = (slots / target / file["path"]).read_bytes()
        assert len(data) == file["size_bytes"] and hashlib.sha256(data).hexdigest() == file["sha256"], file["path"]
    return str(manifest["version"])


def _serve(library: str, scratch: Path, modules: list[str]) -> None:
    """Answer requests until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    arm = ctypes.CDLL(library).fault_arm
    arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    arm.restype = None
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        sys.stdout.buffer.write(msgspec.json.encode(_run(request, scratch, arm)) + b"\n")
        sys.stdout.buffer.flush()
        _import_what_was_imported(scratch / "modules")


def _import_what_was_imported(listed: Path) -> None:
    """Import what a run had to import, so that the next ones need not."""
    if listed.exists():
        for name in listed.read_text().split():
            if name not in sys.modules and name.startswith(_IMPORTED):
                with suppress(Exception):
                    importlib.import_module(name)
        listed.unlink()


def _run(request: Request, scratch: Path, arm: Any) -> Run:
    output, changes = scratch / "output", scratch / "changes"
    for path in (output, changes):
        path.write_bytes(b"")
    child = os.fork()
    if child == 0:
        _run_child(request, output, changes, arm)
    _, status = os.waitpid(child, os.WUNTRACED)
    meanwhile = None
    if os.WIFSTOPPED(status):
        if request.meanwhile:
            other = Request(request.meanwhile, request.folder, module=request.module)
            (beside := scratch / "meanwhile").mkdir(exist_ok=True)
            meanwhile = _run(other, beside, arm)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    lines = [line.partition(" ") for line in changes.read_text().splitlines()]
    seen = [Change(what, path.removeprefix("/")) for what, _, path in lines]
    return Run(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), seen, meanwhile)


def _run_child(request: Request, output: Path, changes: Path, arm: Any) -> None:
    """Become the program; never returns."""
    code = 70
    with suppress(BaseException):
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            log = os.open(changes, os.O_WRONLY | os.O_APPEND)
            main = importlib.import_module(request.module).main
            arm(request.folder.encode(), request.at, request.fault, log)
            known = set(sys.modules)
            code = main(request.arguments)
            if new := sys.modules.keys() - known:
                output.with_name("modules").write_text("\n".join(sorted(new)))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
