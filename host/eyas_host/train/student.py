"""The student: the same augmented views as the teacher saw, its answers beside the labels.

Every epoch and every later stage reads the same cached views. Source for "the same view to both, and patience": Beyer
et al., "Knowledge distillation: a good teacher is patient and consistent", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import logits_of, pick_device, to_tensor
from eyas_host.models.factory import Origin, PixelClassifier, build_student, move
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import all_gather
from eyas_host.recipe import Recipe
from eyas_host.support.errors import TrainError
from eyas_host.train.engine import Groups, fit, validation_figures
from eyas_host.train.feature_distillation import BlockCache, Hints, maps_of
from eyas_host.train.losses import student_loss
from eyas_host.train.sampler import Rows, epoch_order
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache


class DistillationTask:
    """What a student learns from: cached views, the teacher's answers and the labels, in batches.

    With `teacher=False` the same views and order are learnt from the labels alone.
    """

    def __init__(
        self, recipe: Recipe, split: Split, cache: ViewCache, *, teacher: bool = True, curves: Curves | None = None
    ) -> None:
        self.recipe = recipe
        self.curves = curves
        self.device = pick_device(recipe.run.device)
        self.cache = cache
        self.labels = torch.from_numpy(split.train.targets)
        self.validation = prepared(split.validation.pixels, recipe.image.preprocessing())
        self.validation_targets = split.validation.targets
        settings = recipe.student
        labels = self.labels.to(self.device)
        self.loss = student_loss(recipe, labels, len(split.labels), teacher=teacher)
        self.teacher = teacher
        self.blocks = BlockCache(cache.root) if settings.feature_layers and teacher else None

    @property
    def steps_an_epoch(self) -> int:
        """Batches a pass over the training images; a last one too small for BatchNorm is left out."""
        count, batch = len(self.labels), self.recipe.student.batch
        return max(1, count // batch)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Pixels uint8 [n, 3, s, s], teacher's logits, teacher's features, labels: one view of each image.

        They begin at the epoch's batch number `first`.
        """
        for views, rows in self._drawn(epoch, first):
            yield (
                to_tensor(self.cache.pixels(views, rows), self.device),
                torch.from_numpy(self.cache.logits[views, rows]).float().to(self.device),
                torch.from_numpy(self.cache.features[views, rows]).float().to(self.device),
                self.labels[rows].to(self.device),
            )

    def _drawn(self, epoch: int, first: int) -> Iterator[tuple[Rows, Rows]]:
        """Views and rows of each batch of an epoch."""
        rng = np.random.default_rng((self.recipe.run.seed, 6, epoch))
        order = epoch_order(self.labels, self.recipe.student.sampler, rng)
        view = rng.integers(len(self.cache), size=len(order))
        batch = self.recipe.student.batch
        for step in range(first, self.steps_an_epoch):
            rows = order[step * batch : (step + 1) * batch]
            yield view[step * batch : (step + 1) * batch], rows

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on validation."""
        return validation_figures(logits_of(model, self.validation, self.device), self.validation_targets)

    def train(
        self,
        model: nn.Module,
        *,
        epochs: int,
        rate: float,
        checkpoint: Path,
        title: str,
        ema: float = 0.0,
        weight_decay: float | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> list[Epoch]:
        """Train any network that maps float pixels to logits; hints are given where it has pooled features and blocks.

        Raises `TrainError` if a batch is too small for the processes that share it.
        """
        if self.recipe.student.batch < 2 * distributed.count():
            raise TrainError(
                f"[student] batch = {self.recipe.student.batch}: BatchNorm needs at least 2 images for each of the "
                f"{distributed.count()} processes"
            )
        hints = self._hints(model)
        groups: Groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        if hints is not None:
            groups.append({"params": list(hints.parameters())})

        def steps(epoch: int, first: int = 0) -> Iterator[Tensor]:
            drawn = zip(self._drawn(epoch, first), self.batches(epoch, first), strict=True)
            for places, (pixels, teacher, features, labels) in drawn:
                rows, pixels = len(pixels), distributed.share(pixels)
                if hints is None or not isinstance(model, PixelClassifier):
                    yield self.loss(all_gather(model(pixels.float()), rows), teacher, labels)
                else:
                    with maps_of(model, hints.names) as maps:
                        pooled = model.pooled(pixels)
                    logits = model.classify(pooled)
                    loss = self.loss(all_gather(logits, rows), teacher, labels)
                    wanted = self._wanted(*places)
                    yield loss + hints(all_gather(pooled, rows), features, [all_gather(m, rows) for m in maps], wanted)

        return fit(
            model,
            groups,
            steps=steps,
            evaluate=self.evaluate,
            schedule=Schedule(
                epochs=epochs,
                rate=rate,
                weight_decay=self.recipe.student.weight_decay if weight_decay is None else weight_decay,
                metric=self.recipe.run.selection_metric,
                ema=ema,
                amp=self.recipe.run.amp,
                save_minutes=self.recipe.run.checkpoint_minutes,
                seed=self.recipe.run.seed,
            ),
            steps_an_epoch=self.steps_an_epoch,
            checkpoint=checkpoint,
            title=title,
            after_step=after_step,
            beside=hints,
            curves=self.curves,
        )

    def _hints(self, model: nn.Module) -> Hints | None:
        settings = self.recipe.student
        if (
            not self.teacher
            or not (settings.feature_loss or settings.feature_layers)
            or not isinstance(model, PixelClassifier)
        ):
            return None
        torch.manual_seed(self.recipe.run.seed + 1)
        return Hints(model, settings, self.cache.features.shape[-1], self.blocks).to(self.device)

    def _wanted(self, views: Rows, rows: Rows) -> list[Tensor]:
        """The teacher's maps for the hints between blocks."""
        return [] if self.blocks is None else [m.to(self.device) for m in self.blocks.maps(views, rows)]


def train_student(
    recipe: Recipe,
    split: Split,
    cache: ViewCache,
    work: Path,
    *,
    teacher: bool = True,
    curves: Curves | None = None,
) -> tuple[PixelClassifier, Origin, list[Epoch]]:
    """Distil the student, or with `teacher=False` train the same network from the labels alone."""
    lesson = DistillationTask(recipe, split, cache, teacher=teacher, curves=curves)
    torch.manual_seed(recipe.run.seed)
    model, origin = build_student(recipe.student, len(split.labels))
    model = move(model, lesson.device)
    history = lesson.train(
        model,
        epochs=recipe.student.epochs,
        rate=recipe.student.rate,
        ema=recipe.student.ema,
        checkpoint=work / ("student.ckpt" if teacher else "labels-only.ckpt"),
        title="student" if teacher else "student, labels only",
    )
    return model, origin, history
