"""A toy training that takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.train.engine import Hooks, Plan, Steps, fit
from eyas_host.train.schedule import Epoch, Schedule


class Toy:
    """A small network with all kinds of state: BatchNorm, dropout, two parameter groups."""

    def __init__(self, checkpoint: Path, **schedule: object) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(48, 4)).astype(np.float32))
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0.5).long()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
        self.checkpoint = checkpoint
        self.schedule = Schedule(**({"epochs": 5, "rate": 0.05, "seed": 3} | schedule))  # type: ignore[arg-type]
        self.stop_at: tuple[int, int] | None = None
        self.made: list[tuple[int, int]] = []
        """Epoch and number of each batch."""

    def steps(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        order = np.random.default_rng((9, epoch)).permutation(48)
        for number in range(first, 4):
            if (epoch, number) == self.stop_at:
                raise KeyboardInterrupt
            self.made.append((epoch, number))
            rows = torch.from_numpy(order[12 * number : 12 * number + 12])
            yield nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return validation_metrics(model(self.x).numpy(), self.y.numpy())

    def fit(self, steps: Steps | None = None, **options: object) -> list[Epoch]:
        groups = [
            {"params": list(self.model[0].parameters()), "lr_scale": 0.5},
            {"params": [p for layer in self.model[1:] for p in layer.parameters()]},
        ]
        hooks = Hooks(**{name: options.pop(name) for name in ("after_step", "stages") if name in options})  # type: ignore[arg-type]
        evaluate: Any = options.pop("evaluate", self.evaluate)
        plan = {"title": "toy", "schedule": self.schedule, "images": 48, "batch": 12, "checkpoint": self.checkpoint}
        return fit(
            self.model,
            groups,
            Plan(**plan | options),  # type: ignore[arg-type]
            steps=steps or self.steps,
            evaluate=evaluate,
            hooks=hooks,
        )
