"""Where a millisecond costs least accuracy: which channels to cut next.

The loss of a channel is estimated by the first-order Taylor expansion at the weights that read it (Molchanov et al.,
"Importance Estimation for Neural Network Pruning", 2019): without the channel those weights might as well be zero,
which changes the loss by about -sum(w * dL/dw).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from eyas_host.compress.prune.channels import ChannelGroup, Floats
from eyas_host.compress.prune.latency_model import LatencyModel, Layers
from eyas_host.models.factory import PixelClassifier

_LEAST_SAVING = 1e-9
"""Milliseconds."""


class Step(NamedTuple):
    """One more cut of up to eight channels."""

    kept: tuple[int, ...]
    """Channels left in each group."""
    ms: float
    """Predicted."""
    loss: float
    """Estimated, of all cuts so far."""


def channel_losses(model: PixelClassifier, groups: Sequence[ChannelGroup], losses: Iterable[Tensor]) -> list[Floats]:
    """Estimated change of the loss without each channel: float64 [channels] for each group.

    `losses` yields the scalar loss of one batch after the other; the estimate of a batch is taken without its sign,
    and the mean of the batches is returned.
    """
    found = [np.zeros(group.channels) for group in groups]
    batches = 0
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        batches += 1
        for group, total in zip(groups, found, strict=True):
            change = np.zeros(group.channels)
            for reader in group.readers:
                weight: Any = model.backbone.get_submodule(reader.layer).weight
                read = (weight.detach() * weight.grad).double().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
                np.add.at(change, reader.channels, read[reader.rows])
            total += np.abs(change)
    model.zero_grad(set_to_none=True)
    return [total / max(1, batches) for total in found]


def cheapest_cuts(
    groups: Sequence[ChannelGroup], losses: Sequence[Floats], layers: Layers, latency: LatencyModel
) -> Iterator[Step]:
    """The network as it is, then one step after the other until every group is at its least.

    Each step takes, in one group, the channels of least loss down to the next multiple of eight: in the group where the
    loss per millisecond saved is least. Predicted milliseconds never rise from step to step.
    """
    kept = [group.channels for group in groups]
    lost = [_lost_with(group, layers) for group in groups]
    cost = [np.concatenate(([0.0], np.cumsum(np.sort(loss)))) for loss in losses]
    ms, total = latency.ms(layers), 0.0
    yield Step(tuple(kept), ms, total)
    while True:
        choices = []
        for number, group in enumerate(groups):
            after = group.below(kept[number])
            if after < kept[number]:
                smaller = _without(layers, lost[number], kept[number] - after)
                loss = float(cost[number][group.channels - after] - cost[number][group.channels - kept[number]])
                left = latency.ms(smaller)
                choices.append((loss / max(ms - left, _LEAST_SAVING), number, after, left, loss))
        if not choices:
            return
        _, number, after, ms, loss = min(choices)
        layers = _without(layers, lost[number], kept[number] - after)
        kept[number] = after
        total += loss
        yield Step(tuple(kept), ms, total)


def _lost_with(group: ChannelGroup, layers: Layers) -> tuple[Floats, Floats]:
    """Inputs and outputs that each layer loses with one channel of a group: float64 [layers] each."""
    inputs, outputs = np.zeros(len(layers.names)), np.zeros(len(layers.names))
    reads = {reader.layer: len(reader.rows) / group.channels for reader in group.readers}
    for place, name in enumerate(layers.names):
        outputs[place] = name in group.writers
        inputs[place] = outputs[place] if layers.depthwise[place] else reads.get(name, 0.0)
    return inputs, outputs


def _without(layers: Layers, lost: tuple[Floats, Floats], channels: int) -> Layers:
    """The layers without so many channels of the group that `lost` is of."""
    return replace(layers, inputs=layers.inputs - channels * lost[0], outputs=layers.outputs - channels * lost[1])
