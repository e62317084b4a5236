"""Magnitude pruning in one step: whole channels (faster), or single weights (no faster, kept as an option).

Channels are removed until the multiply-accumulates fall to a fraction, or from every layer alike; `to_latency` prunes
to a measured latency. Pruning of single weights is NNCF's (`nncf.prune`). Cuts are recorded as a plan in JSON that
rebuilds the same network from the unpruned one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import nncf
import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.compress.prune.channels import (
    MAX_PRUNED,
    ROUND_TO,
    ChannelGroup,
    Floats,
    channel_groups,
    least_important_cuts,
    magnitude_importance,
)
from eyas_host.compress.prune.importance import channel_footprint, without_channels
from eyas_host.compress.prune.latency_model import LayerShapes, layer_shapes
from eyas_host.models.factory import PixelClassifier
from eyas_host.models.pruned import Cut, PrunePlan, cut_channels
from eyas_host.quant.fold import fold_norms
from eyas_host.support.errors import CompressError
from eyas_host.support.quiet import quiet_tools

MAC_TOLERANCE = 0.03
"""A network at most this fraction of the dense multiply-accumulates below the target is accepted."""


def prune_channels(model: PixelClassifier, *, mac_ratio: float, size: int) -> tuple[PixelClassifier, PrunePlan]:
    """A copy of `model` with at most `mac_ratio` of its multiply-accumulates at `size` x `size` pixels.

    Every layer loses about the same fraction of its channels, those of smallest squared weight in a group. The
    classifier keeps its outputs. Raises `CompressError` if the ratio cannot be reached.
    """
    groups = channel_groups(model, size=size)
    importance = magnitude_importance(model, groups)
    kept, reached = _even_widths(groups, importance, layer_shapes(model, size=size), mac_ratio)
    if reached > mac_ratio:
        raise CompressError(
            f"[prune] keep = {mac_ratio}: only {reached:.2f} of the multiply-accumulates is reached "
            f"once every layer has lost {MAX_PRUNED:.0%} of its channels; keep more or take a smaller model"
        )
    cuts = least_important_cuts(groups, importance, kept)
    pruned = cut_channels(model, cuts, size=size)
    return pruned, channel_plan(model, pruned, cuts, size=size)


def _even_widths(
    groups: Sequence[ChannelGroup], importance: Sequence[Floats], layers: LayerShapes, mac_ratio: float
) -> tuple[list[int], float]:
    """Channels that each group keeps, and the fraction of the multiply-accumulates that is left.

    One group at a time loses up to eight channels: the one that has lost the smallest fraction afterwards, among equals
    the one whose channels matter least. Near the target, steps that would go more than `MAC_TOLERANCE` beyond are left
    out while others remain.
    """
    kept = [group.channels for group in groups]
    footprints = [channel_footprint(group, layers) for group in groups]
    lost = [np.concatenate(([0.0], np.cumsum(np.sort(values)))) / max(values.sum(), 1e-30) for values in importance]
    dense, left = layers.macs.sum(), 1.0
    while left > mac_ratio:
        steps = []
        for number, group in enumerate(groups):
            after = group.below(kept[number])
            if after < kept[number]:
                smaller = without_channels(layers, footprints[number], kept[number] - after)
                removed = group.channels - after
                order = (removed / group.channels, float(lost[number][removed]), number)
                steps.append((order, after, float(smaller.macs.sum() / dense), smaller))
        if not steps:
            break
        near = [step for step in steps if step[2] >= mac_ratio - MAC_TOLERANCE]
        (_, _, number), kept_after, left, layers = min(
            near or [max(steps, key=lambda step: step[2])], key=itemgetter(0)
        )
        kept[number] = kept_after
    return kept, left


def prune_evenly(model: PixelClassifier, *, keep: float, size: int) -> tuple[PixelClassifier, PrunePlan]:
    """A copy of `model` in which every layer keeps this fraction of its channels, a multiple of 8 and at least 8.

    The channels of smallest squared weight in a group go. Raises `CompressError` if rounding leaves all of them.
    """
    groups = channel_groups(model, size=size)
    kept = [min(group.channels, max(1, round(group.channels * keep / ROUND_TO)) * ROUND_TO) for group in groups]
    cuts = tuple(least_important_cuts(groups, magnitude_importance(model, groups), kept))
    if not cuts:
        raise CompressError(
            f"[prune] keep = {keep}: rounded to multiples of {ROUND_TO}, every layer keeps all its channels; keep less"
        )
    pruned = cut_channels(model, cuts, size=size)
    return pruned, channel_plan(model, pruned, cuts, size=size)


def channel_plan(model: PixelClassifier, pruned: PixelClassifier, cuts: Sequence[Cut], *, size: int) -> PrunePlan:
    """The plan whose cuts turn `model` into `pruned`."""
    macs_before, parameters_before = count_costs(model, size=size)
    macs_after, parameters_after = count_costs(pruned, size=size)
    return PrunePlan("channel", tuple(cuts), macs_before, macs_after, parameters_before, parameters_after)


def prune_weights(model: PixelClassifier, *, sparsity: float, size: int) -> tuple[PixelClassifier, PrunePlan]:
    """A copy of `model` in which NNCF set the smallest weights of each layer to zero; the classifier stays dense.

    Weights are compared after batch normalisation was folded into them.
    """
    dense = copy.deepcopy(model).cpu().eval()
    macs, parameters_before = count_costs(dense, size=size)
    backbone: Any = fold_norms(dense.backbone)
    head = next(name for name, module in backbone.named_modules() if module is backbone.get_classifier())
    with quiet_tools():
        masked = nncf.prune(
            backbone,
            mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL,
            ratio=sparsity,
            ignored_scope=nncf.IgnoredScope(patterns=[f".*{head}.*"]),
            examples_inputs=torch.zeros(1, 3, size, size),
        )
        baked: Any = nncf.strip(masked, do_copy=True, strip_format=nncf.StripFormat.IN_PLACE)
    with torch.no_grad():
        for name, module in baked.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight: Any = dense.backbone.get_submodule(name).weight
                weight.mul_(module.weight != 0)
    _, parameters_after = count_costs(dense, size=size)
    return dense, PrunePlan("nncf", (), macs, macs, parameters_before, parameters_after)


class ZeroKeeper:
    """Keeps pruned weights at zero while the rest is trained: call it after each optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self._masks: list[tuple[Tensor, Tensor]] = [
            (parameter.data, parameter.data != 0) for parameter in model.parameters() if parameter.ndim > 1
        ]

    def __call__(self) -> None:
        """Set the pruned weights to zero again."""
        for weights, mask in self._masks:
            weights.mul_(mask)


def count_costs(model: PixelClassifier, *, size: int) -> tuple[float, int]:
    """Multiply-accumulates of an image of `size` x `size` pixels, and the number of nonzero weights."""
    macs = float(layer_shapes(model, size=size).macs.sum())
    return macs, sum(int((p != 0).sum()) for p in model.backbone.parameters())
