"""The finals: the best trials' settings, trained in full and compared on validation, never on the test set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.evaluation.metrics import score, softmax
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe import Recipe
from eyas_host.search.space import Value
from eyas_host.support.files import exclusive_lock, write_bytes
from eyas_host.train.schedule import Epoch, best_epoch, selection_value
from eyas_host.train.student import train_student
from eyas_host.train.teacher import BLOCKS, HEAD, best_stage, train_teacher
from eyas_host.train.view_cache import ViewCache

FullTraining = Callable[[Recipe, Path], tuple[PixelClassifier, list[Epoch], Epoch]]
"""Trains a recipe in full, with checkpoints in the folder; returns the model, its history and the epoch it is from."""


class Final(msgspec.Struct, frozen=True):
    """A trial's settings, trained in full."""

    trial: int
    settings: dict[str, Value]
    epochs: int
    """Trained epochs (of the teacher's stage 2, if there was one); the best one is kept."""
    seconds: float
    value: float
    """Selection metric on validation, higher is better."""
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    """95 % bootstrap interval over units."""
    f1: float
    auc: float


def full_teacher_training(split: Split) -> FullTraining:
    """The teacher's full training, as in `eyas teach`."""

    def train(recipe: Recipe, folder: Path) -> tuple[PixelClassifier, list[Epoch], Epoch]:
        model, _, histories = train_teacher(recipe, split, folder)
        metric = recipe.run.selection_metric
        kept = histories[best_stage(histories, metric)]
        return model, histories[BLOCKS] or histories[HEAD], kept[best_epoch(kept, metric)]

    return train


def full_student_training(split: Split, cache: ViewCache) -> FullTraining:
    """The student's full training on the cached views."""

    def train(recipe: Recipe, folder: Path) -> tuple[PixelClassifier, list[Epoch], Epoch]:
        model, _, history = train_student(recipe, split, cache, folder)
        return model, history, history[best_epoch(history, recipe.run.selection_metric)]

    return train


def train_final(
    train: FullTraining, recipe: Recipe, split: Split, trial: int, settings: dict[str, Value], folder: Path
) -> Final:
    """Train `recipe`, which has `settings`, unless `folder` has the result already; resumes an interrupted training.

    Workers that share the folder run one after the other.
    """
    path = folder / "final.json"
    with exclusive_lock(folder.with_name(".finals.lock")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(path.read_bytes(), type=Final)
        folder.mkdir(parents=True, exist_ok=True)
        model, history, kept = train(recipe, folder)
        pixels = prepared(split.validation.pixels, recipe.image.preprocessing())
        probabilities = softmax(logits_of(model, pixels, pick_device(recipe.run.device)))
        scores = score(probabilities, split.validation.targets, units=split.validation.units)
        final = Final(
            trial=trial,
            settings=settings,
            epochs=len(history),
            seconds=round(sum(epoch.seconds for epoch in history), 3),
            value=selection_value(kept.metrics, recipe.run.selection_metric),
            balanced_accuracy=scores.balanced_accuracy,
            balanced_accuracy_ci=scores.balanced_accuracy_ci,
            f1=scores.f1,
            auc=scores.auc,
        )
        write_bytes(path, msgspec.json.encode(final))
        for checkpoint in folder.glob("*.ckpt"):
            checkpoint.unlink()
        return final
