"""The eyas-device wheel: small, complete, and without anything of the workstation."""

from __future__ import annotations

import pytest

from eyas_device import __version__
from tests.support.paths import ROOT
from tests.support.wheels import Wheel, build

MAX_BYTES = 1_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(ROOT / "device", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Wheel) -> None:
    assert wheel.size < MAX_BYTES
    assert wheel.packages == {"eyas_device"}
    package = ROOT / "device" / "eyas_device"
    tree = {str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file()}
    assert {name for name in wheel.files if ".dist-info/" not in name} == {
        name for name in tree if "__pycache__" not in name
    }


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "device.example.toml",
        "eyas-device.service",
        "eyas-device@.service",
        "eyas-device-update.service",
        "eyas-device-update@.service",
        "eyas-device-agent-update.path",
        "eyas-device-agent-update.service",
        "70-eyas-camera.rules",
        "telemetry/schema.json",
    ],
)
def test_files_beside_the_code_are_in_the_wheel(wheel: Wheel, name: str) -> None:
    assert f"eyas_device/{name}" in wheel.files


def test_the_metadata(wheel: Wheel) -> None:
    assert wheel.metadata["Name"] == "eyas-device"
    assert wheel.metadata["Version"] == __version__
    assert set(wheel.metadata.get_all("Provides-Extra") or []) == {"gpio", "onnx", "openvino", "tensorflow", "tflite"}
    assert wheel.entry_points.split() == ["[console_scripts]", "eyas-device", "=", "eyas_device.__main__:main"]
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.files)
    assert "eyas-device check" in str(wheel.metadata.get_payload())


def test_both_distributions_have_the_same_licence() -> None:
    assert (ROOT / "device/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
