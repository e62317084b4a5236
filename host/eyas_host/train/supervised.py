"""Supervised training on the labels, shared by the teacher, the baseline and the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.loader import BatchLoader, Rows
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.bootstrap import Floats
from eyas_host.evaluation.inference import logits_of, pick_device, to_tensor
from eyas_host.evaluation.metrics import softmax, validation_metrics
from eyas_host.pipeline.distributed import all_gather, local_shard
from eyas_host.recipe import Recipe
from eyas_host.train.losses import teacher_loss
from eyas_host.train.progressive import resized, small_epochs
from eyas_host.train.sampler import epoch_order
from eyas_host.train.schedule import Schedule
from eyas_host.train.together import logits_together

VIEW_SEED, ORDER_SEED = 3, 4
"""Second component of an epoch's seeds: for its views and for their order."""


class SupervisedTask:
    """Batches of augmented training images with labels, and evaluation on the validation split.

    Loss, sampler, augmentation and their seeds are those of the recipe's teacher.
    """

    def __init__(self, recipe: Recipe, split: Split) -> None:
        self.recipe = recipe
        self.split = split
        self.device = pick_device(recipe.run.device)
        self.loader = BatchLoader(recipe, split.train)
        self.validation = prepared(split.validation.pixels, self.loader.augmenter.spec)
        self.targets = torch.from_numpy(split.train.targets).to(self.device)
        self.loss = teacher_loss(recipe, self.targets, len(split.labels))

    def schedule(self, epochs: int, patience: int | None = None) -> Schedule:
        """The schedule of the teacher's stage 2 for a number of epochs."""
        settings, run = self.recipe.teacher, self.recipe.run
        return Schedule(
            epochs=epochs,
            rate=settings.rate,
            weight_decay=settings.weight_decay,
            shape=settings.schedule,
            plateau_epochs=settings.plateau_epochs,
            patience=patience,
            patient_from=small_epochs(settings.progressive, epochs),
            metric=run.selection_metric,
            ema=settings.ema,
            clip=settings.clip,
            accumulate=settings.accumulate,
            amp=run.amp,
            save_minutes=run.checkpoint_minutes,
            seed=run.seed,
        )

    def order(self, purpose: int, epoch: int) -> Rows:
        """All rows in the seeded order of an epoch; `purpose` is part of the seed."""
        rng = np.random.default_rng((self.recipe.run.seed, purpose, epoch))
        return epoch_order(self.split.train.targets, self.recipe.teacher.sampler, rng)

    def batches(self, purpose: int, epoch: int) -> list[Rows]:
        """The batches of an epoch in its seeded order; the last one may be smaller."""
        order, batch = self.order(purpose, epoch), self.recipe.teacher.batch
        return [order[start : start + batch] for start in range(0, len(order), batch)]

    def views(self, batches: Sequence[Rows], purpose: int, number: int, epoch: int) -> Iterator[Tensor]:
        """View `number` of this process's shard of each batch, at the epoch's strength: uint8 [rows, 3, size, size]."""
        strength = self.loader.augmenter.strength(epoch)
        shards = [local_shard(rows) for rows in batches]
        views = self.loader.views(shards, (self.recipe.run.seed, purpose, number), strength=strength, mixed=False)
        return (to_tensor(pixels, self.device) for pixels in views)

    def steps(
        self,
        forward: Callable[[Tensor], Tensor],
        epoch: int,
        first: int = 0,
        count: int | None = None,
        *,
        side: int | None = None,
    ) -> Iterator[Tensor]:
        """The loss of each batch of an epoch, or of `count` batches, from `first` on; `forward` computes logits.

        Views are resized to `side` pixels where that is given.
        """
        side = side or self.recipe.image.size
        batches = self.batches(ORDER_SEED, epoch)[first : None if count is None else first + count]
        for rows, pixels in zip(batches, self.views(batches, VIEW_SEED, epoch, epoch), strict=True):
            yield self.loss(all_gather(forward(resized(pixels, side)), len(rows)), self.targets[rows])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation metrics."""
        return validation_metrics(logits_together(model, self.validation, self.device), self.split.validation.targets)

    def probabilities(self, model: nn.Module) -> Floats:
        """Uncalibrated probabilities [n, classes] of the validation images."""
        return softmax(logits_of(model, self.validation, self.device))
