"""Groups of channels that can only be cut together, and the cutting itself.

A residual stream, or what an expansion, its depthwise convolution, its gate and its projection share, is one group
(Fang et al., "DepGraph: Towards Any Structural Pruning", 2023; torch-pruning finds them). A cut is written down as
(layer, whether its outputs were cut, their numbers), which is enough to make it again in the unpruned network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from eyas_host.models.factory import PixelClassifier
from eyas_host.models.pruned import Cut, dependency_graph

ROUND_TO = 8
"""Channel counts stay multiples of this: what the int8 kernels want."""
MAX_PRUNED = 0.75
"""No layer loses more than this part of its channels."""

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a group: its input `rows[i]` is channel `channels[i]`."""

    layer: str
    rows: Rows
    channels: Rows


@dataclass(frozen=True)
class ChannelGroup:
    """Channels 0..`channels` - 1 that exist in several layers at once."""

    root: str
    """The layer whose outputs are named in a cut."""
    channels: int
    least: int
    """Never fewer than these are kept."""
    writers: tuple[str, ...]
    """Layers that have one output for each channel."""
    readers: tuple[Reader, ...]

    def below(self, kept: int) -> int:
        """The next smaller count of channels after `kept`: a multiple of `ROUND_TO`, or `kept` at the end."""
        return max(self.least, (kept - 1) // ROUND_TO * ROUND_TO)


def channel_groups(model: PixelClassifier, *, size: int, dense: Mapping[str, int] | None = None) -> list[ChannelGroup]:
    """The groups of a network at `size` x `size` pixels, without the classifier's outputs.

    `dense` says how many outputs each layer had before anything was cut (default: as many as now); it sets how far a
    group may shrink. Groups that touch a grouped convolution which is not depthwise are left out: they stay whole.
    """
    backbone: Any = model.backbone
    graph = dependency_graph(model, size)
    names = {module: name for name, module in backbone.named_modules()}
    groups = []
    for found in graph.get_all_groups(ignored_layers=[backbone.get_classifier()]):
        members = [item for item in found.items if isinstance(item.dep.target.module, nn.Conv2d | nn.Linear)]
        if any(_grouped(item.dep.target.module) for item in members):
            continue
        root, channels = names[found[0].dep.target.module], len(found[0].idxs)
        writers, readers = [], []
        for item in members:
            layer = item.dep.target.module
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                writers.append(names[layer])
            else:
                readers.append(Reader(names[layer], np.asarray(item.idxs), np.asarray(item.root_idxs)))
        whole = channels if dense is None else dense[root]
        least = -(-int(np.ceil(whole * (1 - MAX_PRUNED))) // ROUND_TO) * ROUND_TO
        groups.append(ChannelGroup(root, channels, min(channels, least), tuple(dict.fromkeys(writers)), tuple(readers)))
    return groups


def least_important(groups: Sequence[ChannelGroup], losses: Sequence[Floats], kept: Sequence[int]) -> list[Cut]:
    """Cuts that leave `kept[i]` channels of `groups[i]`, those whose loss costs most."""
    cuts = []
    for group, loss, count in zip(groups, losses, kept, strict=True):
        rows = np.argsort(loss, kind="stable")[: group.channels - count]
        if len(rows):
            cuts.append((group.root, True, tuple(int(row) for row in np.sort(rows))))
    return cuts


def magnitudes(model: PixelClassifier, groups: Sequence[ChannelGroup]) -> list[Floats]:
    """Sum of the squared weights that write or read each channel: float64 [channels] for each group."""
    found = []
    for group in groups:
        total = np.zeros(group.channels)
        for name in group.writers:
            weight: Any = model.backbone.get_submodule(name).weight
            total += weight.detach().double().square().flatten(1).sum(1).cpu().numpy()
        for reader in group.readers:
            weight = model.backbone.get_submodule(reader.layer).weight
            read = weight.detach().double().square().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
            np.add.at(total, reader.channels, read[reader.rows])
        found.append(total)
    return found


def _grouped(layer: nn.Module) -> bool:
    """Whether channels of a convolution belong to blocks that must stay of one size."""
    groups: int = getattr(layer, "groups", 1)
    return 1 < groups < getattr(layer, "out_channels", 1)
