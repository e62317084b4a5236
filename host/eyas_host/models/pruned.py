"""Recorded channel pruning: the plan of cuts, and the network rebuilt from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import torch
import torch_pruning

from eyas_host.models.factory import PixelClassifier

Cut = tuple[str, bool, tuple[int, ...]]
"""Layer, whether output channels were cut, their numbers at that time."""


def cut_channels(model: PixelClassifier, cuts: Iterable[Cut], *, size: int) -> PixelClassifier:
    """A copy of `model` without the channels of `cuts`, made in order."""
    pruned = copy.deepcopy(model).cpu().eval()
    dependency_graph(pruned, size).load_pruning_history([(name, out, list(rows)) for name, out, rows in cuts])
    return pruned


def dependency_graph(model: PixelClassifier, size: int) -> Any:
    """torch-pruning's dependency graph of the backbone; it traces with gradients."""
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(True)
    device = next(model.backbone.parameters()).device
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            model.backbone, example_inputs=torch.zeros(1, 3, size, size, device=device)
        )


class PrunePlan(msgspec.Struct, frozen=True):
    """The cuts of a pruning and the remaining size."""

    method: Literal["channel", "nncf", "none"]
    cuts: tuple[Cut, ...] = ()
    """channel: in order."""
    macs_before: float = 0.0
    """Multiply-accumulates per image."""
    macs_after: float = 0.0
    parameters_before: int = 0
    parameters_after: int = 0
    """Non-zero weights left."""


def rebuild_channels(model: PixelClassifier, plan: PrunePlan, *, size: int) -> PixelClassifier:
    """Apply the recorded cuts to a copy of the unpruned network, ready to load pruned weights."""
    return cut_channels(model, plan.cuts, size=size)
