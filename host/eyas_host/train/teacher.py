"""The teacher: transfer learning with staged unfreezing.

Stage 1 trains the head alone on the frozen backbone's features, which are computed once. Stage 2 trains the last blocks
too, each slower than the one above it, together or one after the other; BatchNorm keeps the statistics it came with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.split import Split
from eyas_host.data.stream import Rows, Stream, in_turn
from eyas_host.data.views import prepared
from eyas_host.processes import share, whole
from eyas_host.recipe import Recipe
from eyas_host.train.curves import Curves
from eyas_host.train.loop import Epoch, Schedule, fit, logits_of, pick_device, to_tensor, validation_figures
from eyas_host.train.losses import teacher_loss
from eyas_host.train.models import Origin, PixelClassifier, build_teacher, move
from eyas_host.train.sampler import epoch_order
from eyas_host.train.unfreeze import Unfreezing, freeze_batch_norm, unfreeze

_HEAD_ROUNDS = 3
"""Views a picture whose features stage 1 caches."""


def train_teacher(
    recipe: Recipe, split: Split, work: Path, *, curves: Curves | None = None
) -> tuple[PixelClassifier, Origin, dict[str, list[Epoch]]]:
    """Train the teacher; checkpoints go to `work`.

    Returns the model, where its first weights came from, and the histories of both stages.
    """
    torch.manual_seed(recipe.run.seed)
    model, origin = build_teacher(recipe.teacher, len(split.labels))
    teaching = _Teaching(recipe, split, model, work, curves)
    return model, origin, {"head": teaching.head(), "blocks": teaching.blocks()}


class _Teaching:
    """Both stages of one teacher."""

    def __init__(self, recipe: Recipe, split: Split, model: PixelClassifier, work: Path, curves: Curves | None) -> None:
        self.recipe = recipe
        self.device = pick_device(recipe.run.device)
        self.model = move(model, self.device)
        self.work = work
        self.curves = curves
        self.stream = Stream(recipe, split.train)
        self.validation = prepared(split.validation.pixels, self.stream.augmenter.spec)
        self.validation_targets = split.validation.targets
        self.labels = split.train.targets
        self.targets = torch.from_numpy(self.labels).to(self.device)
        self.loss = teacher_loss(recipe, self.targets, len(split.labels))
        self.steps_an_epoch = -(-len(self.targets) // recipe.teacher.batch)

    def head(self) -> list[Epoch]:
        """Stage 1: the head on the frozen backbone's features."""
        settings, classifier = self.recipe.teacher, self.model.classifier
        turns = in_turn(len(self.targets))
        features = [_features(self.model, turns, self._views(turns, 1, number, 0)) for number in range(_HEAD_ROUNDS)]
        turns = in_turn(len(self.validation))
        pictures = (to_tensor(self.validation[share(rows)], self.device) for rows in turns)
        held_out = _features(self.model, turns, pictures)

        def steps(epoch: int) -> Iterator[Tensor]:
            for rows in self._batches(2, epoch):
                logits = classifier(features[epoch % _HEAD_ROUNDS][share(rows)])
                yield self.loss(whole(logits, len(rows)), self.targets[rows])

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            with torch.inference_mode():
                return validation_figures(candidate(held_out).cpu().numpy(), self.validation_targets)

        return fit(
            classifier,
            [{"params": list(classifier.parameters())}],
            steps=steps,
            evaluate=evaluate,
            schedule=Schedule(
                epochs=settings.head_epochs,
                rate=settings.head_rate,
                weight_decay=settings.weight_decay,
                metric=self.recipe.run.metric,
                seed=self.recipe.run.seed,
            ),
            steps_an_epoch=self.steps_an_epoch,
            checkpoint=self.work / "head.ckpt",
            title="teacher, head",
            stages=lambda _: "head",
            curves=self.curves,
        )

    def blocks(self) -> list[Epoch]:
        """Stage 2: the last blocks too, together or one after the other."""
        settings, metric = self.recipe.teacher, self.recipe.run.metric
        groups, by_plateau = unfreeze(self.model, settings), Unfreezing(self.model, settings, metric)

        def steps(epoch: int, first: int = 0) -> Iterator[Tensor]:
            batches = self._batches(4, epoch)[first:]
            for rows, pixels in zip(batches, self._views(batches, 3, epoch, epoch), strict=True):
                yield self.loss(whole(self.model(pixels), len(rows)), self.targets[rows])

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            return validation_figures(logits_of(candidate, self.validation, self.device), self.validation_targets)

        return fit(
            self.model,
            groups,
            steps=steps,
            evaluate=evaluate,
            schedule=Schedule(
                epochs=settings.epochs,
                rate=settings.rate,
                weight_decay=settings.weight_decay,
                shape=settings.schedule,
                plateau_epochs=settings.plateau_epochs,
                patience=settings.patience,
                metric=metric,
                ema=settings.ema,
                clip=settings.clip,
                accumulate=settings.accumulate,
                amp=self.recipe.run.amp,
                save_minutes=self.recipe.run.checkpoint_minutes,
                seed=self.recipe.run.seed,
            ),
            steps_an_epoch=self.steps_an_epoch,
            checkpoint=self.work / "blocks.ckpt",
            title="teacher, blocks",
            prepare=freeze_batch_norm,
            stages=by_plateau if settings.unfreeze_by == "plateau" else lambda _: "blocks",
            curves=self.curves,
        )

    def _batches(self, purpose: int, epoch: int) -> list[Rows]:
        """The seeded order of an epoch, in batches."""
        settings = self.recipe.teacher
        rng = np.random.default_rng((self.recipe.run.seed, purpose, epoch))
        order = epoch_order(self.labels, settings.sampler, rng)
        return [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]

    def _views(self, batches: Sequence[Rows], purpose: int, number: int, epoch: int) -> Iterator[Tensor]:
        """Of each batch this process's share of views, as strong as in that epoch; no rows, no pictures."""
        shares = [share(rows) for rows in batches]
        drawn = self.stream.views(
            [rows for rows in shares if len(rows)],
            (self.recipe.run.seed, purpose, number),
            strength=self.stream.augmenter.strength(epoch),
            mixed=False,
        )
        size = self.recipe.picture.size
        for rows in shares:
            pixels = next(drawn) if len(rows) else np.empty((0, size, size, 3), dtype=np.uint8)
            yield to_tensor(pixels, self.device)


@torch.inference_mode()
def _features(model: PixelClassifier, batches: Sequence[Rows], pictures: Iterable[Tensor]) -> Tensor:
    """Pooled features of all rows, of whose batches `pictures` are this process's share."""
    model.eval()
    parts = [whole(model.pooled(pixels), len(rows)) for rows, pixels in zip(batches, pictures, strict=True)]
    return torch.cat(parts).clone()
