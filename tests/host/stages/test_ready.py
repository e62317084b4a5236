"""A student from a checkpoint: quantized by calibration, through the same gates, without a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import safetensors.torch
import torch

from eyas_device.bundle import Bundle
from eyas_device.updates.golden import check_bundle
from eyas_host.models.factory import PixelClassifier, build
from tests.support import inside
from tests.support.networks import briefly_trained
from tests.support.shapes import SHAPES, Pixels, draw_folder

MODEL = "tf_mobilenetv3_small_minimal_100"
RECIPE = f"""
[run]
name = "ready"
[data]
path = "shapes"
[image]
size = 64
[student]
model = "{MODEL}"
checkpoint = "student.safetensors"
[prune]
method = "none"
[quantize]
method = "ptq"
preset = "symmetric"
calibration = 20
[compile]
runtimes = ["litert", "onnx"]
precisions = ["fp32", "int8", "int16"]
[gate]
min_agreement = 0.5
max_dp = 0.2
max_drop = 0.5
"""


def distill(place: Path, *more: str) -> inside.Done:
    return inside.eyas(
        place, "distill", "recipe.toml", "--yes", *(word for setting in more for word in ("--set", setting))
    )


@pytest.fixture(scope="module")
def network(shape_frames: Pixels) -> PixelClassifier:
    """A network whose recorded normalisation is close to that of untrained networks here."""
    return briefly_trained(MODEL, shape_frames)


@pytest.fixture(scope="module")
def place(network: PixelClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, weights, a recipe, and the finished run."""
    place = tmp_path_factory.mktemp("ready")
    draw_folder(place / "shapes", count=16)
    safetensors.torch.save_file(network.backbone.state_dict(), place / "student.safetensors")
    (place / "recipe.toml").write_text(RECIPE)
    with mock.patch("eyas_host.evaluation.networks._ROUNDS", 3):
        done = distill(place)
    assert done.code == 0, done.err
    return place


def report_of(place: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((place / "runs/ready/report.json").read_bytes())
    return report


def test_there_is_a_bundle_and_no_teacher(place: Path) -> None:
    report = report_of(place)
    names = {variant["name"] for variant in report["variants"]}
    artefacts = {"litert-fp32", "litert-int8", "litert-int16", "onnx-fp32", "onnx-int8"}
    assert names == {"student", "pruned", "qat", "exact-int8"} | artefacts
    assert {variant["name"]: variant["precision"] for variant in report["variants"]} == {
        **dict.fromkeys(("student", "pruned"), "fp32"),
        **dict.fromkeys(("qat", "exact-int8"), "int8"),
        **{name: name.split("-")[1] for name in artefacts},
    }
    assert report["weights"] == {"teacher": "none", "student": "checkpoint"}
    assert report["quantization"]["method"] == "ptq"
    compiled = json.loads((place / "runs/ready/compile/stage.json").read_bytes())
    assert "fit for TensorRT" in compiled["facts"]["notes"]["onnx-int8"]
    assert not (place / "runs/ready/teach/teacher.pt").exists()
    bundle = Bundle.open(place / "runs/ready/bundle")
    assert {a.name for a in bundle.manifest.artefacts} == artefacts
    assert {result.status for result in check_bundle(bundle)} == {"ok"}
    assert "teacher" not in (place / "runs/ready/report.html").read_text().split("<main>")[0]


def test_it_has_the_normalisation_that_timm_records(place: Path, network: PixelClassifier) -> None:
    state = torch.load(place / "runs/ready/distill/student.pt", weights_only=True)
    assert state["mean"].flatten().tolist() == [127.5, 127.5, 127.5]
    assert torch.equal(state["backbone.conv_stem.weight"], network.backbone.state_dict()["conv_stem.weight"])


def test_each_artefact_is_compared_with_what_it_was_made_from(place: Path) -> None:
    parity = report_of(place)["parity"]
    assert {name: found["reference"] for name, found in parity.items()} == {
        name: "pruned" if name.endswith("fp32") else "qat" for name in parity
    }
    assert max(parity["litert-fp32"]["max_dp"], parity["onnx-fp32"]["max_dp"]) < 1e-3


def test_calibration_covers_every_class(place: Path) -> None:
    kept = json.loads((place / "runs/ready/qat/calibration.json").read_bytes())
    split = json.loads((place / "runs/ready/split/manifest.json").read_bytes())
    label = {image["sha256"]: image["label"] for image in split["train"]}
    assert [label[sha256] for sha256 in kept["images"][:5]] == list(SHAPES)
    assert len(kept["images"]) == 20 and "far apart" in kept["why"]


def test_sizes_of_layers_and_artefacts(place: Path, network: PixelClassifier) -> None:
    report = report_of(place)
    sizes = {variant["name"]: variant["size_bytes"] for variant in report["variants"]}
    for name, size in report["artefact_sizes"].items():
        assert size["constants"] + size["graph"] == sizes[name]
        assert 0 < size["graph"] < 400_000 and size["constants"] > 0
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers) == len([m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)])
    stem, head = layers["backbone.conv_stem"], layers["backbone.classifier"]
    assert stem["parameters"] == 16 * 27 + 16
    assert (stem["fp32_bytes"], stem["int8_bytes"]) == (4 * (16 * 27 + 16), 16 * 27 + 4 * 16 + 4 * 16)
    assert head["int8_bytes"] == head["fp32_bytes"] == 4 * (1024 * 5 + 5)
    constants = report["artefact_sizes"]["litert-fp32"]["constants"]
    assert constants == pytest.approx(sum(layer["fp32_bytes"] for layer in layers.values()), rel=0.01)


def test_nothing_is_packed_below_the_gate_and_the_old_bundle_stays(place: Path) -> None:
    manifest = (place / "runs/ready/bundle/manifest.json").read_bytes()
    done = distill(place, "gate.max_dp=1e-12")
    assert done.code == 2 and "no artefact passes the gates" in done.err and "Traceback" not in done.err
    assert (place / "runs/ready/bundle/manifest.json").read_bytes() == manifest
    assert Bundle.open(place / "runs/ready/bundle")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"not a file of tensors", f"no weights of {MODEL} with 5 classes"),
        (None, f"no weights of {MODEL} with 5 classes"),
        ("mobilenetv3_small_050", f"no weights of {MODEL} with 5 classes"),
    ],
)
def test_weights_of_another_network(weights: str | bytes | None, message: str, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    if isinstance(weights, bytes):
        other.write_bytes(weights)
    elif weights is not None:
        safetensors.torch.save_file(build(weights, 5, "random")[0].backbone.state_dict(), other)
    done = distill(place, f"run.name={tmp_path.name}", f"student.checkpoint={other}")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert str(other) in done.err


def test_training_without_a_teacher_is_refused(place: Path) -> None:
    done = distill(place, "quantize.method=qat", "prune.method=channel")
    assert done.code == 2 and "[student] checkpoint trains nothing" in done.err


def test_the_recipe_is_in_the_report(place: Path) -> None:
    recipe = msgspec.json.decode((place / "runs/ready/recipe.json").read_bytes())
    assert recipe["quantize"]["method"] == "ptq" and recipe["student"]["checkpoint"].endswith("student.safetensors")
