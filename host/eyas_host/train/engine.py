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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from eyas_host.pipeline import distributed
from eyas_host.support.errors import TrainError
from eyas_host.support.progress import meter, say
from eyas_host.train.batch_norm import whole_batch_norms
from eyas_host.train.checkpoint import Checkpoint
from eyas_host.train.depthwise import fast_depthwise_gradients
from eyas_host.train.precision import Precision, fast_gpu_math
from eyas_host.train.schedule import (
    Epoch,
    Schedule,
    best_epoch,
    epochs_without_improvement,
    plateau_factor,
    selection_value,
    step_factor,
)
from eyas_host.train.trackers import Curve, Curves

Groups = list[dict[str, Any]]
"""AdamW parameter groups; `lr_scale` multiplies the learning rate, as in timm."""
Steps = Callable[[int, int], Iterable[Tensor]]
"""`steps(epoch, first)`: the mean loss of each batch of an epoch, from batch `first` on."""

_SHOWN_METRICS = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "agreement": "agreement"}
"""Validation metric -> its label beside the progress bar."""
_LOSS_WINDOW = 100
"""Batches over which the displayed loss is averaged."""
CHECK_STEPS = {"cuda": 50}
"""Batches between two checks that loss and gradient are finite: on a GPU each check waits for all queued work."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training: its length, its batches, and where it is saved."""

    title: str
    schedule: Schedule
    images: int
    """Images in an epoch."""
    batch: int
    """Images in a batch, over all processes; the last one of an epoch may be smaller."""
    checkpoint: Path
    start: Mapping[str, float] | None = None
    """Validation metrics of the model before the training. It is then kept if no epoch is better."""
    curves: Curves | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.images // self.batch)

    def sizes(self, epoch_steps: range) -> int:
        """Images in a range of an epoch's batches."""
        return min(self.images, epoch_steps.stop * self.batch) - epoch_steps.start * self.batch

    def window(self, number: int) -> range:
        """The batches whose gradients make one step together with batch `number`."""
        first = number - number % self.schedule.accumulate
        return range(first, min(first + self.schedule.accumulate, self.steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a training does besides its steps."""

    prepare: Callable[[nn.Module], object] = nn.Module.train
    """Sets the model's training mode before each epoch."""
    stages: Callable[[Sequence[Epoch]], str] | None = None
    """Unfreezes the layers that are due before an epoch, and returns the stage's name."""
    after_step: Callable[[], None] | None = None


def fit(
    model: nn.Module,
    groups: Groups,
    plan: Plan,
    *,
    steps: Steps,
    evaluate: Callable[[nn.Module], dict[str, float]],
    hooks: Hooks | None = None,
    auxiliary: nn.Module | None = None,
) -> list[Epoch]:
    """Train `model` and restore the weights of its best epoch; resumes from an existing checkpoint.

    In several processes `steps` yields the loss of the full batch in each of them, with a gradient for the local shard
    only (`distributed.local_shard`, `distributed.all_gather`); `auxiliary`, a further module whose parameters are in
    `groups`, sees the full batch everywhere. `evaluate`, which all processes call, returns validation metrics, of which
    the schedule's `metric` selects the best epoch.

    Raises `TrainError` if a loss or a gradient is not finite.
    """
    hooks = hooks or Hooks()
    training = _Training(model, groups, plan, auxiliary)
    position, schedule, total = training.position, plan.schedule, plan.steps_per_epoch
    history, done = position.history, len(position.history) * total + len(position.losses)
    logged = plan.curves.log(plan.title, done) if plan.curves is not None else contextlib.nullcontext(Curve([]))
    with (
        meter(plan.title, schedule.epochs * total, done=done) as bar,
        logged as curve,
        fast_gpu_math(training.device),
        fast_depthwise_gradients(),
        whole_batch_norms(model),
    ):
        for epoch in range(len(history), schedule.epochs):
            stage = hooks.stages(history) if hooks.stages is not None else ""
            if _is_out_of_patience(history, stage, schedule):
                break
            hooks.prepare(model)
            training.begin_epoch(epoch, stage)
            first = len(position.losses)
            losses = iter(steps(epoch, first))
            for number in itertools.count(first):
                loss = training.forward(losses, number)
                if loss is None:
                    break
                training.backward(loss, number)
                if number == plan.window(number)[-1]:
                    training.step(number)
                    if hooks.after_step is not None:
                        hooks.after_step()
                    training.average(number)
                    training.save_if_due(number)
                    curve.step(epoch * total + number, **training.progress())
                bar.advance(_progress_text(position.losses, history))
            training.end_epoch(evaluate)
            curve.point((epoch + 1) * total - 1, _curve_points(history))
    return training.finish()


class _Training:
    """State of one training, and the parts of a step."""

    def __init__(self, model: nn.Module, groups: Groups, plan: Plan, auxiliary: nn.Module | None) -> None:
        schedule = plan.schedule
        self.model, self.plan, self.schedule = model, plan, schedule
        self.device = next(model.parameters()).device
        self.precision = Precision(schedule.amp, self.device)
        for group in groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0)
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=schedule.weight_decay, fused=self.device.type in ("cpu", "cuda")
        )
        self.parameters = [p for group in groups for p in group["params"]]
        self.ema = ModelEmaV3(model, decay=schedule.ema, use_warmup=True) if schedule.ema else None
        modules = {
            "model": model,
            "optimizer": self.optimizer,
            "auxiliary": auxiliary,
            "scaler": self.precision.scaler,
            "ema": self.ema.module if self.ema is not None else None,
        }
        self.checkpoint = Checkpoint(plan.checkpoint, modules)
        self.position = self.checkpoint.load()
        if plan.start is not None and not self.position.best_state:
            self.position.best_state = copy.deepcopy(model.state_dict())
        self.saved = time.monotonic()
        self.epoch, self.stage, self.cut, self.started = 0, "", 1.0, 0.0
        self._losses: list[Tensor] = []
        self._norms: dict[int, Tensor] = {}
        """Losses of the batches, and norms of the steps' gradients, that are not checked yet."""
        distributed.broadcast_parameters(model, auxiliary)

    @property
    def rate(self) -> float:
        """Largest learning rate of all parameter groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def progress(self) -> dict[str, float]:
        """The last loss that was checked, and the learning rate."""
        losses = self.position.losses
        return ({"loss": losses[-1]} if losses else {}) | {"rate": self.rate}

    def begin_epoch(self, epoch: int, stage: str) -> None:
        """Start or resume an epoch."""
        self.epoch, self.stage = epoch, stage
        self.cut = plateau_factor(self.schedule, self.position.history, stage)
        self.started = time.monotonic() - self.position.seconds

    def forward(self, losses: Iterator[Tensor], number: int) -> Tensor | None:
        """The loss of the next batch, None after the last."""
        sequence = np.random.SeedSequence((self.schedule.seed, self.epoch, number, distributed.rank()))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        with self.precision.autocast():
            return next(losses, None)

    def backward(self, loss: Tensor, number: int) -> None:
        """Accumulate the gradient of a batch: its share of the mean over the images of its window."""
        window = self.plan.window(number)
        if number == window[0]:
            self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss.detach())
        fraction = self.plan.sizes(range(number, number + 1)) / self.plan.sizes(window)
        self.precision.backward(loss * fraction)

    def step(self, number: int) -> None:
        """Update the weights."""
        schedule = self.schedule
        at = self.epoch * self.plan.steps_per_epoch + number
        factor = step_factor(schedule, at, schedule.epochs * self.plan.steps_per_epoch, self.cut)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0) * factor
        distributed.sum_gradients(self.model.parameters())
        self.precision.unscale(self.optimizer)
        self._norms[number] = nn.utils.clip_grad_norm_(self.parameters, schedule.clip or math.inf)
        if len(self._losses) >= CHECK_STEPS.get(self.device.type, 1):
            self.check()
        self.precision.step(self.optimizer)

    def check(self) -> None:
        """Fetch the losses and gradient norms since the last check. Raises `TrainError` if one is not finite."""
        losses, count = self.position.losses, len(self._losses)
        if not count:
            return
        first = len(losses)
        values = torch.stack([*self._losses, *self._norms.values()]).tolist()
        norms = dict(zip(self._norms, values[count:], strict=True))
        for number, loss in enumerate(values[:count], first):
            if not math.isfinite(loss):
                raise TrainError(f"{self._where(number)}: the loss is {loss}; {self._advice}")
            if not math.isfinite(norms.get(number, 0.0)) and self.precision.scaler is None:
                raise TrainError(f"{self._where(number)}: the gradient's norm is {norms[number]}; {self._advice}")
        losses += values[:count]
        self._losses, self._norms = [], {}

    def average(self, number: int) -> None:
        """Update the moving average."""
        if self.ema is not None:
            accumulate = self.schedule.accumulate
            steps = self.epoch * -(-self.plan.steps_per_epoch // accumulate) + number // accumulate
            self.ema.update(self.model, step=steps)

    def save_if_due(self, number: int) -> None:
        """Write a checkpoint inside an epoch if `save_minutes` have passed."""
        minutes = self.schedule.save_minutes
        last = number + 1 == self.plan.steps_per_epoch
        if minutes is not None and not last and time.monotonic() - self.saved >= 60 * minutes:
            self._save()

    def end_epoch(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        """Evaluate, keep the weights if they are the best so far, and write a checkpoint."""
        self.check()
        candidate = self.model if self.ema is None else self.ema.module
        candidate.eval()
        metrics = distributed.from_main(evaluate(candidate))
        position, seconds = self.position, time.monotonic() - self.started
        sizes = [self.plan.sizes(range(number, number + 1)) for number in range(len(position.losses))]
        loss = float(np.average(position.losses, weights=sizes))
        position.history.append(Epoch(self.epoch + 1, loss, seconds, metrics, self.stage, self.rate))
        if best_epoch(position.history, self.schedule.metric) == self.epoch and not self._is_start_best():
            position.best_state = copy.deepcopy(candidate.state_dict())
        position.losses, position.seconds = [], 0.0
        self._save()

    def finish(self) -> list[Epoch]:
        """Restore the best weights and return the history."""
        if self.position.best_state:
            self.model.load_state_dict(self.position.best_state)
        if self.position.history and self._is_start_best():
            say(f"  {self.plan.title}: no epoch is better on validation than the network before, which is kept")
        distributed.broadcast_parameters(self.model)
        self.model.eval()
        return self.position.history

    def _is_start_best(self) -> bool:
        return self.plan.start is not None and not is_better(
            self.position.history, self.plan.start, self.schedule.metric
        )

    def _save(self) -> None:
        self.check()
        if self.position.losses:
            self.position.seconds = time.monotonic() - self.started
        if distributed.is_main():
            self.checkpoint.save(self.position)
        self.saved = time.monotonic()

    def _where(self, number: int) -> str:
        return f"{self.plan.title}, epoch {self.epoch + 1}, step {number + 1}"

    @property
    def _advice(self) -> str:
        advice = "a lower rate or a longer warm-up usually helps"
        return advice if self.precision.amp == "no" else f"{advice}, else [run] amp = 'no'"


def is_better(history: Sequence[Epoch], start: Mapping[str, float], metric: str) -> bool:
    """Whether the best epoch is better than the model before the training."""
    if not history:
        return False
    best = history[best_epoch(history, metric)].metrics
    return selection_value(best, metric) > selection_value(start, metric)


def _is_out_of_patience(history: Sequence[Epoch], stage: str, schedule: Schedule) -> bool:
    if schedule.patience is None or not history or stage != history[-1].stage:
        return False
    without = min(epochs_without_improvement(history, schedule.metric), len(history) - schedule.patient_from)
    return without >= schedule.patience


def _curve_points(history: Sequence[Epoch]) -> dict[str, float | str]:
    """Values that an epoch adds to the curves; the first epoch of a stage has its name."""
    epoch = history[-1]
    first_of_stage = len(history) == 1 or history[-2].stage != epoch.stage
    return (
        {"loss of the epoch": epoch.loss, "rate": epoch.rate}
        | {f"validation/{name}": value for name, value in epoch.metrics.items()}
        | ({"stage": epoch.stage} if epoch.stage and first_of_stage else {})
    )


def _progress_text(losses: Sequence[float], history: Sequence[Epoch]) -> str:
    metrics: Mapping[str, float] = history[-1].metrics if history else {}
    shown = [f"loss {np.mean(losses[-_LOSS_WINDOW:]):.3f}"] if losses else []
    figures = [f"{label} {metrics[name]:.3f}" for name, label in _SHOWN_METRICS.items() if name in metrics]
    return "; ".join(shown + ([f"on validation {', '.join(figures)}"] if figures else []))
