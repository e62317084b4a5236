"""What checks may read of the machine and the recipe; tests replace each of it."""

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
    """A workstation and the recipe to check it for."""

    recipe: Recipe = field(default_factory=lambda: Recipe(run=RunSection(name="unnamed")))
    """The defaults without a recipe."""
    recipe_path: Path | None = None
    recipe_error: str = ""
    """Why the recipe is invalid; empty if it is not."""
    runs: Path = Path("runs")
    root: Path = Path("/")
    """Parent of `proc`, `sys` and `dev`."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed
    """Version of an installed package, None if it is not installed."""
    which: Callable[[str], str | None] = shutil.which
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    """Free bytes of a file system."""
    cpus: Callable[[], int] = lambda: len(os.sched_getaffinity(0))
    """Number of cores that this process may use."""
    run: CommandRunner = run_command
    """Runs a system command."""
    job: Job = _run_job
    """Runs one of `eyas_host.doctor.work.JOBS` in a subprocess."""

    def read(self, path: str) -> str | None:
        """Read a small text file below `root`; None if that fails."""
        return text(self.root / path)
