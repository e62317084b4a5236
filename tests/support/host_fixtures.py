"""Fixtures for tests that need a small network, in float or int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eyas_host.models.factory import PixelClassifier
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from tests.support.networks import briefly_trained
from tests.support.shapes import SHAPES, Pixels, draw_shape


@pytest.fixture(scope="session")
def shape_frames() -> Pixels:
    """Twenty prepared images of shapes, uint8 [20, 64, 64, 3]."""
    return np.stack([draw_shape(label, 100 + seed, 64, 64) for label in SHAPES for seed in range(4)])


@pytest.fixture(scope="session")
def network(shape_frames: Pixels) -> PixelClassifier:
    """A seeded mobilenetv3_small_100 for five classes, briefly trained."""
    return briefly_trained("mobilenetv3_small_100", shape_frames)


@pytest.fixture(scope="session")
def deploy(network: PixelClassifier) -> DeployModel:
    """The folded network. Not to be changed by a test."""
    return fold_for_deployment(network)


@pytest.fixture(scope="session")
def calibration(shape_frames: Pixels) -> list[torch.Tensor]:
    """Ten images, float [1, 3, 64, 64]."""
    return [torch.from_numpy(frame).permute(2, 0, 1)[None].float() for frame in shape_frames[::2]]


@pytest.fixture(scope="session")
def quantized(deploy: DeployModel, calibration: list[torch.Tensor]) -> torch.nn.Module:
    """The folded network as a QAT model. Not to be changed by a test."""
    return prepare_qat(deploy, calibration, input_size=64).eval()
