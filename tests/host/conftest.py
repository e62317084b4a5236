"""What the host's tests share: quiet libraries, one thread, folders of drawn shapes, and a small seeded network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import constants

from eyas_host.stages.estimate import Counts, Speed
from tests.support.host_fixtures import calibration, deploy, network, quantized, shape_frames  # noqa: F401 - fixtures
from tests.support.shapes import draw_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_measurement() -> Iterator[None]:
    """Runs of some seconds need no measurement of this machine for their plan; `test_plan` measures for real."""
    speed = Speed(read=0.001, view=0.001, teacher=0.01, teacher_step=0.03, student=0.002, student_step=0.006)
    with mock.patch("eyas_host.stages.plan._measured", return_value=(Counts(70, 15, 15), speed)):
        yield


@pytest.fixture(scope="session")
def shape_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of drawn shapes, twelve images each, PNG and JPEG. Not to be changed by a test."""
    return draw_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached (TEST-NET-1, RFC 5737) and an empty cache."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("eyas_host.models.hub._SILENT", {})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
