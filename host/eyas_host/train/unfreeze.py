"""Freezing of a pretrained network's layers, and their learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe.training import TeacherSection
from eyas_host.train.schedule import Epoch, epochs_without_improvement


def unfreeze(model: PixelClassifier, settings: TeacherSection) -> list[dict[str, object]]:
    """Freeze all but the last blocks; returns parameter groups whose `lr_scale` decays by `layer_decay` per block.

    With `unfreeze_by = "plateau"` the blocks below the head start at `block_rate`.
    """
    count, first = _block_range(model, settings)
    train_from(model, first)
    groups: list[dict[str, object]] = param_groups_layer_decay(
        model.backbone, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    if settings.unfreeze_by == "plateau":
        layer_of = _block_of_parameter(model)
        head = {id(p) for name, p in model.backbone.named_parameters() if layer_of[name] == count}
        for group in groups:
            parameters: list[nn.Parameter] = group["params"]  # type: ignore[assignment]
            if id(parameters[0]) not in head:
                group["lr_scale"] = group["lr_scale"] / settings.layer_decay * settings.block_rate  # type: ignore[operator]
    return groups


class GradualUnfreezing:
    """Unfreezes blocks from the top: some at the beginning, the next ones whenever validation stops improving.

    The number of unfrozen blocks depends only on the history, so that a resumed training continues with the same ones.
    Frozen parameters have no gradient, and AdamW skips them.
    """

    def __init__(self, model: PixelClassifier, settings: TeacherSection, metric: str) -> None:
        self.model = model
        self.settings = settings
        self.metric = metric
        self.count, self.first = _block_range(model, settings)

    def __call__(self, history: Sequence[Epoch]) -> str:
        """Unfreeze the blocks due before the next epoch and return the stage's name."""
        last = max(self.first, self.count - self.settings.open_blocks * self._stage(history))
        train_from(self.model, last)
        return f"{self.count - last} of {self.count - self.first} blocks"

    def _stage(self, history: Sequence[Epoch]) -> int:
        """Number of the next epoch's stage, from 1."""
        stages = list(dict.fromkeys(epoch.stage for epoch in history))
        next_stage = epochs_without_improvement(history, self.metric) >= self.settings.plateau_epochs
        return max(1, len(stages)) + next_stage


def train_from(model: PixelClassifier, first: int) -> None:
    """Unfreeze block `first` and all above it, and freeze all below."""
    layer_of = _block_of_parameter(model)
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(layer_of[name] >= first)


def freeze_batch_norm(model: nn.Module) -> None:
    """Training mode for all layers but BatchNorm, whose statistics stay frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _block_of_parameter(model: PixelClassifier) -> dict[str, int]:
    """Block number of each parameter, counted from the input; the head has the largest."""
    backbone = model.backbone
    return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)  # type: ignore[operator, no-any-return]


def _block_range(model: PixelClassifier, settings: TeacherSection) -> tuple[int, int]:
    """The head's block number (the number of blocks below it), and the lowest block that may train."""
    count = max(_block_of_parameter(model).values())
    return count, 0 if settings.unfreeze == "all" else max(0, count - int(settings.unfreeze))
