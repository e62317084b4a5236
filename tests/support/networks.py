"""Small seeded networks, briefly trained on drawn shapes."""

from __future__ import annotations

from typing import Literal

import torch

from eyas_host.models.factory import PixelClassifier, build
from tests.support.shapes import SHAPES, Pixels

V3_SMALL = {"activations": 97, "weights": 53, "hard_swishes": 19}
"""Quantizers and hard-swishes of timm's mobilenetv3_small_100, counted by hand from its table of blocks."""


def take_steps(model: torch.nn.Module, pixels: torch.Tensor, *, steps: int, rate: float) -> None:
    """Train for some steps on images [n, 3, h, w] of the five shapes, ordered by class, as many of each."""
    targets = torch.arange(len(SHAPES)).repeat_interleave(len(pixels) // len(SHAPES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(pixels), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def briefly_trained(
    name: str, shape_frames: Pixels, weights: Literal["packaged", "random"] = "random"
) -> PixelClassifier:
    """A seeded network for five classes with calibrated BatchNorm statistics and varied predictions."""
    torch.manual_seed(0)
    model, _ = build(name, len(SHAPES), weights)
    pixels = torch.from_numpy(shape_frames).permute(0, 3, 1, 2)
    take_steps(model, pixels, steps=12, rate=2e-3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            model(pixels)
        for parameter in model.classifier.parameters():
            parameter.mul_(0.3)  # high confidence hides differences, very high confidence exaggerates them
    return model.eval()
