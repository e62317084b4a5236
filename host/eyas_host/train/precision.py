"""Numeric precision of a training: mixed precision, loss scaling, and TF32 on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from eyas_host.support.errors import TrainError

Amp = Literal["auto", "no", "bf16", "fp16"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_amp(amp: Amp, device: torch.device) -> Amp:
    """`auto` is bf16 on a GPU that computes it natively, else no mixed precision.

    Raises `TrainError` if the device does not support the precision.
    """
    if amp == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "no"
    if amp == "fp16" and device.type != "cuda":
        raise TrainError("[run] amp = 'fp16' needs a GPU, and this training runs on the processor; take 'bf16' or 'no'")
    return amp


class Precision:
    """Mixed precision of one training: autocast of forward passes and, with fp16, loss scaling."""

    def __init__(self, amp: Amp, device: torch.device) -> None:
        self.amp = resolve_amp(amp, device)
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type) if self.amp == "fp16" else None

    def autocast(self) -> torch.autocast:
        """Compute matrix products and convolutions in 16 bits inside this context; losses stay float32."""
        return torch.autocast(self.device.type, dtype=_TYPES.get(self.amp), enabled=self.amp != "no")

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the loss's gradients, scaled with fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights; with fp16 a step whose gradients overflowed is skipped."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()


@contextmanager
def fast_gpu_math(device: torch.device) -> Iterator[None]:
    """On a GPU, use TF32 for float32 products and let cuDNN time its algorithms; restored at the end."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]
