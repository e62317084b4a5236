"""What a child process does in tests; a module that imports little, because the child imports it, too."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from eyas_host.support.errors import CompileError
from eyas_host.support.progress import meter


def work_until(released: Path, resumed: int) -> str:
    """Ten steps of a training; the last two wait for a file."""
    with meter("student", 10, done=resumed) as bar:
        for step in range(resumed, 10):
            while step >= 8 and not released.exists():
                time.sleep(0.02)
            bar.advance()
    return "history"


def be_killed() -> None:
    """As the system ends a process for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """As a compiler refuses a network."""
    raise CompileError("this network is too odd")


def wait_for_ever(started: Path) -> None:
    """Work that does not end, and whose process writes its number."""
    started.write_text(str(os.getpid()), encoding="utf-8")
    while True:
        time.sleep(1)
