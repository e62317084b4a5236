"""`eyas baseline`: the gain from transfer learning over the same architecture trained from scratch.

The baseline has the teacher's architecture with random weights. All its layers train, on the same split, augmentation,
image size, loss and batch size, for as many seconds as the teacher took, or for a number of epochs. It has a learning
rate of its own: one for fine-tuning is too low for random weights, so short trainings at several rates come first,
which its budget does not count. Both sides are compared by their best epoch on validation; the held-out test set is not
used.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.table import Table
from timm.optim import param_groups_weight_decay
from torch import nn

from eyas_host.data.split import Split
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.metrics import PairedLoss, paired_loss, score
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, build, move
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, Stage, StageRecord, StageResult, run_chain
from eyas_host.support.errors import StageError, TrainError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import show
from eyas_host.train.compiled import compiled
from eyas_host.train.engine import Plan, fit
from eyas_host.train.schedule import Epoch, full_batches, selection_value
from eyas_host.train.supervised import SupervisedTask

RESULT = "baseline.json"
"""Below the run's folder; see `Baseline`."""
_STAGE = "baseline"
_PLAN = "plan.json"
_TIMED_BATCHES = 8
_RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of AdamW that suit random weights; the teacher's is tried too."""
_SEARCH_EPOCHS = 4
"""A training at one of several rates takes this fraction of the baseline's epochs."""
_HEAD = "head"
"""Key of the teacher's history on the frozen backbone's cached features."""


class Side(msgspec.Struct, frozen=True):
    """One of the two trainings, evaluated on validation."""

    weights: str
    """Origin of its initial weights: hub, packaged, file, pretrained or random."""
    epochs: int
    """Passes over the training images, without those over cached features."""
    seconds: float
    """Training time, including the loading of images."""
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    """95 % bootstrap interval over units."""
    f1: float
    auc: float
    curve: tuple[tuple[float, float], ...]
    """After each epoch: seconds of training so far, balanced accuracy."""


class Baseline(msgspec.Struct, frozen=True):
    """`baseline.json`."""

    model: str
    budget: str
    """The baseline's training budget as text."""
    training_images: int
    validation_images: int
    transfer: Side
    scratch: Side
    rate: float
    """Learning rate of the baseline: the best of `rates`."""
    rates: dict[str, float | None]
    """Learning rate -> best selection metric of a short training on validation; null where it diverged."""
    lost: PairedLoss
    """Loss of balanced accuracy from scratch against transfer, on the same validation images."""
    matched_s: float | None
    """Seconds after which transfer reached the baseline's best epoch; None: never."""


class _Progress(msgspec.Struct):
    """What a resumed baseline need not measure again."""

    epochs: int
    rates: dict[str, float | None] = msgspec.field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> _Progress | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(path.read_bytes(), type=cls)
        return None

    def save(self, path: Path) -> None:
        write_bytes(path, msgspec.json.encode(self))


def baseline(context: RunContext, epochs: int | None, json: Path | None) -> None:
    """Train the baseline if necessary, print both sides, and write the result to `json` too.

    `epochs` replaces the teacher's seconds as the budget. Raises `StageError` if the run has no teacher.
    """
    if context.recipe.student.checkpoint:
        raise StageError("[student] checkpoint: this run trains no teacher, so there is nothing to compare with")
    stage = Stage(
        _STAGE,
        ("teacher", "augment", "image", "run"),
        ("split", "teach"),
        lambda context: _train(context, epochs),
        __name__,
        lambda context: {"the budget": str(epochs or _teacher_seconds(context))},
        places=(RESULT,),
    )
    run_chain([stage], context)
    path = context.root / RESULT
    result = load_baseline(context.root)
    if result is None:
        raise StageError(f"{path}: cannot be read; remove {context.folder(_STAGE)} and run again")
    if json is not None:
        write_bytes(json, path.read_bytes())
    show(comparison_table(result))


def _teacher_seconds(context: RunContext) -> float:
    taught = context.record("teach")
    return 0.0 if taught is None else taught.seconds


