"""Small seeded networks, briefly trained on drawn shapes."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models._efficientnet_blocks import SqueezeExcite

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
    _settle_statistics(model, pixels)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(0.3)  # high confidence hides differences, very high confidence exaggerates them
    return model.eval()


class TinyGated(torch.nn.Module):
    """A stem, a depthwise convolution, a squeeze-and-excite gate, a projection and a classifier: quick to compile."""

    def __init__(self, classes: int, channels: int = 16) -> None:
        super().__init__()
        self.conv_stem = torch.nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.act1 = torch.nn.ReLU()
        self.conv_dw = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.act2 = torch.nn.ReLU()
        self.se = SqueezeExcite(channels, rd_channels=8, act_layer=torch.nn.ReLU, gate_layer=torch.nn.Hardsigmoid)
        self.conv_pwl = torch.nn.Conv2d(channels, channels, 1, bias=False)
        self.bn3 = torch.nn.BatchNorm2d(channels)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Linear(channels, classes)

    def get_classifier(self) -> torch.nn.Module:
        return self.classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.se(self.act2(self.bn2(self.conv_dw(x))))
        return self.classifier(self.pool(self.bn3(self.conv_pwl(x))).flatten(1))


def tiny_gated(pixels: torch.Tensor) -> PixelClassifier:
    """A seeded `TinyGated` for the five shapes with the BatchNorm statistics of images [n, 3, h, w]."""
    torch.manual_seed(0)
    model = PixelClassifier(TinyGated(len(SHAPES)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    take_steps(model, pixels, steps=10, rate=5e-3)
    _settle_statistics(model, pixels)
    return model.eval()


def _settle_statistics(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    """Let the BatchNorm statistics of a network in training mode become those of images [n, 3, h, w]."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            model(pixels)
