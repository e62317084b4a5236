"""What the proof on aarch64 shares: a real bundle, its golden images as files, and the differences that were seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch

from eyas_device.bundle import MANIFEST, Bundle
from eyas_host.quant.fold import DeployModel
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.host_fixtures import calibration, deploy, network, quantized, shape_frames  # noqa: F401 - fixtures
from tests.support.once import once
from tests.support.proofs import tell, teller, unless_named

from .boards import ROOT
from .drawn import write_bundle

HERE = Path(__file__).parent
DRAWN = "drawn"
TRAINED = ROOT / "runs/solar-cells/bundle"
_SIZE = 64  # of the host's test network


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only `make test-arm`, which names this folder, runs these tests: they need minutes and a built userland."""
    return unless_named(HERE, config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    tell(terminalreporter, "aarch64 beside this machine")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary."""
    return teller(request.node)


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest, shared: Path) -> Path:
    """ARM_BUNDLE, else what `make distill` left, else (or with ARM_BUNDLE=drawn) a MobileNetV3-small made here."""
    named = os.environ.get("ARM_BUNDLE") or (str(TRAINED) if (TRAINED / MANIFEST).is_file() else DRAWN)
    if named != DRAWN:
        return Path(named).resolve()

    def make(folder: Path) -> None:
        folded: DeployModel = request.getfixturevalue("deploy")
        int8: torch.nn.Module = request.getfixturevalue("quantized")
        write_bundle(folder / "bundle", folded, int8, size=_SIZE)

    return once(shared / "drawn", make) / "bundle"


@pytest.fixture(scope="session")
def images(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's golden images as PNG files: unlike drawn frames, they are answered with every confidence."""
    folder = tmp_path_factory.mktemp("images")
    for number, frame in enumerate(Bundle.open(bundle).golden().frames):
        assert cv2.imwrite(str(folder / f"{number:02d}.png"), frame)
    return folder