def load_baseline(root: Path) -> Baseline | None:
    """`baseline.json` of the run at `root`; None if missing or unreadable."""
    try:
        return msgspec.json.decode((root / RESULT).read_bytes(), type=Baseline)
    except (OSError, msgspec.DecodeError):
        return None


def comparison_table(result: Baseline) -> Table:
    """One row per side."""
    title = f"{result.model}: transfer against scratch, {result.validation_images} validation images"
    table = Table(title=title, title_justify="left")
    table.add_column("training")
    for column in ("weights", "epochs", "seconds", "balanced accuracy", "95 % interval", "F1", "AUC"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, side in (("transfer", result.transfer), ("from scratch", result.scratch)):
        low, high = side.balanced_accuracy_ci
        figures = (f"{side.balanced_accuracy:.3f}", f"{low:.3f} to {high:.3f}", f"{side.f1:.3f}", f"{side.auc:.3f}")
        table.add_row(name, side.weights, str(side.epochs), f"{side.seconds:.0f}", *figures)
    table.caption = f"budget of the baseline: {result.budget}, at rate {result.rate:g}; both by their best epoch"
    table.caption_justify = "left"
    return table


def _train(context: RunContext, epochs: int | None) -> StageResult:
    recipe, folder = context.recipe, context.folder(_STAGE)
    taught = context.record("teach")
    if taught is None:
        raise StageError(f"{context.root}: the teacher is not trained")
    torch.set_num_threads(training_threads(recipe))
    split = Split.load(context.root, recipe.image.preprocessing())
    started = time.monotonic()
    task = SupervisedTask(recipe, split)
    torch.manual_seed(recipe.run.seed)
    model, origin = build(recipe.teacher.model, len(split.labels), "random")
    model = move(model, task.device)
    setup_s = time.monotonic() - started
    progress = _Progress.load(folder / _PLAN)
    if progress is None:
        progress = _Progress(epochs or _planned_epochs(task, model, taught.seconds - setup_s))
    rate = find_rate(task, model, progress, folder)
    history = train_scratch(model, task, progress.epochs, folder / "scratch.ckpt", rate)
    (folder / "scratch.ckpt").unlink()
    teacher = move(checkpoints.load_teacher(context, len(split.labels)), task.device)
    targets, units = split.validation.targets, split.validation.units
    before, after = task.probabilities(teacher), task.probabilities(model)
    scratch_s = setup_s + sum(epoch.seconds for epoch in history)
    scratch = _side(origin, history, len(history), scratch_s, after, targets, units)
    transfer = _side(taught.facts["weights"], *_teacher_epochs(taught), taught.seconds, before, targets, units)
    result = Baseline(
        model=recipe.teacher.model,
        budget=f"{epochs} epochs" if epochs else f"the teacher's {taught.seconds:.0f} s",
        training_images=len(split.train),
        validation_images=len(targets),
        transfer=transfer,
        scratch=scratch,
        rate=rate,
        rates=progress.rates,
        lost=paired_loss(before, after, targets, units=units, seed=recipe.run.seed),
        matched_s=next((s for s, reached in transfer.curve if reached >= scratch.balanced_accuracy), None),
    )
    write_bytes(context.root / RESULT, msgspec.json.format(msgspec.json.encode(result), indent=1))
    gained = 100 * result.lost.loss
    low, high = (100 * bound for bound in result.lost.interval)
    return StageResult(
        f"from scratch {scratch.balanced_accuracy:.3f} in {scratch.seconds:.0f} s at rate {rate:g}, transfer "
        f"{transfer.balanced_accuracy:.3f} in {transfer.seconds:.0f} s: {gained:+.1f} points by transfer at this "
        f"budget (95 % interval {low:+.1f} to {high:+.1f})"
    )


def find_rate(task: SupervisedTask, untrained: PixelClassifier, progress: _Progress, folder: Path) -> float:
    """The learning rate at which a short training of a copy of `untrained` is best on validation.

    Adds to `progress`, whose file in `folder` is written after each rate. Raises `TrainError` if every rate diverges.
    """
    metric, epochs = task.recipe.run.selection_metric, max(1, progress.epochs // _SEARCH_EPOCHS)
    progress.save(folder / _PLAN)
    for rate in sorted({*_RATES, task.recipe.teacher.rate}):
        if f"{rate:g}" in progress.rates:
            continue
        checkpoint, best = folder / f"rate-{rate:g}.ckpt", None
        with contextlib.suppress(TrainError):  # the loss is no number
            history = train_scratch(copy.deepcopy(untrained), task, epochs, checkpoint, rate)
            best = max(selection_value(epoch.metrics, metric) for epoch in history)
        checkpoint.unlink(missing_ok=True)
        progress.rates[f"{rate:g}"] = best
        progress.save(folder / _PLAN)
    reached = {rate: best for rate, best in progress.rates.items() if best is not None}
    if not reached:
        raise TrainError(
            f"from scratch: the loss diverges at every rate ({', '.join(progress.rates)}); lower [teacher] rate"
        )
    return float(max(reached, key=lambda rate: reached[rate]))


def train_scratch(
    model: PixelClassifier, task: SupervisedTask, epochs: int, checkpoint: Path, rate: float
) -> list[Epoch]:
    """Train all layers of an untrained network at one rate; BatchNorm learns its statistics."""
    plan = Plan(
        title=f"baseline, from scratch, rate {rate:g}",
        schedule=msgspec.structs.replace(task.schedule(epochs), rate=rate),
        images=full_batches(len(task.targets), task.recipe.teacher.batch),
        batch=task.recipe.teacher.batch,
        checkpoint=checkpoint,
    )
    forward = compiled(model, task.recipe.run.compile)
    return fit(
        model,
        param_groups_weight_decay(model, task.recipe.teacher.weight_decay),
        plan,
        steps=lambda epoch, first: task.steps(forward, epoch, first, plan.steps_per_epoch - first),
        evaluate=task.evaluate,
    )


def _planned_epochs(task: SupervisedTask, model: nn.Module, seconds: float) -> int:
    """Number of epochs that fit into `seconds`, timed on some batches of a copy."""
    batch = task.recipe.teacher.batch
    steps = full_batches(len(task.targets), batch) // batch or 1
    timed = min(steps, _TIMED_BATCHES)
    trial = copy.deepcopy(model).train()
    started = time.monotonic()
    for loss in task.steps(trial, 0, 0, timed):
        loss.backward()
        float(loss.detach())
    training_s = (time.monotonic() - started) * steps / timed
    started = time.monotonic()
    task.evaluate(trial)
    return max(1, math.floor(seconds / (training_s + time.monotonic() - started)))


def _teacher_epochs(taught: StageRecord) -> tuple[list[Epoch], int]:
    """The teacher's epochs in order, and how many of them read images."""
    histories: dict[str, list[Any]] = taught.facts["histories"]
    epochs = [msgspec.convert(epoch, Epoch) for history in histories.values() for epoch in history]
    return epochs, len(epochs) - len(histories.get(_HEAD, ()))


def _side(
    weights: str,
    history: list[Epoch],
    passes: int,
    seconds: float,
    probabilities: Floats,
    targets: Ints,
    units: Ints,
) -> Side:
    scores = score(probabilities, targets, units=units)
    spent = seconds - sum(epoch.seconds for epoch in history)
    curve = []
    for epoch in history:
        spent += epoch.seconds
        curve.append((round(spent, 3), epoch.metrics["balanced_accuracy"]))
    return Side(
        weights=weights,
        epochs=passes,
        seconds=seconds,
        balanced_accuracy=scores.balanced_accuracy,
        balanced_accuracy_ci=scores.balanced_accuracy_ci,
        f1=scores.f1,
        auc=scores.auc,
        curve=tuple(curve),
    )
