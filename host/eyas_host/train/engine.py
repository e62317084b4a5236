"""The training loop: epochs with a schedule, the best weights kept, and checkpoints to go on from.

Everything random in a step is seeded by (seed, epoch, step, process), so a run that was killed and resumed ends with
the same numbers as one that was not. Several processes (`eyas_host.pipeline.distributed`) make each step together.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.metrics import auc, softmax
from eyas_host.pipeline import distributed
from eyas_host.support.errors import TrainError
from eyas_host.support.progress import meter
from eyas_host.train.checkpoint import Snapshot
from eyas_host.train.schedule import (
    Epoch,
    Schedule,
    best_epoch,
    epochs_without_better,
    plateau_factor,
    step_factor,
)
from eyas_host.train.trackers import Curve, Curves

Groups = list[dict[str, Any]]
"""AdamW parameter groups; `lr_scale` multiplies the rate (timm's name for it)."""

_SHOWN = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "agreement": "agreement"}
"""Figures of an epoch that stand beside the bar, and what they are called there."""
_RECENT = 100
"""Batches over which the shown loss is a mean."""


def fit(
    model: nn.Module,
    groups: Groups,
    *,
    steps: Callable[..., Iterable[Tensor]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    schedule: Schedule,
    steps_an_epoch: int,
    checkpoint: Path,
    title: str,
    prepare: Callable[[nn.Module], object] = nn.Module.train,
    stages: Callable[[Sequence[Epoch]], str] | None = None,
    after_step: Callable[[], None] | None = None,
    beside: nn.Module | None = None,
    curves: Curves | None = None,
) -> list[Epoch]:
    """Train `model` and leave the best weights in it.

    `steps(epoch)` yields the loss of each batch, `steps(epoch, first)` those from batch `first` on (asked for where the
    schedule has `save_minutes`); `evaluate` returns figures of which the schedule's metric chooses the best epoch;
    before each epoch `prepare` puts the model into its training mode, and `stages` opens the layers that are due and
    names the stage. What `groups` holds besides the model is `beside` it, and goes into the checkpoint too. With a
    checkpoint on disk, training goes on behind its last step.

    In several processes `steps` yields in each of them the loss of the whole batch, of which the rows of its own share
    have a gradient (`processes.share`, `processes.whole`); what is `beside` the model sees the whole batch everywhere.
    Raises `TrainError` when a loss or a gradient is not a number.
    """
    training = _Training(model, groups, schedule, steps_an_epoch, title, checkpoint, beside)
    position = training.position
    history, done = position.history, len(position.history) * steps_an_epoch + len(position.losses)
    drawn = curves.drawn(title, done) if curves is not None else contextlib.nullcontext(Curve([]))
    with meter(title, schedule.epochs * steps_an_epoch, done=done) as bar, drawn as curve:
        for epoch in range(len(history), schedule.epochs):
            stage = stages(history) if stages is not None else ""
            if _out_of_patience(history, stage, schedule):
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
                    training.save_now_and_then(number)
                    curve.step(epoch * steps_an_epoch + number, loss=position.losses[-1], rate=training.rate)
                bar.advance(f"loss {np.mean(position.losses[-_RECENT:]):.3f}  " + _words(history))
            kept = training.kept
            kept.eval()
            figures = distributed.from_main(evaluate(kept) if distributed.is_main() else {})
            seconds = before + time.monotonic() - started
            history.append(Epoch(epoch + 1, float(np.mean(position.losses)), seconds, figures, stage, training.rate))
            training.end_epoch()
            curve.point((epoch + 1) * steps_an_epoch - 1, _points(history))
    return training.finish()


class _Training:
    """What one training consists of, and the parts of a step."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        schedule: Schedule,
        steps_an_epoch: int,
        title: str,
        checkpoint: Path,
        beside: nn.Module | None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.steps_an_epoch = steps_an_epoch
        self.title = title
        self.plumbing = distributed.accelerator(schedule.amp, next(model.parameters()).device)
        for group in groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0)
        adam = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
        self.optimizer = self.plumbing.prepare_optimizer(adam, device_placement=False)
        self.parameters = [p for group in groups for p in group["params"]]
        self.ema = ModelEmaV3(model, decay=schedule.ema, use_warmup=True) if schedule.ema else None
        parts = {"model": model, "optimizer": adam, "beside": beside, "scaler": self.plumbing.scaler}
        self.snapshot = Snapshot(checkpoint, parts | {"ema": self.ema.module if self.ema is not None else None})
        self.position = self.snapshot.load()
        self.saved = time.monotonic()
        distributed.same_as_main(model, beside)

    @property
    def kept(self) -> nn.Module:
        """The network that is judged and kept."""
        return self.model if self.ema is None else self.ema.module

    @property
    def rate(self) -> float:
        """Of the fastest parameters."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def forward(self, losses: Iterator[Tensor], epoch: int, number: int) -> Tensor | None:
        """The loss of the next batch."""
        sequence = np.random.SeedSequence((self.schedule.seed, epoch, number, distributed.rank()))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        with self.plumbing.autocast():
            return next(losses, None)

    def backward(self, loss: Tensor, epoch: int, number: int) -> None:
        """Add the gradient of a batch to those of its step."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainError(f"{self._where(epoch, number)}: the loss is {value}; {self._mend}")
        self.position.losses.append(value)
        together, begun = self.schedule.accumulate, number % self.schedule.accumulate
        if not begun:
            self.optimizer.zero_grad(set_to_none=True)
        self.plumbing.backward(loss / min(together, self.steps_an_epoch - (number - begun)))

    def is_due(self, number: int) -> bool:
        """Whether a step follows this batch."""
        return (number + 1) % self.schedule.accumulate == 0 or number + 1 == self.steps_an_epoch

    def step(self, epoch: int, number: int, cut: float) -> None:
        """Change the weights."""
        schedule = self.schedule
        at, total = epoch * self.steps_an_epoch + number, schedule.epochs * self.steps_an_epoch
        factor = step_factor(schedule, at, total, cut)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate * group.get("lr_scale", 1.0) * factor
        distributed.sum_gradients(self.model.parameters())
        norm = float(self.plumbing.clip_grad_norm_(self.parameters, schedule.clip or math.inf))
        if not math.isfinite(norm) and self.plumbing.scaler is None:
            raise TrainError(f"{self._where(epoch, number)}: the gradient's norm is {norm}; {self._mend}")
        self.optimizer.step()

    def average(self, epoch: int, number: int) -> None:
        """Let the moving average follow."""
        if self.ema is not None:
            self.ema.update(self.model, step=epoch * self.steps_an_epoch + number)

    def save_now_and_then(self, number: int) -> None:
        """Save inside an epoch when it is time."""
        minutes = self.schedule.save_minutes
        if minutes is None or number + 1 >= self.steps_an_epoch or time.monotonic() - self.saved < 60 * minutes:
            return
        self._save()

    def end_epoch(self) -> None:
        """Keep the weights if no epoch was better, and save."""
        position = self.position
        if best_epoch(position.history, self.schedule.metric) == len(position.history) - 1:
            position.best_state = copy.deepcopy(self.kept.state_dict())
        position.losses, position.seconds = [], 0.0
        self._save()

    def finish(self) -> list[Epoch]:
        """Put the best weights into the model; returns the history."""
        if self.position.best_state:
            self.model.load_state_dict(self.position.best_state)
        distributed.same_as_main(self.model)
        self.model.eval()
        return self.position.history

    def _save(self) -> None:
        if distributed.is_main():
            self.snapshot.save(self.position)
        self.saved = time.monotonic()

    def _where(self, epoch: int, number: int) -> str:
        return f"{self.title}, epoch {epoch + 1}, step {number + 1}"

    @property
    def _mend(self) -> str:
        usual = "a lower rate or a longer warm-up usually helps"
        return usual if self.schedule.amp == "no" else f"{usual}, else [run] amp = 'no'"


def _out_of_patience(history: Sequence[Epoch], stage: str, schedule: Schedule) -> bool:
    if schedule.patience is None or not history or stage != history[-1].stage:
        return False
    return epochs_without_better(history, schedule.metric) >= schedule.patience


def _points(history: Sequence[Epoch]) -> dict[str, float | str]:
    """What an epoch adds to the curves; a new stage is marked."""
    epoch = history[-1]
    begins = len(history) == 1 or history[-2].stage != epoch.stage
    return (
        {"loss of the epoch": epoch.loss, "rate": epoch.rate}
        | {f"validation/{name}": value for name, value in epoch.metrics.items()}
        | ({"stage": epoch.stage} if epoch.stage and begins else {})
    )


def _words(history: Sequence[Epoch]) -> str:
    if not history:
        return ""
    figures: Mapping[str, float] = history[-1].metrics
    return "  ".join(f"{word} {figures[name]:.3f}" for name, word in _SHOWN.items() if name in figures)


def validation_figures(logits: Floats, targets: Ints) -> dict[str, float]:
    """What an epoch may be judged by; `combined`: balanced accuracy, with the AUC deciding between near-equals."""
    p = softmax(logits)
    answers = p.argmax(axis=1)
    balanced = float(np.mean([(answers[targets == c] == c).mean() for c in np.unique(targets)]))
    area = auc(p, targets)
    loss = float(-np.log(np.maximum(p[np.arange(len(targets)), targets], 1e-12)).mean())
    return {
        "combined": balanced + (0.5 * area if math.isfinite(area) else 0.0),
        "balanced_accuracy": balanced,
        "accuracy": float((answers == targets).mean()),
        "f1": float(f1_score(targets, answers, average="macro", zero_division=0)),
        "auc": area,
        "loss": loss,
    }


def end_with_parent(seconds: float = 2.0) -> None:
    """Make this child process end soon after its parent did, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        while parent.is_alive():
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
