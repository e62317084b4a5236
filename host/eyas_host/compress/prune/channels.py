"""Groups of channels that can only be pruned together.

The channels of a residual stream form one group, and so do those shared by an expansion, its depthwise convolution, its
gate and its projection (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023; torch-pruning finds them). A cut
is recorded as (layer, whether its outputs were cut, channel indices), enough to repeat it in the unpruned network.
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
from eyas_host.quant.fold import fold_norms

ROUND_TO = 8
"""Channel counts stay multiples of this, as int8 kernels prefer."""
MAX_PRUNED = 0.75
"""No layer loses more than this fraction of its channels."""

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's channels: its input `rows[i]` is channel `channels[i]` of the group."""

    layer: str
    rows: Rows
    channels: Rows


@dataclass(frozen=True)
class ChannelGroup:
    """Channels 0..`channels` - 1 that several layers share."""

    root: str
    """The layer that a cut names."""
    channels: int
    min_kept: int
    """Channels that are always kept."""
    writers: tuple[str, ...]
    """Layers with one output per channel."""
    readers: tuple[Reader, ...]

    def below(self, kept: int) -> int:
        """The next smaller channel count after `kept`: a multiple of `ROUND_TO`, or `kept` once nothing may go."""
        return max(self.min_kept, (kept - 1) // ROUND_TO * ROUND_TO)


def channel_groups(model: PixelClassifier, *, size: int, dense: Mapping[str, int] | None = None) -> list[ChannelGroup]:
    """Find a network's channel groups at `size` x `size` pixels, the classifier's outputs excluded.

    `dense` maps each layer to its outputs before any pruning (default: its outputs now) and limits how far a group may
    shrink. Groups that touch a grouped convolution other than a depthwise one are left out and stay as they are.
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
        original = channels if dense is None else dense[root]
        minimum = min(channels, -(-int(np.ceil(original * (1 - MAX_PRUNED))) // ROUND_TO) * ROUND_TO)
        groups.append(ChannelGroup(root, channels, minimum, tuple(dict.fromkeys(writers)), tuple(readers)))
    return groups


def least_important_cuts(
    groups: Sequence[ChannelGroup], importance: Sequence[Floats], kept: Sequence[int]
) -> list[Cut]:
    """Prune the lowest-importance channels down to `kept[i]` in `groups[i]`."""
    cuts = []
    for group, values, count in zip(groups, importance, kept, strict=True):
        rows = np.argsort(values, kind="stable")[: group.channels - count]
        if len(rows):
            cuts.append((group.root, True, tuple(int(row) for row in np.sort(rows))))
    return cuts


def magnitude_importance(model: PixelClassifier, groups: Sequence[ChannelGroup]) -> list[Floats]:
    """Sum of the squared weights that write or read each channel: float64 [channels] per group.

    Batch normalisation is folded into the weights first: the scale of a filter in front of it is arbitrary.
    """
    backbone = fold_norms(model.backbone)
    importance = []
    for group in groups:
        total = np.zeros(group.channels)
        for name in group.writers:
            weight: Any = backbone.get_submodule(name).weight
            total += weight.detach().double().square().flatten(1).sum(1).cpu().numpy()
        for reader in group.readers:
            weight = backbone.get_submodule(reader.layer).weight
            read = weight.detach().double().square().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
            np.add.at(total, reader.channels, read[reader.rows])
        importance.append(total)
    return importance


def _grouped(layer: nn.Module) -> bool:
    """Whether a convolution is grouped but not depthwise: its groups must keep equal sizes."""
    groups: int = getattr(layer, "groups", 1)
    return 1 < groups < getattr(layer, "out_channels", 1)
