"""Magnitude pruning in one step: whole channels (faster), or single weights (no faster, kept as an option).

Channels are removed until the multiply-accumulates fall to a fraction, or from every layer alike; `to_latency` prunes
to a measured latency. Pruning of single weights is NNCF's (`nncf.prune`). Cuts are recorded as a plan in JSON that
rebuilds the same network from the unpruned one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import nncf
import torch
import torch_pruning
from torch import Tensor, nn

from eyas_host.compress.prune.channels import (
    MAX_PRUNED,
    ROUND_TO,
    channel_groups,
    least_important_cuts,
    magnitude_importance,
)
from eyas_host.models.factory import PixelClassifier
from eyas_host.models.pruned import Cut, PrunePlan, cut_channels
from eyas_host.support.errors import CompressError
from eyas_host.support.quiet import quiet_tools

_STEPS = 40


def prune_channels(model: PixelClassifier, *, mac_ratio: float, size: int) -> tuple[PixelClassifier, PrunePlan]:
    """A copy of `model` with at most `mac_ratio` of its multiply-accumulates at `size` x `size` pixels.

    The classifier keeps its outputs. Raises `CompressError` if the ratio cannot be reached.
    """
    pruned = copy.deepcopy(model).cpu().eval()
    example = torch.zeros(1, 3, size, size)
    macs_before, _ = count_costs(pruned, example)
    backbone: Any = pruned.backbone
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        backbone,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=MAX_PRUNED,
        max_pruning_ratio=MAX_PRUNED,
        iterative_steps=_STEPS,
        ignored_layers=[backbone.get_classifier()],
        round_to=ROUND_TO,
    )
    macs = macs_before
    for _ in range(_STEPS):
        if macs <= mac_ratio * macs_before:
            break
        pruner.step()
        macs, _ = count_costs(pruned, example)
    else:
        raise CompressError(
            f"[prune] keep = {mac_ratio}: only {macs / macs_before:.2f} of the multiply-accumulates is reached "
            f"once every layer has lost {MAX_PRUNED:.0%} of its channels; keep more or take a smaller model"
        )
    cuts = tuple((str(name), bool(out), tuple(int(i) for i in rows)) for name, out, rows in pruner.pruning_history())
    return pruned, channel_plan(model, pruned, cuts, size=size)


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
    example = torch.zeros(1, 3, size, size)
    (macs_before, parameters_before), (macs_after, parameters_after) = (
        count_costs(model, example),
        count_costs(pruned, example),
    )
    return PrunePlan("channel", tuple(cuts), macs_before, macs_after, parameters_before, parameters_after)


def prune_weights(model: PixelClassifier, *, sparsity: float, size: int) -> tuple[PixelClassifier, PrunePlan]:
    """A copy of `model` in which NNCF set the smallest weights of each layer to zero; the classifier stays dense."""
    dense = copy.deepcopy(model).cpu().eval()
    example = torch.zeros(1, 3, size, size)
    macs, parameters_before = count_costs(dense, example)
    backbone: Any = copy.deepcopy(dense.backbone)
    head = next(name for name, module in backbone.named_modules() if module is backbone.get_classifier())
    with quiet_tools():
        masked = nncf.prune(
            backbone,
            mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL,
            ratio=sparsity,
            ignored_scope=nncf.IgnoredScope(patterns=[f".*{head}.*"]),
            examples_inputs=example,
        )
        baked: Any = nncf.strip(masked, do_copy=True, strip_format=nncf.StripFormat.IN_PLACE)
    own = dense.backbone.state_dict()
    dense.backbone.load_state_dict({name: baked.state_dict()[name] for name in own})
    _, parameters_after = count_costs(dense, example)
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


def count_costs(model: PixelClassifier, example: Tensor) -> tuple[float, int]:
    """Multiply-accumulates for the image `example` [1, 3, size, size], and the number of nonzero weights."""
    device = next(model.backbone.parameters()).device
    macs, _ = torch_pruning.utils.count_ops_and_params(model.backbone, example.to(device))
    return float(macs), sum(int((p != 0).sum()) for p in model.backbone.parameters())
