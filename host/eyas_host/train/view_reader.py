"""Batches of cached views on the training device, read ahead by worker processes where the device is a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eyas_host.data.loader import Prefetcher, Rows, worker_count
from eyas_host.data.transforms import Batch
from eyas_host.pipeline.distributed import local_shard
from eyas_host.recipe.run import RunSection
from eyas_host.train.feature_distillation import BlockCache
from eyas_host.train.view_cache import ViewCache

_MAX_WORKERS = 4
"""Reading copies from the page cache; more processes do not feed a GPU faster."""


class ViewBatch(NamedTuple):
    """Cached views with their labels and the teacher's outputs, on the training device."""

    pixels: Tensor
    """uint8 [m, 3, s, s]: this process's shard of the batch, channels last in memory."""
    labels: Tensor
    """float32 [n, classes]."""
    logits: Tensor
    """The teacher's, float32 [n, classes]."""
    features: Tensor
    """The teacher's pooled features, float32 [n, channels]; [n, 0] where nobody asked for them."""
    maps: list[Tensor]
    """The teacher's feature maps of each feature layer, float32 [n, channels, g, g]."""


class ViewReader:
    """Reads batches of views; the teacher's features and maps only where they are wanted.

    On a processor the training process reads by itself: a batch is a copy from the page cache.
    """

    def __init__(
        self, cache: ViewCache, run: RunSection, device: torch.device, *, features: bool, blocks: BlockCache | None
    ) -> None:
        self.device = device
        self._cache, self._features, self._blocks = cache, features, blocks
        workers = min(_MAX_WORKERS, worker_count(run)) if device.type == "cuda" else 0
        self._pixels = Prefetcher(self._load_pixels, workers)
        self._batches = Prefetcher(self._load, workers)

    def pixels(self, batches: Sequence[tuple[Rows, Rows]]) -> Iterator[Tensor]:
        """Pixels of this process's shard of each batch of (view, row) indices: uint8 [m, 3, s, s]."""
        for pixels in self._pixels([_shard(*batch) for batch in batches]):
            yield self._move(pixels).permute(0, 3, 1, 2)

    def batches(self, batches: Sequence[tuple[Rows, Rows]]) -> Iterator[ViewBatch]:
        """Each batch of (view, row) indices with labels and the teacher's outputs."""
        for pixels, *others in self._batches([(*batch, *_shard(*batch)) for batch in batches]):
            labels, logits, features, *maps = (self._move(values).float() for values in others)
            yield ViewBatch(self._move(pixels).permute(0, 3, 1, 2), labels, logits, features, maps)

    def _load_pixels(self, shard: tuple[Rows, Rows]) -> Batch:
        return self._cache.pixels(*shard)

    def _load(self, item: tuple[Rows, Rows, Rows, Rows]) -> tuple[npt.NDArray[Any], ...]:
        views, rows, *shard = item
        cache = self._cache
        features = cache.features[views, rows] if self._features else np.empty((len(rows), 0), dtype=np.float16)
        maps = self._blocks.maps(views, rows) if self._blocks is not None else []
        return cache.pixels(*shard), cache.labels[views, rows], cache.logits[views, rows], features, *maps

    def _move(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)


def _shard(views: Rows, rows: Rows) -> tuple[Rows, Rows]:
    return local_shard(views), local_shard(rows)
