"""The teacher: transfer learning with staged unfreezing.

Stage 1 trains only the head, on the frozen backbone's features, which are computed once. Stage 2 also trains the last
blocks, each slower than the one above it, together or one after the other; BatchNorm statistics stay frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from eyas_host.data.loader import Rows, ordered_batches
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import to_tensor
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import Origin, PixelClassifier, build_teacher, move
from eyas_host.models.frozen_features import Pooled, frozen_features, with_frozen_blocks
from eyas_host.pipeline.distributed import all_gather, local_shard
from eyas_host.recipe import Recipe
from eyas_host.support.progress import Meter, meter
from eyas_host.train.compiled import compiled
from eyas_host.train.engine import Hooks, Plan, fit, is_better
from eyas_host.train.precision import resolve_amp
from eyas_host.train.progressive import side_of
from eyas_host.train.schedule import Epoch, Schedule, best_epoch
from eyas_host.train.supervised import SupervisedTask
from eyas_host.train.trackers import Curves
from eyas_host.train.unfreeze import GradualUnfreezing, freeze_batch_norm, unfreeze

HEAD, BLOCKS = "head", "blocks"
"""Keys of the histories of stage 1 and stage 2."""
_HEAD_VIEWS = 3
"""Views per image whose features stage 1 caches."""


def train_teacher(
    recipe: Recipe, split: Split, work: Path, *, curves: Curves | None = None
) -> tuple[PixelClassifier, Origin, dict[str, list[Epoch]]]:
    """Train the teacher; checkpoints go to `work`.

    Returns the model, the origin of its initial weights, and the histories of both stages; `best_stage` names the one
    that the weights are from.
    """
    torch.manual_seed(recipe.run.seed)
    model, origin = build_teacher(recipe.teacher, len(split.labels))
    task = SupervisedTask(recipe, split)
    model = move(model, task.device)
    head = train_head(task, model, work / "head.ckpt", curves=curves)
    reached = head[best_epoch(head, recipe.run.selection_metric)].metrics
    return model, origin, {HEAD: head, BLOCKS: _train_blocks(task, model, work / "blocks.ckpt", reached, curves)}


def best_stage(histories: Mapping[str, Sequence[Epoch]], metric: str) -> str:
    """The stage whose best epoch the teacher's weights are from: stage 2 only if it is better than the head alone."""
    head, blocks = histories[HEAD], histories[BLOCKS]
    return BLOCKS if is_better(blocks, head[best_epoch(head, metric)].metrics, metric) else HEAD


def train_head(
    task: SupervisedTask, model: PixelClassifier, checkpoint: Path, *, curves: Curves | None = None
) -> list[Epoch]:
    """Stage 1: train the head on the frozen backbone's features."""
    run, settings, classifier = task.recipe.run, task.recipe.teacher, model.classifier
    batches, held_back = ordered_batches(len(task.targets)), ordered_batches(len(task.validation))
    images = (to_tensor(task.validation[local_shard(rows)], task.device) for rows in held_back)
    model.eval()
    pooled_of = frozen_features(model, task.recipe.image.size, _HEAD_VIEWS * len(task.targets) + len(task.validation))
    with meter("teacher, features", _HEAD_VIEWS * len(batches) + len(held_back)) as bar:
        views = (task.views(batches, 1, number, 0) for number in range(_HEAD_VIEWS))
        features = [_features(pooled_of, batches, view, bar) for view in views]
        validation = _features(pooled_of, held_back, images, bar)

    def steps(epoch: int, first: int) -> Iterator[Tensor]:
        for rows in task.batches(2, epoch)[first:]:
            logits = classifier(features[epoch % _HEAD_VIEWS][local_shard(rows)])
            yield task.loss(all_gather(logits, len(rows)), task.targets[rows])

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return validation_metrics(candidate(validation).cpu().numpy(), task.split.validation.targets)

    plan = Plan(
        title="teacher, head",
        schedule=Schedule(
            epochs=settings.head_epochs,
            rate=settings.head_rate,
            weight_decay=settings.weight_decay,
            metric=run.selection_metric,
            save_minutes=run.checkpoint_minutes,
            seed=run.seed,
        ),
        images=len(task.targets),
        batch=settings.batch,
        checkpoint=checkpoint,
        curves=curves,
    )
    groups = param_groups_weight_decay(classifier, settings.weight_decay)
    return fit(classifier, groups, plan, steps=steps, evaluate=evaluate, hooks=Hooks(stages=lambda _: HEAD))


def _train_blocks(
    task: SupervisedTask,
    model: PixelClassifier,
    checkpoint: Path,
    reached: Mapping[str, float],
    curves: Curves | None,
) -> list[Epoch]:
    """Stage 2: train the last blocks too; a head that `reached` better validation metrics is kept instead."""
    run, settings = task.recipe.run, task.recipe.teacher
    gradual = GradualUnfreezing(model, settings, run.selection_metric)
    groups = unfreeze(model, settings)
    if settings.unfreeze_by == "plateau" or task.recipe.run.compile or resolve_amp(run.amp, task.device) != "no":
        forward = compiled(model, task.recipe.run.compile)
    else:
        forward = with_frozen_blocks(model, task.recipe.image.size, settings.epochs * len(task.targets))
    plan = Plan(
        title="teacher, blocks",
        schedule=task.schedule(settings.epochs, settings.patience),
        images=len(task.targets),
        batch=settings.batch,
        checkpoint=checkpoint,
        start=reached,
        curves=curves,
    )
    return fit(
        model,
        groups,
        plan,
        steps=lambda epoch, first: task.steps(
            forward, epoch, first, side=side_of(epoch, settings.progressive, settings.epochs, task.recipe.image.size)
        ),
        evaluate=task.evaluate,
        hooks=Hooks(
            prepare=freeze_batch_norm, stages=gradual if settings.unfreeze_by == "plateau" else lambda _: BLOCKS
        ),
    )


@torch.inference_mode()
def _features(pooled_of: Pooled, batches: Sequence[Rows], images: Iterable[Tensor], bar: Meter) -> Tensor:
    """Pooled features of all rows; `images` are this process's shard of each batch."""
    features = []
    for rows, pixels in zip(batches, images, strict=True):
        features.append(all_gather(pooled_of(pixels), len(rows)))
        bar.advance()
    return torch.cat(features).clone()
