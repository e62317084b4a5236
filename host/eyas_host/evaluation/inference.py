"""Inference with torch networks on prepared images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.transforms import Batch
from eyas_host.support.errors import TrainError


def to_tensor(pixels: Batch, device: torch.device) -> Tensor:
    """uint8 [n, s, s, 3] pixels as a uint8 [n, 3, s, s] tensor (channels last in memory)."""
    return torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)


def logits_of(
    model: nn.Module, pixels: Batch, device: torch.device, batch: int = 64
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits float32 [n, classes] of prepared pixels uint8 [n, s, s, 3]; the model is put into evaluation mode."""
    model.eval()
    with full_float32():
        batches = [forward(model, pixels[i : i + batch], device) for i in range(0, len(pixels), batch)]
        return np.asarray(torch.cat(batches).cpu().numpy())


@torch.inference_mode()
def forward(model: nn.Module, pixels: Batch, device: torch.device) -> Tensor:
    """Logits float32 [n, classes] on `device`, in one pass; the model is in evaluation mode."""
    logits: Tensor = model(to_tensor(pixels, device).float())
    return logits.float()


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in 24 bits on a GPU too: TF32's 11 bits would add an error to every comparison."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for an operation; restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, `cuda` or `cpu` to a torch device. Raises `TrainError` for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("[run] device = 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
