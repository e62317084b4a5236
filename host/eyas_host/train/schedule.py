"""How long and how fast a training runs, and which epoch of it was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eyas_host.pipeline.distributed import Amp
from eyas_host.support.errors import TrainError


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how fast to train."""

    epochs: int
    rate: float
    weight_decay: float = 0.02
    warmup: float = 0.1
    """Part of the steps in which the rate rises from zero."""
    shape: Literal["cosine", "plateau"] = "cosine"
    """How it falls behind that: half a cosine to zero, or to a tenth at each plateau."""
    plateau_epochs: int = 2
    """Epochs without a better validation that make a plateau."""
    patience: int | None = None
    """Stop after this many epochs without a better validation."""
    metric: str = "combined"
    """The validation figure that is meant by better."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is evaluated and kept (0: none)."""
    clip: float = 1.0
    """Largest norm of the gradient (0: not clipped)."""
    accumulate: int = 1
    """Batches a step."""
    amp: Amp = "no"
    """Mixed precision of forward and backward passes; the weights stay float32."""
    save_minutes: float | None = None
    """Save this often inside an epoch too (0: after every step)."""
    seed: int = 0


class Epoch(msgspec.Struct, frozen=True):
    """What one epoch gave."""

    epoch: int
    loss: float
    seconds: float
    metrics: dict[str, float]
    stage: str = ""
    """What was trained, where that changes in the course of a training."""
    rate: float = 0.0
    """Of the fastest parameters, at the epoch's last step."""


def rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first part of the steps, then half a cosine to zero; 0..1."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def step_factor(schedule: Schedule, step: int, total: int, cut: float) -> float:
    """What the rate is multiplied by at one of `total` steps; `cut` is `plateau_factor` of the epochs before."""
    if schedule.shape == "cosine":
        return rate_factor(step, total, schedule.warmup)
    return min(1.0, (step + 1) / max(1, round(total * schedule.warmup))) * cut


def plateau_factor(schedule: Schedule, history: Sequence[Epoch], stage: str) -> float:
    """What torch's `ReduceLROnPlateau` makes of 1 over the epochs so far; `stage` is the next epoch's.

    A new stage is a new chance: the epochs without a better validation are counted from its beginning.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    falling = ReduceLROnPlateau(optimizer, "max", patience=schedule.plateau_epochs - 1, threshold=0.0, eps=0.0)
    for epoch, following in zip(history, [*(e.stage for e in history), stage][1:], strict=True):
        if epoch.stage != following:
            falling.num_bad_epochs = -1  # 0 behind this step, whatever the epoch gave
        falling.step(judged(epoch.metrics, schedule.metric))
    return float(optimizer.param_groups[0]["lr"])


def judged(figures: Mapping[str, float], metric: str) -> float:
    """The figure by which an epoch is compared, the larger the better. Raises `TrainError` if it is not a number."""
    value = figures[metric]
    if not math.isfinite(value):
        raise TrainError(
            f"[run] metric = {metric!r} is {value} on validation: a class may be missing there; take another"
        )
    return -value if metric == "loss" else value


def best_epoch(history: Sequence[Epoch], metric: str) -> int:
    """The place of the first epoch that no other is better than."""
    values = [judged(epoch.metrics, metric) for epoch in history]
    return values.index(max(values))


def epochs_without_better(history: Sequence[Epoch], metric: str) -> int:
    """Epochs at the end of the history that were not better than all before; of its last stage alone."""
    if not history:
        return 0
    changes = [place for place, (one, other) in enumerate(pairwise(history)) if one.stage != other.stage]
    return len(history) - 1 - max(best_epoch(history, metric), changes[-1] if changes else -1)
