"""Which layers of a pretrained network train, and how fast each of them."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import group_parameters
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe.training import TeacherSection
from eyas_host.train.schedule import Epoch, epochs_without_better


def unfreeze(model: PixelClassifier, settings: TeacherSection) -> list[dict[str, object]]:
    """Freeze all but the last blocks; returns parameter groups whose `lr_scale` falls by `layer_decay` a block.

    By plateau, the blocks below the head begin at `block_rate`.
    """
    count, first = _blocks(model, settings)
    train_from(model, first)
    groups: list[dict[str, object]] = param_groups_layer_decay(
        model.backbone, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    if settings.unfreeze_by == "plateau":
        layer_of = _layers(model)
        head = {id(p) for name, p in model.backbone.named_parameters() if layer_of[name] == count}
        for group in groups:
            parameters: list[nn.Parameter] = group["params"]  # type: ignore[assignment]
            if id(parameters[0]) not in head:
                group["lr_scale"] = group["lr_scale"] / settings.layer_decay * settings.block_rate  # type: ignore[operator]
    return groups


class Unfreezing:
    """Opens blocks from the top: some at the beginning, the next ones each time that validation gets no better.

    How many are open follows from the epochs so far alone, so a resumed training goes on with the same ones. What is
    not open has no gradient, and AdamW passes over it.
    """

    def __init__(self, model: PixelClassifier, settings: TeacherSection, metric: str) -> None:
        self.model = model
        self.settings = settings
        self.metric = metric
        self.count, self.first = _blocks(model, settings)

    def __call__(self, history: Sequence[Epoch]) -> str:
        """Open what is due before the next epoch; returns the stage's name."""
        last = max(self.first, self.count - self.settings.open_blocks * self._stage(history))
        train_from(self.model, last)
        opened, blocks = self.count - last, self.count - self.first
        return f"{opened} of {blocks} blocks"

    def _stage(self, history: Sequence[Epoch]) -> int:
        """The number of the next epoch's stage, from 1."""
        stages = list(dict.fromkeys(epoch.stage for epoch in history))
        over = epochs_without_better(history, self.metric) >= self.settings.plateau_epochs
        return max(1, len(stages)) + over


def train_from(model: PixelClassifier, first: int) -> None:
    """Let train what lies at block `first` or above it, and freeze what lies below."""
    layer_of = _layers(model)
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(layer_of[name] >= first)


def freeze_batch_norm(model: nn.Module) -> None:
    """Training mode for all but BatchNorm, whose statistics stay as they came."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _layers(model: PixelClassifier) -> dict[str, int]:
    """The number of each parameter's block, counted from the input; the head has the largest."""
    backbone = model.backbone
    return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)  # type: ignore[operator, no-any-return]


def _blocks(model: PixelClassifier, settings: TeacherSection) -> tuple[int, int]:
    """The head's number, which is how many blocks lie below it, and the lowest block that may train."""
    count = max(_layers(model).values())
    return count, 0 if settings.unfreeze == "all" else max(0, count - int(settings.unfreeze))
