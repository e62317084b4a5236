"""Live training curves through Accelerate's trackers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eyas_host.pipeline import distributed
from eyas_host.recipe import Recipe
from eyas_host.support.errors import MissingExtra

FOLDER = "curves"
"""Below the run's folder: one folder of events per training."""
_SECONDS = 1.0
"""Minimum time between two points within an epoch."""


class Curves:
    """Logs the curves of a run's trainings. Raises `MissingExtra` if a tracker is not installed."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self.run = recipe.run.name
        self.folder = root / FOLDER
        self.trackers = [name if name != "auto" else "tensorboard" for name in recipe.run.trackers]
        if find_spec("tensorboard") is None and "auto" in recipe.run.trackers:
            self.trackers.remove("tensorboard")
        for name in self.trackers:
            if find_spec(name) is None:
                raise MissingExtra(f"[run] trackers: {name} is not installed; pip install {name}, or remove it")

    @contextmanager
    def log(self, title: str, step: int) -> Iterator[Curve]:
        """Open the curve of one training that starts or resumes at `step`."""
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        if not distributed.is_main():
            yield Curve([])
            return
        if step == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        trackers = [self._tracker(tracker, name, step) for tracker in self.trackers]
        for tracker in trackers:
            tracker.start()
        try:
            yield Curve(trackers)
        finally:
            for tracker in trackers:
                tracker.finish()

    def _tracker(self, tracker: str, name: str, step: int) -> Any:
        from accelerate import tracking

        if tracker == "wandb":
            return tracking.WandBTracker(self.run, name=name, dir=str(self.folder))
        if tracker == "mlflow":
            return tracking.MLflowTracker(self.run, run_name=name)
        return tracking.TensorBoardTracker(name, self.folder, purge_step=step)


class Curve:
    """Points of one training; the horizontal axis counts batches."""

    def __init__(self, trackers: list[Any]) -> None:
        self._trackers = trackers
        self._last = time.monotonic()

    def step(self, number: int, **values: float) -> None:
        """Log the values of a step, at most once a second."""
        if time.monotonic() - self._last >= _SECONDS:
            self.point(number, values)

    def point(self, number: int, values: Mapping[str, float | str]) -> None:
        """Log values unconditionally; strings become text marks."""
        self._last = time.monotonic()
        for tracker in self._trackers:
            tracker.log(dict(values), step=number)
