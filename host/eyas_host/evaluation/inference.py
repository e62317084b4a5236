"""Inference with torch networks on prepared images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.transforms import Batch
from eyas_host.support.errors import TrainError


def to_tensor(pixels: Batch, device: torch.device) -> Tensor:
    """uint8 [n, s, s, 3] pixels as a uint8 [n, 3, s, s] tensor (channels last in memory)."""
    return torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)


@torch.inference_mode()
def logits_of(
    model: nn.Module, pixels: Batch, device: torch.device, batch: int = 64
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits float32 [n, classes] of prepared pixels uint8 [n, s, s, 3]; the model is put into evaluation mode."""
    model.eval()
    batches = [model(to_tensor(pixels[i : i + batch], device).float()) for i in range(0, len(pixels), batch)]
    return np.asarray(torch.cat(batches).float().cpu().numpy())


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, `cuda` or `cpu` to a torch device. Raises `TrainError` for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("[run] device = 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
