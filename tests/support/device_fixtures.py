"""Fixtures for every test that wants a tiny real bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from eyas_device.bundle import MANIFEST
from tests.support import tiny
from tests.support.bundles import record_settings
from tests.support.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="session")
def weights() -> tuple[tiny.Floats, tiny.Floats]:
    """Weights and bias of the tiny classifier."""
    return tiny.fit()


@pytest.fixture(scope="session")
def pristine_bundle(tmp_path_factory: pytest.TempPathFactory, weights: tuple[tiny.Floats, tiny.Floats]) -> Path:
    """A bundle for every runtime; the golden probabilities come from plain numpy, not from a runtime."""
    return write_tiny_bundle(tmp_path_factory.mktemp("pristine") / "bundle", weights)


@pytest.fixture
def bundle_root(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own, to be spoilt."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_manifest(bundle_root: Path) -> Callable[..., None]:
    """Overwrite top-level fields of the manifest, as packing would; a field set to `...` is removed."""

    def edit(**fields: object) -> None:
        path = bundle_root / MANIFEST
        content = {**msgspec.json.decode(path.read_bytes()), **fields}
        path.write_bytes(msgspec.json.encode({k: v for k, v in content.items() if v is not ...}))
        record_settings(bundle_root)

    return edit
