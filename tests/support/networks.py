"""Small seeded networks, briefly trained on drawn shapes."""

from __future__ import annotations

from typing import Literal

import torch

from eyas_host.models.factory import PixelClassifier, build
from tests.support.shapes import SHAPES, Pixels


def take_steps(model: torch.nn.Module, pixels: torch.Tensor, *, steps: int, rate: float) -> None:
    """Some steps on images [n, 3, h, w] of the five shapes, as many of each, one class after the other."""
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
    """A seeded network for five classes whose BatchNorm has seen images and whose answers differ."""
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
            parameter.mul_(0.3)  # sure answers hide differences, very sure ones exaggerate them
    return model.eval()
