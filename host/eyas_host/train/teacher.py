"""The teacher: transfer learning with staged unfreezing.

Stage 1 trains only the head, on the frozen backbone's features, which are computed once. Stage 2 also trains the last
blocks, each slower than the one above it, together or one after the other; BatchNorm statistics stay frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eyas_host.data.loader import Rows, ordered_batches
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import to_tensor
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import Origin, PixelClassifier, build_teacher, move
from eyas_host.pipeline.distributed import all_gather, local_shard
from eyas_host.recipe import Recipe
from eyas_host.train.engine import fit
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.supervised import ORDER_SEED, VIEW_SEED, SupervisedTask
from eyas_host.train.trackers import Curves
from eyas_host.train.unfreeze import GradualUnfreezing, freeze_batch_norm, unfreeze

_HEAD_VIEWS = 3
"""Views per image whose features stage 1 caches."""


def train_teacher(
    recipe: Recipe, split: Split, work: Path, *, curves: Curves | None = None
) -> tuple[PixelClassifier, Origin, dict[str, list[Epoch]]]:
    """Train the teacher; checkpoints go to `work`.

    Returns the model, the origin of its initial weights, and the histories of both stages.
    """
    torch.manual_seed(recipe.run.seed)
    model, origin = build_teacher(recipe.teacher, len(split.labels))
    training = _TeacherTraining(recipe, split, model, work, curves)
    return model, origin, {"head": training.head(), "blocks": training.blocks()}


class _TeacherTraining:
    """Both training stages of a teacher."""

    def __init__(self, recipe: Recipe, split: Split, model: PixelClassifier, work: Path, curves: Curves | None) -> None:
        self.recipe = recipe
        self.task = SupervisedTask(recipe, split)
        self.model = move(model, self.task.device)
        self.work = work
        self.curves = curves
        self.steps_per_epoch = -(-len(split.train) // recipe.teacher.batch)

    def head(self) -> list[Epoch]:
        """Stage 1: train the head on the frozen backbone's features."""
        settings, classifier = self.recipe.teacher, self.model.classifier
        task, batches = self.task, ordered_batches(len(self.task.targets))
        features = [_features(self.model, batches, self._views(batches, 1, number, 0)) for number in range(_HEAD_VIEWS)]
        batches = ordered_batches(len(task.validation))
        images = (to_tensor(task.validation[local_shard(rows)], task.device) for rows in batches)
        validation = _features(self.model, batches, images)

        def steps(epoch: int) -> Iterator[Tensor]:
            for rows in self._batches(2, epoch):
                logits = classifier(features[epoch % _HEAD_VIEWS][local_shard(rows)])
                yield task.loss(all_gather(logits, len(rows)), task.targets[rows])

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            with torch.inference_mode():
                return validation_metrics(candidate(validation).cpu().numpy(), task.split.validation.targets)

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
            steps_per_epoch=self.steps_per_epoch,
            checkpoint=self.work / "head.ckpt",
            title="teacher, head",
            stages=lambda _: "head",
            curves=self.curves,
        )

    def blocks(self) -> list[Epoch]:
        """Stage 2: train the last blocks too, together or one after the other."""
        settings, metric, task = self.recipe.teacher, self.recipe.run.selection_metric, self.task
        groups, gradual = unfreeze(self.model, settings), GradualUnfreezing(self.model, settings, metric)

        def steps(epoch: int, first: int = 0) -> Iterator[Tensor]:
            batches = self._batches(ORDER_SEED, epoch)[first:]
            for rows, pixels in zip(batches, self._views(batches, VIEW_SEED, epoch, epoch), strict=True):
                yield task.loss(all_gather(self.model(pixels), len(rows)), task.targets[rows])

        return fit(
            self.model,
            groups,
            steps=steps,
            evaluate=task.evaluate,
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
            steps_per_epoch=self.steps_per_epoch,
            checkpoint=self.work / "blocks.ckpt",
            title="teacher, blocks",
            prepare=freeze_batch_norm,
            stages=gradual if settings.unfreeze_by == "plateau" else lambda _: "blocks",
            curves=self.curves,
        )

    def _batches(self, purpose: int, epoch: int) -> list[Rows]:
        """The batches of an epoch in its seeded order."""
        order, batch = self.task.order(purpose, epoch), self.recipe.teacher.batch
        return [order[start : start + batch] for start in range(0, len(order), batch)]

    def _views(self, batches: Sequence[Rows], purpose: int, number: int, epoch: int) -> Iterator[Tensor]:
        """The views of this process's shard of each batch."""
        return self.task.views([local_shard(rows) for rows in batches], purpose, number, epoch)


@torch.inference_mode()
def _features(model: PixelClassifier, batches: Sequence[Rows], images: Iterable[Tensor]) -> Tensor:
    """Pooled features of all rows; `images` are this process's shard of each batch."""
    model.eval()
    features = [all_gather(model.pooled(pixels), len(rows)) for rows, pixels in zip(batches, images, strict=True)]
    return torch.cat(features).clone()
