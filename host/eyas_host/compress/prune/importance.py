"""Channel importance and the order of pruning: which channels cost the least accuracy per millisecond saved.

Importance is estimated by the first-order Taylor expansion at the weights that read a channel (Molchanov et al.,
"Importance Estimation for Neural Network Pruning", 2019): removing the channel sets those weights to zero, which
changes the loss by about -sum(w * dL/dw).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from eyas_host.compress.prune.channels import ChannelGroup, Floats
from eyas_host.compress.prune.latency_model import LatencyModel, LayerShapes
from eyas_host.models.factory import PixelClassifier

_MIN_SAVING = 1e-9
"""Milliseconds."""


class Step(NamedTuple):
    """The network after one more cut of up to eight channels."""

    kept: tuple[int, ...]
    """Channels left in each group."""
    ms: float
    """Predicted latency."""
    loss: float
    """Estimated increase of the loss by all cuts so far."""


def taylor_importance(model: PixelClassifier, groups: Sequence[ChannelGroup], losses: Iterable[Tensor]) -> list[Floats]:
    """Estimated change of the loss when each channel is removed: float64 [channels] per group.

    `losses` yields the scalar loss of one batch after the other; the result is the mean absolute estimate over batches.
    """
    importance = [np.zeros(group.channels) for group in groups]
    batches = 0
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward()
        batches += 1
        for group, total in zip(groups, importance, strict=True):
            change = np.zeros(group.channels)
            for reader in group.readers:
                weight: Any = model.backbone.get_submodule(reader.layer).weight
                read = (weight.detach() * weight.grad).double().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
                np.add.at(change, reader.channels, read[reader.rows])
            total += np.abs(change)
    model.zero_grad(set_to_none=True)
    return [total / max(1, batches) for total in importance]


def cheapest_cuts(
    groups: Sequence[ChannelGroup], importance: Sequence[Floats], layers: LayerShapes, latency: LatencyModel
) -> Iterator[Step]:
    """Yield the network as it is, then one greedy step after the other until every group is at its minimum.

    Each step prunes the least important channels of one group down to the next multiple of eight: in the group with the
    lowest loss per millisecond saved. Predicted milliseconds never rise from step to step.
    """
    kept = [group.channels for group in groups]
    removed = [channel_footprint(group, layers) for group in groups]
    cost = [np.concatenate(([0.0], np.cumsum(np.sort(values)))) for values in importance]
    ms, total = latency.ms(layers), 0.0
    yield Step(tuple(kept), ms, total)
    while True:
        choices = []
        for number, group in enumerate(groups):
            after = group.below(kept[number])
            if after < kept[number]:
                smaller = without_channels(layers, removed[number], kept[number] - after)
                loss = float(cost[number][group.channels - after] - cost[number][group.channels - kept[number]])
                left = latency.ms(smaller)
                choices.append((loss / max(ms - left, _MIN_SAVING), number, after, left, loss))
        if not choices:
            return
        _, number, after, ms, loss = min(choices)
        layers = without_channels(layers, removed[number], kept[number] - after)
        kept[number] = after
        total += loss
        yield Step(tuple(kept), ms, total)


def channel_footprint(group: ChannelGroup, layers: LayerShapes) -> tuple[Floats, Floats]:
    """Inputs and outputs that each layer loses with one channel of the group: float64 [layers] each."""
    inputs, outputs = np.zeros(len(layers.names)), np.zeros(len(layers.names))
    reads = {reader.layer: len(reader.rows) / group.channels for reader in group.readers}
    for index, name in enumerate(layers.names):
        outputs[index] = name in group.writers
        inputs[index] = outputs[index] if layers.depthwise[index] else reads.get(name, 0.0)
    return inputs, outputs


def without_channels(layers: LayerShapes, footprint: tuple[Floats, Floats], channels: int) -> LayerShapes:
    """Layer shapes after removing `channels` channels of the group with this footprint."""
    inputs, outputs = footprint
    return replace(layers, inputs=layers.inputs - channels * inputs, outputs=layers.outputs - channels * outputs)
