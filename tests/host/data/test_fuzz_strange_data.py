"""A slice of `benchmarks/strange_data.py`: no traceback and no image lost in silence, and faults would be seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from eyas_device.support import image_files
from tests.support.paths import ROOT


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("sides.strange_data")


@pytest.mark.parametrize(("kind", "count"), [("trees", 50), ("tables", 40), ("images", 25)])
def test_nothing_ends_in_a_traceback_or_is_lost_in_silence(kind: str, count: int, strange: ModuleType) -> None:
    outcome = getattr(strange, f"random_{kind}")(count)
    assert outcome.tracebacks == []
    assert outcome.losses == []
    assert outcome.examples >= count
    assert outcome.accepted > 0


def test_a_lister_that_loses_images_is_found(strange: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., image_files.Listing] = image_files.list_image_files

    def forgetful(root: Path, **more: object) -> image_files.Listing:
        listing = real(root, **more)
        return listing._replace(images=listing.images[1:])

    monkeypatch.setattr(strange, "list_image_files", forgetful)
    assert strange.random_trees(3).losses


def test_an_error_that_is_no_message_is_found(strange: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(strange, "inspect_folder", broken)
    assert len(strange.random_trees(3).tracebacks) >= 3
