"""Predictions that the processes of a training share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import logits_of
from eyas_host.pipeline.distributed import all_gather, local_shard, world_size


def logits_together(model: nn.Module, pixels: Batch, device: torch.device) -> npt.NDArray[np.float32]:
    """As `logits_of`, in all processes: each predicts its share of the images, and all get all logits [n, classes].

    The model is the same everywhere, BatchNorm's statistics included (`batch_norm.whole_batch_norms`).
    """
    if world_size() == 1 or len(pixels) < world_size():
        return logits_of(model, pixels, device)
    own = logits_of(model, local_shard(pixels), device)
    return np.asarray(all_gather(torch.from_numpy(own).to(device), len(pixels)).cpu().numpy())
