"""A process whose power is cut at a step of its work on the slots."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from eyas_device.updates import slots


def cut_at(root: Path, work: Callable[[], object], at: int, *, may_fail: bool = False) -> bool:
    """Do `work` in a process whose power is cut at its step number `at`; True if it came so far.

    A step is a change of the slots, or an fsync. Files below `root` that were not synced by then are emptied, as a disk
    may find them after a power cut. Work that ends before has to succeed, unless it `may_fail`.
    """
    child = os.fork()
    if child == 0:
        try:
            synced = {path.lstat().st_ino for path in root.rglob("*")}
            left = at

            def step(name: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    for path in root.rglob("*"):
                        found = path.lstat()
                        if path.is_file() and not path.is_symlink() and found.st_ino not in synced:
                            os.truncate(path, 0)
                    os.kill(os.getpid(), signal.SIGKILL)

            def sync(descriptor: int) -> None:
                step("fsync")
                synced.add(os.fstat(descriptor).st_ino)

            slots._step = step
            os.fsync = sync
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    cut = os.WIFSIGNALED(status)
    assert cut or may_fail or status == 0, f"it failed: {status}"
    return cut
