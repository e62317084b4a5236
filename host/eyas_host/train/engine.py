"""The training loop: scheduled epochs, selection of the best weights, and resumable checkpoints.

All randomness of a step is seeded by (seed, epoch, step, process), so that an interrupted and resumed training ends
with the same numbers as an uninterrupted one. Several processes (`eyas_host.pipeline.distributed`) share each step.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from eyas_host.pipeline import distributed
from eyas_host.support.errors import TrainError
from eyas_host.support.progress import meter
from eyas_host.train.checkpoint import Checkpoint
from eyas_host.train.schedule import (
    Epoch,
    Schedule,
    best_epoch,
    epochs_without_improvement,
    plateau_factor,
    step_factor,
)
from eyas_host.train.trackers import Curve, Curves

Groups = list[dict[str, Any]]
"""AdamW parameter groups; `lr_scale` multiplies the learning rate, as in timm."""

_SHOWN_METRICS = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "agreement": "agreement"}
"""Validation metric -> its label beside the progress bar."""
_LOSS_WINDOW = 100
"""Batches over which the displayed loss is averaged."""


def fit(
    model: nn.Module,
    groups: Groups,
    *,
    steps: Callable[..., Iterable[Tensor]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    schedule: Schedule,
    steps_per_epoch: int,
    checkpoint: Path,
    title: str,
    prepare: Callable[[nn.Module], object] = nn.Module.train,
    stages: Callable[[Sequence[Epoch]], str] | None = None,
    after_step: Callable[[], None] | None = None,
    auxiliary: nn.Module | None = None,
    curves: Curves | None = None,
) -> list[Epoch]:
    """Train `model` and restore the weights of its best epoch; resumes from an existing checkpoint.

    In several processes `steps` yields the loss of the full batch in each of them, with a gradient for the local shard
    only (`distributed.local_shard`, `distributed.all_gather`); `auxiliary` sees the full batch everywhere.

    `steps(epoch)` yields the loss of each batch; `steps(epoch, first)` starts at batch `first`, and is only called if
    the schedule has `save_minutes`. `evaluate` returns validation metrics, of which the schedule's `metric` selects the
    best epoch. Before each epoch `prepare` sets the model's training mode, and `stages` unfreezes the layers that are
    due and returns the stage's name. `auxiliary` is a further module whose parameters are in `groups`.

    Raises `TrainError` if a loss or a gradient is not finite.

    """
    training = _Training(model, groups, _Plan(title, schedule, steps_per_epoch, checkpoint), auxiliary)
    position = training.position
    history, done = position.history, len(position.history) * steps_per_epoch + len(position.losses)
    logged = curves.log(title, done) if curves is not None else contextlib.nullcontext(Curve([]))
    with meter(title, schedule.epochs * steps_per_epoch, done=done) as bar, logged as curve:
        for epoch in range(len(history), schedule.epochs):
            stage = stages(history) if stages is not None else ""
            if _is_out_of_patience(history, stage, schedule):
                break
            prepare(model)
            first, started, before = len(position.losses), time.monotonic(), position.seconds
            cut = plateau_factor(schedule, history, stage)
            losses = iter(steps(epoch, first) if first else steps(epoch))
            for number in itertools.count(first):
                loss = training.forward(losses, epoch, number)
                if loss is None:
                    break
                training.backward(loss, epoch, number)
                if training.is_due(number):
                    training.step(epoch, number, cut)
                    if after_step is not None:
                        after_step()
                    training.average(epoch, number)
                    position.seconds = before + time.monotonic() - started
                    training.save_if_due(number)
                    curve.step(epoch * steps_per_epoch + number, loss=position.losses[-1], rate=training.rate)
                bar.advance(f"loss {np.mean(position.losses[-_LOSS_WINDOW:]):.3f}  " + _progress_text(history))
            candidate = training.candidate
            candidate.eval()
            metrics = distributed.from_main(evaluate(candidate) if distributed.is_main() else {})
            seconds = before + time.monotonic() - started
            history.append(Epoch(epoch + 1, float(np.mean(position.losses)), seconds, metrics, stage, training.rate))
            training.end_epoch()
            curve.point((epoch + 1) * steps_per_epoch - 1, _curve_points(history))
    return training.finish()


class _Plan(NamedTuple):
    """What one training does, and where it is saved."""

    title: str
    schedule: Schedule
    steps_per_epoch: int
    checkpoint: Path


class _Training:
    """State of one training, and the parts of a step."""

    def __init__(self, model: nn.Module, groups: Groups, plan: _Plan, auxiliary: nn.Module | None) -> None:
        schedule = plan.schedule
        self.model = model
        self.schedule = schedule
        self.steps_per_epoch = plan.steps_per_epoch
        self.title = plan.title
        self.accelerator = distributed.accelerator(schedule.amp, next(model.parameters()).device)
        for group in groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0)
        adam = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
        self.optimizer = self.accelerator.prepare_optimizer(adam, device_placement=False)
        self.parameters = [p for group in groups for p in group["params"]]
        self.ema = ModelEmaV3(model, decay=schedule.ema, use_warmup=True) if schedule.ema else None
        modules = {"model": model, "optimizer": adam, "auxiliary": auxiliary, "scaler": self.accelerator.scaler}
        self.checkpoint = Checkpoint(
            plan.checkpoint, modules | {"ema": self.ema.module if self.ema is not None else None}
        )
        self.position = self.checkpoint.load()
        self.saved = time.monotonic()
        distributed.broadcast_parameters(model, auxiliary)

    @property
    def candidate(self) -> nn.Module:
        """The network that is evaluated: the moving average if there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    @property
    def rate(self) -> float:
        """Largest learning rate of all parameter groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def forward(self, losses: Iterator[Tensor], epoch: int, number: int) -> Tensor | None:
        """The loss of the next batch, None after the last."""
        sequence = np.random.SeedSequence((self.schedule.seed, epoch, number, distributed.rank()))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        with self.accelerator.autocast():
            return next(losses, None)

    def backward(self, loss: Tensor, epoch: int, number: int) -> None:
        """Accumulate the gradient of a batch."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainError(f"{self._where(epoch, number)}: the loss is {value}; {self._advice}")
        self.position.losses.append(value)
        accumulate, position = self.schedule.accumulate, number % self.schedule.accumulate
        if not position:
            self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss / min(accumulate, self.steps_per_epoch - (number - position)))

    def is_due(self, number: int) -> bool:
        """Whether the optimizer steps after this batch."""
        return (number + 1) % self.schedule.accumulate == 0 or number + 1 == self.steps_per_epoch

    def step(self, epoch: int, number: int, cut: float) -> None:
        """Update the weights."""
        schedule = self.schedule
        at, total = epoch * self.steps_per_epoch + number, schedule.epochs * self.steps_per_epoch
        factor = step_factor(schedule, at, total, cut)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0) * factor
        distributed.sum_gradients(self.model.parameters())
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, schedule.clip or math.inf))
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise TrainError(f"{self._where(epoch, number)}: the gradient's norm is {norm}; {self._advice}")
        self.optimizer.step()

    def average(self, epoch: int, number: int) -> None:
        """Update the moving average."""
        if self.ema is not None:
            self.ema.update(self.model, step=epoch * self.steps_per_epoch + number)

    def save_if_due(self, number: int) -> None:
        """Write a checkpoint inside an epoch if `save_minutes` have passed."""
        minutes = self.schedule.save_minutes
        if minutes is None or number + 1 >= self.steps_per_epoch or time.monotonic() - self.saved < 60 * minutes:
            return
        self._save()

    def end_epoch(self) -> None:
        """Keep the weights if this epoch is the best so far, and write a checkpoint."""
        position = self.position
        if best_epoch(position.history, self.schedule.metric) == len(position.history) - 1:
            position.best_state = copy.deepcopy(self.candidate.state_dict())
        position.losses, position.seconds = [], 0.0
        self._save()

    def finish(self) -> list[Epoch]:
        """Restore the best weights and return the history."""
        if self.position.best_state:
            self.model.load_state_dict(self.position.best_state)
        distributed.broadcast_parameters(self.model)
        self.model.eval()
        return self.position.history

    def _save(self) -> None:
        if distributed.is_main():
            self.checkpoint.save(self.position)
        self.saved = time.monotonic()

    def _where(self, epoch: int, number: int) -> str:
        return f"{self.title}, epoch {epoch + 1}, step {number + 1}"

    @property
    def _advice(self) -> str:
        advice = "a lower rate or a longer warm-up usually helps"
        return advice if self.schedule.amp == "no" else f"{advice}, else [run] amp = 'no'"


def _is_out_of_patience(history: Sequence[Epoch], stage: str, schedule: Schedule) -> bool:
    if schedule.patience is None or not history or stage != history[-1].stage:
        return False
    return epochs_without_improvement(history, schedule.metric) >= schedule.patience


def _curve_points(history: Sequence[Epoch]) -> dict[str, float | str]:
    """Values that an epoch adds to the curves; the first epoch of a stage has its name."""
    epoch = history[-1]
    first_of_stage = len(history) == 1 or history[-2].stage != epoch.stage
    return (
        {"loss of the epoch": epoch.loss, "rate": epoch.rate}
        | {f"validation/{name}": value for name, value in epoch.metrics.items()}
        | ({"stage": epoch.stage} if epoch.stage and first_of_stage else {})
    )


def _progress_text(history: Sequence[Epoch]) -> str:
    if not history:
        return ""
    metrics: Mapping[str, float] = history[-1].metrics
    return "  ".join(f"{label} {metrics[name]:.3f}" for name, label in _SHOWN_METRICS.items() if name in metrics)
