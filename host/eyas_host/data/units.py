"""Units of a data set: images that are not independent of each other, because of a group or near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eyas_host.data.duplicates import Ints, components
from eyas_host.data.sources import LabelledImage


def unit_ids(images: Sequence[LabelledImage], clusters: Sequence[Sequence[str]], *, grouped: bool) -> Ints:
    """Unit of each image, int64 [n] from 0: images linked, transitively, by a group or a cluster have the same one.

    `clusters` are near-duplicates as sha256 hashes, also of images that are not in `images`; groups count if `grouped`.
    """
    rows = {image.sha256: row for row, image in enumerate(images)}
    links = [
        (rows[own[0]], rows[other])
        for cluster in clusters
        if (own := [s for s in cluster if s in rows])
        for other in own[1:]
    ]
    if grouped:
        first: dict[str, int] = {}
        links += [(first.setdefault(image.group, row), row) for row, image in enumerate(images) if image.group]
    if not links:
        return np.arange(len(images), dtype=np.int64)
    one, two = np.array(links, dtype=np.int64).T
    return components(len(images), one, two)
