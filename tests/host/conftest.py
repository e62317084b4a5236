"""What the host's tests share: quiet libraries, one thread, folders of drawn shapes, and a small seeded network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from eyas_host.models.factory import PixelClassifier
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from tests.support.networks import briefly_trained
from tests.support.shapes import SHAPES, Pixels, draw_folder, draw_shape

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shape_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of drawn shapes, twelve images each, PNG and JPEG. Not to be changed by a test."""
    return draw_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def shape_frames() -> Pixels:
    """Twenty prepared images of shapes, uint8 [20, 64, 64, 3]."""
    return np.stack([draw_shape(label, 100 + seed, 64, 64) for label in SHAPES for seed in range(4)])


@pytest.fixture(scope="session")
def network(shape_frames: Pixels) -> PixelClassifier:
    """A seeded mobilenetv3_small_100 for five classes whose BatchNorm has seen images and whose answers differ."""
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
    """The folded network with its int8 grid. Not to be changed by a test."""
    return prepare_qat(deploy, calibration, input_size=64).eval()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached (TEST-NET-1, RFC 5737) and an empty cache."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
