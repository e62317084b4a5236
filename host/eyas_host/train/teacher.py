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
from eyas_host.data.views import Batch, prepared
from eyas_host.processes import share, whole
from eyas_host.recipe import Recipe, TeacherSection
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
    settings, seed = recipe.teacher, recipe.run.seed
    device = pick_device(recipe.run.device)
    torch.manual_seed(seed)
    model, origin = build_teacher(settings, len(split.labels))
    model = move(model, device)
    stream = Stream(recipe, split.train)
    validation = prepared(split.validation.pixels, stream.augmenter.spec)
    targets = torch.from_numpy(split.train.targets).to(device)
    loss_of = teacher_loss(recipe, targets, len(split.labels))

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        return validation_figures(logits_of(candidate, validation, device), split.validation.targets)

    def views(batches: Sequence[Rows], seeds: tuple[int, ...], epoch: int) -> Iterator[Tensor]:
        drawn = stream.views(
            [rows for rows in batches if len(rows)], seeds, strength=stream.augmenter.strength(epoch), mixed=False
        )
        return (to_tensor(pixels, device) for pixels in _with_empty(drawn, batches, recipe.picture.size))

    turns = in_turn(len(targets))
    features = [
        _features(model, turns, views([share(rows) for rows in turns], (seed, 1, number), 0))
        for number in range(_HEAD_ROUNDS)
    ]
    turns = in_turn(len(validation))
    held_out = _features(model, turns, (to_tensor(validation[share(rows)], device) for rows in turns))
    classifier = model.classifier

    def head_steps(epoch: int) -> Iterator[Tensor]:
        for rows in _batches(split.train.targets, settings, (seed, 2, epoch)):
            logits = classifier(features[epoch % _HEAD_ROUNDS][share(rows)])
            yield loss_of(whole(logits, len(rows)), targets[rows])

    def evaluate_head(candidate: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return validation_figures(candidate(held_out).cpu().numpy(), split.validation.targets)

    a_pass = -(-len(targets) // settings.batch)
    head = fit(
        classifier,
        [{"params": list(classifier.parameters())}],
        steps=head_steps,
        evaluate=evaluate_head,
        schedule=Schedule(
            epochs=settings.head_epochs,
            rate=settings.head_rate,
            weight_decay=settings.weight_decay,
            metric=recipe.run.metric,
            seed=seed,
        ),
        steps_an_epoch=a_pass,
        checkpoint=work / "head.ckpt",
        title="teacher, head",
        stages=lambda _: "head",
        curves=curves,
    )
    groups, by_plateau = unfreeze(model, settings), Unfreezing(model, settings, recipe.run.metric)

    def steps(epoch: int, first: int = 0) -> Iterator[Tensor]:
        batches = _batches(split.train.targets, settings, (seed, 4, epoch))[first:]
        drawn = views([share(rows) for rows in batches], (seed, 3, epoch), epoch)
        for rows, pixels in zip(batches, drawn, strict=True):
            yield loss_of(whole(model(pixels), len(rows)), targets[rows])

    blocks = fit(
        model,
        groups,
        steps=steps,
        evaluate=evaluate,
        schedule=_schedule(recipe),
        steps_an_epoch=a_pass,
        checkpoint=work / "blocks.ckpt",
        title="teacher, blocks",
        prepare=freeze_batch_norm,
        stages=by_plateau if settings.unfreeze_by == "plateau" else lambda _: "blocks",
        curves=curves,
    )
    return model, origin, {"head": head, "blocks": blocks}


def _schedule(recipe: Recipe) -> Schedule:
    """Of stage 2."""
    settings = recipe.teacher
    return Schedule(
        epochs=settings.epochs,
        rate=settings.rate,
        weight_decay=settings.weight_decay,
        shape=settings.schedule,
        plateau_epochs=settings.plateau_epochs,
        patience=settings.patience,
        metric=recipe.run.metric,
        ema=settings.ema,
        clip=settings.clip,
        accumulate=settings.accumulate,
        amp=recipe.run.amp,
        save_minutes=recipe.run.checkpoint_minutes,
        seed=recipe.run.seed,
    )


@torch.inference_mode()
def _features(model: PixelClassifier, batches: Sequence[Rows], pictures: Iterable[Tensor]) -> Tensor:
    """Pooled features of all rows, of whose batches `pictures` are this process's share."""
    model.eval()
    parts = [whole(model.pooled(pixels), len(rows)) for rows, pixels in zip(batches, pictures, strict=True)]
    return torch.cat(parts).clone()


def _batches(targets: Rows, settings: TeacherSection, seed: tuple[int, ...]) -> list[Rows]:
    """The seeded order of an epoch, in batches."""
    order = epoch_order(targets, settings.sampler, np.random.default_rng(seed))
    return [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]


def _with_empty(drawn: Iterator[Batch], batches: Sequence[Rows], size: int) -> Iterator[Batch]:
    """What was drawn for the batches that have rows, and nothing for the others: more processes than rows."""
    for rows in batches:
        yield next(drawn) if len(rows) else np.empty((0, size, size, 3), dtype=np.uint8)
