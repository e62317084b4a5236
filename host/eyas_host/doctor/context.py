"""What checks may read of the machine and the recipe; tests replace each of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from eyas_device.board.reading import CommandRunner, text
from eyas_device.doctor.finding import installed
from eyas_device.support.processes import JobError, run_command, run_job
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection

Job = Callable[[str, Mapping[str, object], float], Any]
run_alone: Job = partial(run_job, "eyas_host.doctor.work")
"""Runs one of `eyas_host.doctor.work.JOBS` in a subprocess of its own."""
_TOGETHER_S = 240.0


class SharedJobs:
    """Jobs that one subprocess runs at the first call, because the imports that they share take most of their time.

    If it crashes or hangs, each job runs in a process of its own, so that the one to blame is found.
    """

    def __init__(self, plan: Mapping[str, Mapping[str, object]], run: Job = run_alone) -> None:
        self._plan, self._run = plan, run

    def __call__(self, job: str, arguments: Mapping[str, object], timeout_s: float) -> Any:
        """Result of a job; raises `JobError`."""
        reply = self._replies.get(job) if self._plan.get(job) == arguments else None
        if reply is None:
            return self._run(job, arguments, timeout_s)
        if "error" in reply:
            raise JobError(reply["error"], reply["kind"])
        return reply["result"]

    @cached_property
    def _replies(self) -> Mapping[str, Any]:
        try:
            replies: Mapping[str, Any] = self._run("together", {"plan": self._plan}, _TOGETHER_S)
        except JobError:
            return {}
        return replies


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
    job: Job = run_alone
    """Runs one of `eyas_host.doctor.work.JOBS` in a subprocess."""

    def read(self, path: str) -> str | None:
        """Read a small text file below `root`; None if that fails."""
        return text(self.root / path)
