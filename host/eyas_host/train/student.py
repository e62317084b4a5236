"""The student: distillation on the augmented views that the teacher labelled.

Every epoch and every later stage reads the same cached views. Source of the consistent views and the long schedule:
Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import pick_device
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import Origin, PixelClassifier, build_student, move
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import all_gather
from eyas_host.recipe import Recipe
from eyas_host.support.errors import TrainError
from eyas_host.train.compiled import compiled
from eyas_host.train.engine import Groups, Hooks, Plan, Steps, fit
from eyas_host.train.feature_distillation import BlockCache, FeatureLoss, capture_maps
from eyas_host.train.losses import student_loss
from eyas_host.train.progressive import resized, side_of
from eyas_host.train.sampler import Rows, epoch_order
from eyas_host.train.schedule import Epoch, Schedule, full_batches
from eyas_host.train.together import logits_together
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache
from eyas_host.train.view_reader import ViewBatch, ViewReader


class DistillationTask:
    """Distillation of a network from cached views with the teacher's logits and the labels.

    With `teacher=False` the same views, in the same order, are learned from the labels only: those of the mixture where
    a view is mixed.
    """

    def __init__(
        self, recipe: Recipe, split: Split, cache: ViewCache, *, teacher: bool = True, curves: Curves | None = None
    ) -> None:
        self.recipe = recipe
        self.curves = curves
        self.device = pick_device(recipe.run.device)
        self.cache = cache
        self.targets = split.train.targets
        self.validation = prepared(split.validation.pixels, recipe.image.preprocessing())
        self.validation_targets = split.validation.targets
        settings = recipe.student
        targets = torch.from_numpy(self.targets).to(self.device)
        self.loss = student_loss(recipe, targets, len(split.labels), teacher=teacher)
        self.teacher = teacher
        self.blocks = BlockCache(cache.root) if settings.feature_layers and teacher else None
        self._reader = ViewReader(
            cache, recipe.run, self.device, features=teacher and settings.feature_loss > 0, blocks=self.blocks
        )

    @property
    def images(self) -> int:
        """Images of an epoch: an incomplete last batch is dropped for BatchNorm's sake."""
        return full_batches(len(self.targets), self.recipe.student.batch)

    def pixels(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Pixels of this process's shard, uint8 [n, 3, s, s], of each batch from `first` on."""
        return self._reader.pixels(self._sample(epoch, first))

    def batches(self, epoch: int, first: int = 0) -> Iterator[ViewBatch]:
        """The batches of an epoch from `first` on, with labels and the teacher's outputs."""
        return self._reader.batches(self._sample(epoch, first))

    def _sample(self, epoch: int, first: int) -> list[tuple[Rows, Rows]]:
        """View and row indices of each batch of an epoch from `first` on."""
        rng = np.random.default_rng((self.recipe.run.seed, 6, epoch))
        order = epoch_order(self.targets, self.recipe.student.sampler, rng)
        view = rng.integers(len(self.cache), size=len(order))
        batch = self.recipe.student.batch
        starts = range(first * batch, self.images, batch)
        return [(view[start : start + batch], order[start : start + batch]) for start in starts]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation metrics."""
        return validation_metrics(logits_together(model, self.validation, self.device), self.validation_targets)

    def train(
        self,
        model: nn.Module,
        *,
        epochs: int,
        rate: float,
        checkpoint: Path,
        title: str,
        ema: float = 0.0,
        patience: int | None = None,
        keep_start: bool = False,
        progressive: bool = False,
        after_step: Callable[[], None] | None = None,
    ) -> list[Epoch]:
        """Train any network that maps float pixels to logits, a `PixelClassifier` with feature distillation too.

        With `keep_start` the network as it is remains if no epoch is better on validation; with `progressive` the first
        epochs see smaller views as the recipe says. Raises `TrainError` if a batch is too small for the number of
        processes.
        """
        if self.recipe.student.batch < 2 * distributed.world_size():
            raise TrainError(
                f"[student] batch = {self.recipe.student.batch}: BatchNorm needs at least 2 images for each of the "
                f"{distributed.world_size()} processes"
            )
        run, settings, feature_loss = self.recipe.run, self.recipe.student, self._feature_loss(model)
        groups: Groups = param_groups_weight_decay(model, settings.weight_decay)
        if feature_loss is not None:
            groups += param_groups_weight_decay(feature_loss, settings.weight_decay)
        plan = Plan(
            title=title,
            schedule=Schedule(
                epochs=epochs,
                rate=rate,
                weight_decay=settings.weight_decay,
                metric=run.selection_metric,
                ema=ema,
                patience=patience,
                amp=run.amp,
                save_minutes=run.checkpoint_minutes,
                seed=run.seed,
            ),
            images=self.images,
            batch=settings.batch,
            checkpoint=checkpoint,
            start=self.evaluate(model) if keep_start else None,
            curves=self.curves,
        )
        return fit(
            model,
            groups,
            plan,
            steps=self._steps(model, feature_loss, epochs if progressive else 0),
            evaluate=self.evaluate,
            hooks=Hooks(after_step=after_step),
            auxiliary=feature_loss,
        )

    def _steps(self, model: nn.Module, feature_loss: FeatureLoss | None, epochs: int) -> Steps:
        """The loss of each batch, by epoch and first batch; the first of so many `epochs` see smaller views."""
        side = partial(self._side, epochs)
        compile_network = self.recipe.run.compile
        if feature_loss is None or not isinstance(model, PixelClassifier):
            return partial(self._logit_losses, compiled(model, compile_network), side)
        pooled_of = compiled(model.pooled, compile_network and not feature_loss.names)
        return partial(self._feature_losses, model, pooled_of, feature_loss, side)

    def _side(self, epochs: int, epoch: int) -> int:
        recipe = self.recipe
        return side_of(epoch, recipe.student.progressive, epochs, recipe.image.size)

    def _logit_losses(
        self, forward: Callable[[Tensor], Tensor], side_in: Callable[[int], int], epoch: int, first: int
    ) -> Iterator[Tensor]:
        for batch in self.batches(epoch, first):
            logits = all_gather(forward(resized(batch.pixels, side_in(epoch)).float()), len(batch.labels))
            yield self.loss(logits, batch.logits, batch.labels)

    def _feature_losses(
        self,
        model: PixelClassifier,
        pooled_of: Callable[[Tensor], Tensor],
        feature_loss: FeatureLoss,
        side_in: Callable[[int], int],
        epoch: int,
        first: int,
    ) -> Iterator[Tensor]:
        for batch in self.batches(epoch, first):
            rows = len(batch.labels)
            with capture_maps(model, feature_loss.names) as maps:
                pooled = pooled_of(resized(batch.pixels, side_in(epoch)))
            own = model.classify(pooled), pooled
            both = all_gather(torch.cat([values.float() for values in own], dim=1), rows)  # one exchange for two
            logits, features = both.split([values.shape[1] for values in own], dim=1)
            own_maps = [all_gather(m, rows) for m in maps]
            loss = self.loss(logits, batch.logits, batch.labels)
            yield loss + feature_loss(features, batch.features, own_maps, batch.maps)

    def _feature_loss(self, model: nn.Module) -> FeatureLoss | None:
        settings = self.recipe.student
        if (
            not self.teacher
            or not (settings.feature_loss or settings.feature_layers)
            or not isinstance(model, PixelClassifier)
        ):
            return None
        torch.manual_seed(self.recipe.run.seed + 1)
        return FeatureLoss(model, settings, self.cache.features.shape[-1], self.blocks).to(self.device)


def train_student(
    recipe: Recipe,
    split: Split,
    cache: ViewCache,
    work: Path,
    *,
    teacher: bool = True,
    curves: Curves | None = None,
) -> tuple[PixelClassifier, Origin, list[Epoch]]:
    """Distil the student, or with `teacher=False` train the same network from the labels only."""
    task = DistillationTask(recipe, split, cache, teacher=teacher, curves=curves)
    torch.manual_seed(recipe.run.seed)
    model, origin = build_student(recipe.student, len(split.labels))
    model = move(model, task.device)
    history = task.train(
        model,
        epochs=recipe.student.epochs,
        rate=recipe.student.rate,
        ema=recipe.student.ema,
        progressive=True,
        checkpoint=work / ("student.ckpt" if teacher else "labels-only.ckpt"),
        title="student" if teacher else "student, labels only",
    )
    return model, origin, history
