"""Training schedules, and selection of the best epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eyas_host.support.errors import TrainError
from eyas_host.train.precision import Amp


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Length, learning rate and stopping rule of a training."""

    epochs: int
    rate: float
    weight_decay: float = 0.02
    warmup: float = 0.1
    """Fraction of the steps over which the rate rises from zero."""
    shape: Literal["cosine", "plateau"] = "cosine"
    """Decay after the warm-up: half a cosine to zero, or a tenth at each plateau."""
    plateau_epochs: int = 2
    """Epochs without improvement that make a plateau."""
    patience: int | None = None
    """Stop after this many epochs without improvement."""
    patient_from: int = 0
    """Epochs before this one do not count for `patience`."""
    metric: str = "combined"
    """Validation metric that selects the best epoch."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is evaluated and kept (0: no averaging)."""
    clip: float = 1.0
    """Maximum gradient norm (0: no clipping)."""
    accumulate: int = 1
    """Batches per optimizer step, which is that of one large batch."""
    amp: Amp = "no"
    """Mixed precision of forward and backward passes; the weights stay float32."""
    save_minutes: float | None = None
    """Minutes between checkpoints inside an epoch (0: after every step; None: only at its end)."""
    seed: int = 0


class Epoch(msgspec.Struct, frozen=True):
    """Results of one epoch."""

    epoch: int
    loss: float
    seconds: float
    metrics: dict[str, float]
    stage: str = ""
    """Name of the layers that were trained, where that changes during a training."""
    rate: float = 0.0
    """Largest learning rate of all parameter groups at the last step."""


def full_batches(images: int, batch: int) -> int:
    """Images of an epoch without its incomplete last batch, which BatchNorm's statistics cannot use."""
    return images - images % batch or images


def rate_factor(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor 0..1: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def step_factor(schedule: Schedule, step: int, total: int, cut: float) -> float:
    """Learning-rate factor at one of `total` steps; `cut` is `plateau_factor` of the epochs before."""
    if schedule.shape == "cosine":
        return rate_factor(step, total, schedule.warmup)
    return min(1.0, (step + 1) / max(1, round(total * schedule.warmup))) * cut


def plateau_factor(schedule: Schedule, history: Sequence[Epoch], stage: str) -> float:
    """Factor that torch's `ReduceLROnPlateau` has reached after the epochs so far; `stage` is the next epoch's.

    Epochs without improvement are counted from the beginning of a stage.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, "max", patience=schedule.plateau_epochs - 1, threshold=0.0, eps=0.0)
    for epoch, following in zip(history, [*(e.stage for e in history), stage][1:], strict=True):
        if epoch.stage != following:
            scheduler.num_bad_epochs = -1  # 0 after this step, whatever the epoch's value
        scheduler.step(selection_value(epoch.metrics, schedule.metric))
    return float(optimizer.param_groups[0]["lr"])


def selection_value(metrics: Mapping[str, float], metric: str) -> float:
    """The selection metric, with its sign flipped where lower is better. Raises `TrainError` if it is not finite."""
    value = metrics[metric]
    if not math.isfinite(value):
        raise TrainError(
            f"[run] selection_metric = {metric!r} is {value} on validation: a class may be missing there; take another"
        )
    return -value if metric == "loss" else value


def best_epoch(history: Sequence[Epoch], metric: str) -> int:
    """Index of the best epoch, the first one on ties."""
    values = [selection_value(epoch.metrics, metric) for epoch in history]
    return values.index(max(values))


def epochs_without_improvement(history: Sequence[Epoch], metric: str) -> int:
    """Number of epochs of the last stage since the best epoch."""
    if not history:
        return 0
    changes = [index for index, (one, other) in enumerate(pairwise(history)) if one.stage != other.stage]
    return len(history) - 1 - max(best_epoch(history, metric), changes[-1] if changes else -1)
