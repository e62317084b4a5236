"""What is examined, and through which eyes: everything that a check reads of the machine can be replaced in a test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eyas_device.board.reading import CommandRunner, text
from eyas_device.doctor.finding import installed
from eyas_device.support.processes import run_command, run_job
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection

Job = Callable[[str, Mapping[str, object], float], Any]
_run_job = partial(run_job, "eyas_host.doctor.work")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A workstation, and the recipe that it is to serve."""

    recipe: Recipe = field(default_factory=lambda: Recipe(run=RunSection(name="unnamed")))
    """The defaults where none is given."""
    recipe_path: Path | None = None
    recipe_error: str = ""
    """Why the file was not read."""
    runs: Path = Path("runs")
    root: Path = Path("/")
    """Above `proc`, `sys` and `dev`."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed
    """Of an installed package."""
    which: Callable[[str], str | None] = shutil.which
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    """Bytes."""
    cpus: Callable[[], int] = lambda: len(os.sched_getaffinity(0))
    """Cores that this process may use."""
    run: CommandRunner = run_command
    """Runs a command of the system."""
    job: Job = _run_job
    """Runs one of `eyas_host.doctor.work.JOBS` where it may hang and crash."""

    def read(self, path: str) -> str | None:
        """The text of a small file below `root`, None if it cannot be read."""
        return text(self.root / path)
