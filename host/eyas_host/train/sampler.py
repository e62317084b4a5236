"""Order of the training images within an epoch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import WeightedRandomSampler

from eyas_host.recipe.types import SamplerName

Rows = npt.NDArray[np.int64]


def epoch_order(labels: npt.ArrayLike, sampler: SamplerName, rng: np.random.Generator) -> Rows:
    """Row indices of one epoch, as many as there are labels [n].

    `shuffled`: each row once. `balanced`: drawn with replacement, each non-empty class with equal probability; an epoch
    omits images of large classes and repeats those of small ones.
    """
    labels = np.asarray(labels)
    if sampler == "shuffled":
        return rng.permutation(len(labels))
    weights = 1.0 / np.bincount(labels)[labels]
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    return np.fromiter(WeightedRandomSampler(weights.tolist(), len(labels), generator=generator), np.int64, len(labels))
