"""Training on the labels, as the teacher does: what its stages, a baseline and a search are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.loader import BatchLoader, Rows
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.bootstrap import Floats
from eyas_host.evaluation.inference import logits_of, pick_device, to_tensor
from eyas_host.evaluation.metrics import softmax
from eyas_host.recipe import Recipe
from eyas_host.train.engine import validation_figures
from eyas_host.train.losses import teacher_loss
from eyas_host.train.sampler import epoch_order
from eyas_host.train.schedule import Schedule

VIEWS, ORDER = 3, 4
"""Purposes of an epoch's seeds: what is drawn, and in which order."""


class SupervisedTask:
    """Augmented training images with their labels in batches, and the validation part to judge by.

    Loss, sampler, augmentation and their seeds are those of the recipe's teacher.
    """

    def __init__(self, recipe: Recipe, split: Split) -> None:
        self.recipe = recipe
        self.split = split
        self.device = pick_device(recipe.run.device)
        self.stream = BatchLoader(recipe, split.train)
        self.validation = prepared(split.validation.pixels, self.stream.augmenter.spec)
        self.targets = torch.from_numpy(split.train.targets).to(self.device)
        self.loss = teacher_loss(recipe, self.targets, len(split.labels))

    def steps_an_epoch(self, batch: int) -> int:
        """Batches a pass; a last one that is not full is left out: BatchNorm learns from what is in a batch."""
        return max(1, len(self.targets) // batch)

    def schedule(self, epochs: int) -> Schedule:
        """Epochs at the teacher's rate, judged by the recipe's metric; none ends early."""
        settings, run = self.recipe.teacher, self.recipe.run
        return Schedule(
            epochs=epochs,
            rate=settings.rate,
            weight_decay=settings.weight_decay,
            metric=run.selection_metric,
            clip=settings.clip,
            accumulate=settings.accumulate,
            amp=run.amp,
            seed=run.seed,
        )

    def order(self, purpose: int, epoch: int) -> Rows:
        """All rows in the seeded order of an epoch; a purpose is a seed of its own."""
        rng = np.random.default_rng((self.recipe.run.seed, purpose, epoch))
        return epoch_order(self.split.train.targets, self.recipe.teacher.sampler, rng)

    def views(self, batches: Sequence[Rows], purpose: int, number: int, epoch: int) -> Iterator[Tensor]:
        """For each batch of rows its views number `number`, as strong as in that epoch: uint8 [rows, 3, size, size]."""
        strength = self.stream.augmenter.strength(epoch)
        drawn = self.stream.views(batches, (self.recipe.run.seed, purpose, number), strength=strength, mixed=False)
        return (to_tensor(pixels, self.device) for pixels in drawn)

    def steps(self, model: nn.Module, epoch: int, batch: int, count: int | None = None) -> Iterator[Tensor]:
        """The loss of each batch of an epoch, or of its first `count` batches."""
        order, steps = self.order(ORDER, epoch), self.steps_an_epoch(batch) if count is None else count
        batches = [order[step * batch : (step + 1) * batch] for step in range(steps)]
        for rows, pixels in zip(batches, self.views(batches, VIEWS, epoch, epoch), strict=True):
            yield self.loss(model(pixels), self.targets[rows])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on validation, by which epochs are judged."""
        return validation_figures(logits_of(model, self.validation, self.device), self.split.validation.targets)

    def probabilities(self, model: nn.Module) -> Floats:
        """Probabilities [n, classes] of the validation images, not temperature-scaled."""
        return softmax(logits_of(model, self.validation, self.device))
