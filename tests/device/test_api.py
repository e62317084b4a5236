"""The public API of `eyas_device`: its names, how cheap it is to import, and the examples in its docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

import eyas_device
from eyas_device import errors
from tests.support.doctests import run_examples
from tests.support.tiny import draw_shape

ERRORS = {
    name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.EyasError)
}
NAMES = ("Bundle", "Classifier", "open_camera", "prepare")
HEAVY = ("cv2", "msgspec", "numpy", "paho", "eyas_host")


def test_the_public_names() -> None:
    assert set(eyas_device.__all__) == {*NAMES, *ERRORS, "__version__"}
    assert len(ERRORS) > 5
    assert set(eyas_device.__all__) <= set(dir(eyas_device))


@pytest.mark.parametrize("name", eyas_device.__all__)
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(eyas_device, name)
    assert name == "__version__" or (value.__name__ == name and value.__doc__)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'eyas_device' has no attribute 'classifier'"):
        eyas_device.classifier  # type: ignore[attr-defined]  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, eyas_device; print(*sys.modules); dir(eyas_device); eyas_device.EyasError"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "eyas_device" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_the_examples_run(
    name: str | None, pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/bundle").symlink_to(pristine_bundle)
    assert cv2.imwrite("cross.png", draw_shape("cross", 1))
    assert run_examples(eyas_device, name) > 0
