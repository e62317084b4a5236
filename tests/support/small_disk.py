"""Real file systems that are soon full, or turn read-only as a failing SD card does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.system_parts import unavailable


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder` with these options (size=1m). Needs root; skips without, but fails under CI."""
    folder.mkdir()
    done = os.geteuid() == 0 and shutil.which("mount") is not None
    if done:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not done:
        unavailable("a small disk cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Card:
    """An ext4 file system of 8 MB in a file, at `folder`. Needs root and loop devices; skips without."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._image = folder, folder.with_suffix(".img")
        folder.mkdir()
        self._image.write_bytes(bytes(8 << 20))
        if not (os.geteuid() == 0 and shutil.which("mkfs.ext4") and self._run("mkfs.ext4", "-q", "-F", self._image)):
            unavailable("a file system cannot be made here (needs root and mkfs.ext4)")
        self.mount()

    def mount(self) -> None:
        """Mount it, also again: what was not synced before it became read-only is gone."""
        if not self._run("mount", "-o", "loop", self._image, self.folder):
            unavailable("a loop device cannot be mounted here")

    def make_read_only(self) -> None:
        """What the kernel does after an error: open files cannot be written any more."""
        assert self._run("mount", "-o", "remount,abort", self.folder)

    def unmount(self) -> None:
        """Unmount it; files that are open stay usable until they are closed."""
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    @staticmethod
    def _run(*command: str | Path) -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def card(folder: Path) -> Iterator[Card]:
    """Mount a card at `folder` until the block is left."""
    made = Card(folder)
    try:
        yield made
    finally:
        made.unmount()
