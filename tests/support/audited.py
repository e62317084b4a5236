"""Watch what a command of ours, with all its child processes, looks up, connects to and writes.

A `sitecustomize` on the module path adds an audit hook to every Python process; it sees what Python code and its
sockets do. Native code that opens sockets or files of its own is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

_HOOK = """
import os, sys
_log = os.environ["EYAS_TEST_AUDIT"]
def _hook(event, args, _open=os.open, _write=os.write):
    if event == "socket.getaddrinfo":
        line = f"lookup {args[0]!r}"
    elif event == "socket.gethostbyname":
        line = f"lookup {args[0]!r}"
    elif event in ("socket.connect", "socket.sendto"):
        line = f"connect {args[1]!r}"
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and isinstance(args[2], int) \\
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        line = f"write {os.path.abspath(os.fsdecode(args[0]))}"
    elif event in ("os.mkdir", "os.rename", "shutil.copyfile"):
        line = f"write {os.path.abspath(os.fsdecode(args[1 if event != 'os.mkdir' else 0]))}"
    else:
        return
    if line != f"write {_log}":
        descriptor = _open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        _write(descriptor, (line.replace("\\n", " ") + "\\n").encode(errors="replace"))
        os.close(descriptor)
sys.addaudithook(_hook)
"""


class Audited(NamedTuple):
    """What a command did."""

    code: int
    output: str
    lookups: list[str]
    """Names looked up and addresses connected to, but for loopback and unix sockets."""
    written: list[Path]


def audited(folder: Path, module: str, *arguments: object, home: Path, timeout: float = 300.0) -> Audited:
    """Run `python -m MODULE ARGUMENTS` in `folder` with `home` as the home folder.

    `home` may be missing or no folder at all.
    """
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(_HOOK)
    log = folder / "audit.log"
    log.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EYAS_", "HF_"))}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(map(str, (hooks, ROOT / "device", ROOT / "host"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "EYAS_TEST_AUDIT": str(log),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    lookups = [line for line in lines if not line.startswith("write ") and not _is_local(line)]
    written = [Path(line.removeprefix("write ")) for line in lines if line.startswith("write ")]
    return Audited(done.returncode, done.stdout + done.stderr, lookups, written)


def _is_local(line: str) -> bool:
    unix_socket = line.startswith(("connect '", "connect b'"))
    return unix_socket or any(word in line for word in ("'127.", "'::1'", "'localhost'"))
