"""The teacher: transfer learning with staged unfreezing.

Stage 1 trains the head alone on the frozen backbone's features, which are computed once. Stage 2 trains the last blocks
too, each slower than the one above it, together or one after the other; BatchNorm keeps the statistics it came with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eyas_host.data.loader import Rows, ordered_batches
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import to_tensor
from eyas_host.models.factory import Origin, PixelClassifier, build_teacher, move
from eyas_host.pipeline.distributed import all_gather, share
from eyas_host.recipe import Recipe
from eyas_host.train.engine import fit, validation_figures
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.supervised import ORDER, VIEWS, SupervisedTask
from eyas_host.train.trackers import Curves
from eyas_host.train.unfreeze import Unfreezing, freeze_batch_norm, unfreeze

_HEAD_ROUNDS = 3
"""Views an image whose features stage 1 caches."""


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
        self.lesson = SupervisedTask(recipe, split)
        self.model = move(model, self.lesson.device)
        self.work = work
        self.curves = curves
        self.steps_an_epoch = -(-len(split.train) // recipe.teacher.batch)

    def head(self) -> list[Epoch]:
        """Stage 1: the head on the frozen backbone's features."""
        settings, classifier = self.recipe.teacher, self.model.classifier
        lesson, turns = self.lesson, ordered_batches(len(self.lesson.targets))
        features = [_features(self.model, turns, self._views(turns, 1, number, 0)) for number in range(_HEAD_ROUNDS)]
        turns = ordered_batches(len(lesson.validation))
        images = (to_tensor(lesson.validation[share(rows)], lesson.device) for rows in turns)
        held_out = _features(self.model, turns, images)

        def steps(epoch: int) -> Iterator[Tensor]:
            for rows in self._batches(2, epoch):
                logits = classifier(features[epoch % _HEAD_ROUNDS][share(rows)])
                yield lesson.loss(all_gather(logits, len(rows)), lesson.targets[rows])

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            with torch.inference_mode():
                return validation_figures(candidate(held_out).cpu().numpy(), lesson.split.validation.targets)

        return fit(
            classifier,
            [{"params": list(classifier.parameters())}],
            steps=steps,
            evaluate=evaluate,
            schedule=Schedule(
                epochs=settings.head_epochs,
                rate=settings.head_rate,
                weight_decay=settings.weight_decay,
                metric=self.recipe.run.selection_metric,
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
        settings, metric, lesson = self.recipe.teacher, self.recipe.run.selection_metric, self.lesson
        groups, by_plateau = unfreeze(self.model, settings), Unfreezing(self.model, settings, metric)

        def steps(epoch: int, first: int = 0) -> Iterator[Tensor]:
            batches = self._batches(ORDER, epoch)[first:]
            for rows, pixels in zip(batches, self._views(batches, VIEWS, epoch, epoch), strict=True):
                yield lesson.loss(all_gather(self.model(pixels), len(rows)), lesson.targets[rows])

        return fit(
            self.model,
            groups,
            steps=steps,
            evaluate=lesson.evaluate,
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
        order, batch = self.lesson.order(purpose, epoch), self.recipe.teacher.batch
        return [order[start : start + batch] for start in range(0, len(order), batch)]

    def _views(self, batches: Sequence[Rows], purpose: int, number: int, epoch: int) -> Iterator[Tensor]:
        """The views of each batch that are this process's share."""
        return self.lesson.views([share(rows) for rows in batches], purpose, number, epoch)


@torch.inference_mode()
def _features(model: PixelClassifier, batches: Sequence[Rows], images: Iterable[Tensor]) -> Tensor:
    """Pooled features of all rows, of whose batches `images` are this process's share."""
    model.eval()
    parts = [all_gather(model.pooled(pixels), len(rows)) for rows, pixels in zip(batches, images, strict=True)]
    return torch.cat(parts).clone()
