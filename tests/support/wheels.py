"""Wheels of the two distributions, built from the source tree without a network."""

from __future__ import annotations

import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile


class Wheel:
    """A built wheel: its size, its files and its metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with ZipFile(path) as archive:
            self.files = {name: archive.getinfo(name).file_size for name in archive.namelist()}
            self.metadata: Message = Parser().parsestr(self._text(archive, "METADATA"))
            self.entry_points = self._text(archive, "entry_points.txt")

    @staticmethod
    def _text(archive: ZipFile, name: str) -> str:
        [found] = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
        return archive.read(found).decode()

    @property
    def packages(self) -> set[str]:
        """Top-level folders without the metadata's."""
        return {name.partition("/")[0] for name in self.files if ".dist-info/" not in name}

    @property
    def requirements(self) -> list[str]:
        """Dependencies that no extra brings."""
        found: list[str] = self.metadata.get_all("Requires-Dist") or []
        return [line for line in found if "extra ==" not in line]


def build(project: Path, folder: Path) -> Wheel:
    """Build the wheel of the project in `project` into `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    return Wheel(path)
