"""Checks that try real models and cameras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from eyas_device.doctor import Context, probes
from eyas_device.updates.slots import Slots
from tests.support.doctor_parts import context, versions


def test_a_runtime_without_a_bundle_is_imported(tmp_path: Path) -> None:
    finding = probes.runtime("litert")(context(tmp_path))
    assert finding.status == "green" and "can be imported" in finding.text


def test_a_runtime_that_is_not_installed_is_not_checked() -> None:
    assert probes.runtime("tflite")(context(version=versions())).status == "grey"


def test_a_runtime_that_is_installed_and_broken_is_red_unless_another_is_used() -> None:
    settings = context(version=versions(tflite_runtime="2.14.0"))
    finding = probes.runtime("tflite")(settings)  # the real job: tflite-runtime is not there to be imported
    assert finding.status == "red" and "tflite-runtime 2.14.0: runtime tflite cannot be used" in finding.text
    used = replace(settings.config, model=replace(settings.config.model, runtime="litert"))
    other = Context(config=used, version=settings.version)
    assert probes.runtime("tflite")(other).status == "yellow"


def test_golden_names_the_artefacts_that_fail(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(confidence={"temperature": 30.0})  # and packed so, but for the probabilities
    finding = probes.golden(context(bundle=bundle_root))
    assert finding.status == "red" and "litert-int8 failed the golden check: a probability differs" in finding.text


def test_golden_of_a_damaged_bundle(bundle_root: Path) -> None:
    (bundle_root / "onnx-fp32.onnx").write_bytes(b"altered")
    finding = probes.golden(context(bundle=bundle_root))
    assert finding.status == "red" and "differs from what the manifest records" in finding.text


def test_golden_reads_the_current_slot(pristine_bundle: Path, tmp_path: Path) -> None:
    nothing = probes.golden(context(tmp_path))
    assert nothing.status == "grey" and "no good slot" in nothing.text
    assert probes.golden(context(tmp_path, config_path=tmp_path)).status == "red", "a device that is set up needs one"
    slot = Slots(tmp_path).install(pristine_bundle, check=lambda root: None)
    finding = probes.golden(context(tmp_path))
    assert finding.status == "green" and str(slot) in finding.text


@pytest.mark.parametrize(
    ("spec", "status", "message"),
    [
        ("", "grey", "no camera is configured"),
        ("fake:?frames=5&size=320x240", "green", "5 frames of 320 x 240, as fast as it is read"),
        ("fake:?live=1&fps=20&frames=12", "green", " fps"),
        ("fake:?frames=6&junk=1,2", "yellow", "2 unreadable"),
        ("fake:?frames=6&junk=0", "yellow", "1 unreadable"),
        ("fake:?frames=2&junk=0,1", "red", "delivered no readable frame (2 unreadable)"),
        ("fake:?frames=6&black=0-5", "yellow", "black"),
        ("fake:?frames=6&black=1-5", "green", "6 frames"),
        ("fake:?live=1&frames=6&fps=50&frozen=0-5", "red", "frozen"),
        ("fake:?frames=0", "red", "delivered no readable frame"),
        ("fake:?lost=0", "red", "lost at frame 0"),
        ("fake:?hang=0&live=1", "red", "camera fake"),
        ("nonsense", "red", "unknown kind"),
        ("video:/nowhere.mp4", "red", "no such file"),
    ],
)
def test_camera(spec: str, status: str, message: str) -> None:
    finding = probes.camera(context(camera=spec, run=lambda command, timeout_s: None))
    assert (finding.status, message in finding.text) == (status, True), finding


def test_a_wrong_specification_is_not_blamed_on_the_service() -> None:
    finding = probes.camera(context(camera="nonsense", run=lambda command, timeout_s: ""))
    assert finding.status == "red" and "run --help" in finding.fix


def test_a_camera_that_the_running_service_may_use_is_yellow() -> None:
    finding = probes.camera(context(camera="fake:?lost=0", run=lambda command, timeout_s: ""))
    assert finding.status == "yellow" and "stop eyas-device" in finding.fix


def test_view_reports_whether_the_images_are_in_distribution(
    pristine_bundle: Path, image_folder: Path, tmp_path: Path
) -> None:
    same = probes.view(context(bundle=pristine_bundle, camera=f"folder:{image_folder}"))
    assert (same.status, same.text.split(":")[0]) == ("green", "in distribution")
    strange = probes.view(context(bundle=pristine_bundle, camera="fake:?frames=20"))
    assert strange.status == "yellow" and "does not see what the model was trained on" in strange.text
    assert "snapshot" in strange.fix


@pytest.mark.parametrize(
    ("camera", "message"),
    [("", "no camera"), ("fake:?frames=2", "too few"), ("fake:?lost=0", "not judged: camera fake")],
)
def test_view_that_cannot_be_judged_is_grey(camera: str, message: str, pristine_bundle: Path) -> None:
    finding = probes.view(context(bundle=pristine_bundle, camera=camera))
    assert finding.status == "grey" and message in finding.text
