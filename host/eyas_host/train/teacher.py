"""The teacher: transfer learning with staged unfreezing.

Stage 1 trains the head alone on the frozen backbone's features, which are computed once. Stage 2 trains the last blocks
too, each slower than the one above it; BatchNorm keeps the statistics it came with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timm.models import group_parameters
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from eyas_host.data.split import Split
from eyas_host.data.views import Augmenter, Batch, prepared
from eyas_host.recipe import Recipe, TeacherSection
from eyas_host.train.loop import Epoch, Schedule, fit, logits_of, pick_device, to_tensor, validation_figures
from eyas_host.train.losses import teacher_loss
from eyas_host.train.models import Origin, PixelClassifier, build_teacher, move
from eyas_host.train.sampler import Rows, epoch_order

_HEAD_ROUNDS = 3
"""Views a picture whose features stage 1 caches."""


def train_teacher(recipe: Recipe, split: Split, work: Path) -> tuple[PixelClassifier, Origin, dict[str, list[Epoch]]]:
    """Train the teacher; checkpoints go to `work`.

    Returns the model, where its first weights came from, and the histories of both stages.
    """
    settings, seed = recipe.teacher, recipe.run.seed
    device = pick_device(recipe.run.device)
    torch.manual_seed(seed)
    model, origin = build_teacher(settings, len(split.labels))
    model = move(model, device)
    augmenter = Augmenter(recipe.augment, recipe.picture.preprocessing())
    validation = prepared(split.validation.pixels, augmenter.spec)
    targets = torch.from_numpy(split.train.targets).to(device)
    loss_of = teacher_loss(recipe, targets, len(split.labels))

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        return validation_figures(logits_of(candidate, validation, device), split.validation.targets)

    features = [
        _features(
            model,
            augmenter.views(split.train.pixels, (seed, 1, number), strength=augmenter.strength(0), mixed=False),
            device,
        )
        for number in range(_HEAD_ROUNDS)
    ]
    held_out = _features(model, validation, device)
    classifier = model.classifier

    def head_steps(epoch: int) -> Iterator[Tensor]:
        for rows in _batches(split.train.targets, settings, (seed, 2, epoch)):
            yield loss_of(classifier(features[epoch % _HEAD_ROUNDS][rows]), targets[rows])

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
            epochs=settings.head_epochs, rate=settings.head_rate, weight_decay=settings.weight_decay, seed=seed
        ),
        steps_an_epoch=a_pass,
        checkpoint=work / "head.ckpt",
        title="teacher, head",
    )
    groups = unfreeze(model, settings)

    def steps(epoch: int) -> Iterator[Tensor]:
        views = augmenter.views(split.train.pixels, (seed, 3, epoch), strength=augmenter.strength(epoch), mixed=False)
        for rows in _batches(split.train.targets, settings, (seed, 4, epoch)):
            yield loss_of(model(to_tensor(views[rows.numpy()], device)), targets[rows])

    blocks = fit(
        model,
        groups,
        steps=steps,
        evaluate=evaluate,
        schedule=Schedule(
            epochs=settings.epochs,
            rate=settings.rate,
            weight_decay=settings.weight_decay,
            patience=settings.patience,
            seed=seed,
        ),
        steps_an_epoch=a_pass,
        checkpoint=work / "blocks.ckpt",
        title="teacher, blocks",
        prepare=freeze_batch_norm,
    )
    return model, origin, {"head": head, "blocks": blocks}


def unfreeze(model: PixelClassifier, settings: TeacherSection) -> list[dict[str, object]]:
    """Freeze all but the last blocks; returns parameter groups whose `lr_scale` falls by `layer_decay` a block."""
    backbone = model.backbone
    layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    count = max(layers.values()) + 1
    first = 0 if settings.unfreeze == "all" else max(0, count - 1 - int(settings.unfreeze))
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(layers[name] >= first)
    groups: list[dict[str, object]] = param_groups_layer_decay(
        backbone, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    return groups


def freeze_batch_norm(model: nn.Module) -> None:
    """Training mode for all but BatchNorm, whose statistics stay as they came."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@torch.inference_mode()
def _features(model: PixelClassifier, pixels: Batch, device: torch.device, batch: int = 64) -> Tensor:
    model.eval()
    parts = [model.pooled(to_tensor(pixels[i : i + batch], device)) for i in range(0, len(pixels), batch)]
    return torch.cat(parts).clone()


def _batches(targets: Rows, settings: TeacherSection, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """The seeded order of an epoch, in batches."""
    order = epoch_order(targets, settings.sampler, np.random.default_rng(seed))
    for start in range(0, len(order), settings.batch):
        yield torch.from_numpy(order[start : start + settings.batch])
