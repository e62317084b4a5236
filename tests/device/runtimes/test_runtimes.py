"""One contract for every installed runtime, on real models."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_device.bundle import Bundle
from eyas_device.errors import BundleError, ImageError, RuntimeUnavailable
from eyas_device.preprocess import prepare
from eyas_device.runtimes import RUNTIMES, load, open_runtime, use_engine_cache
from tests.support import tiny

ARTEFACTS = ("litert-fp32", "litert-int8", "openvino-fp32", "onnx-fp32")


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_contract(artefact: str, pristine_bundle: Path, weights: tuple[tiny.Floats, tiny.Floats]) -> None:
    bundle = Bundle.open(pristine_bundle)
    tolerance = 0.3 if artefact.endswith("int8") else 1e-3  # int8: half a step of 0.25, and rounded weights
    with open_runtime(bundle, artefact=artefact, threads=1) as runtime:
        assert runtime.name in RUNTIMES
        assert runtime.version[0].isdigit()
        for label in tiny.LABELS:
            pixels = prepare(tiny.draw_shape(label, 7), tiny.SPEC)
            before = pixels.copy()
            logits = runtime.infer(pixels)
            assert logits.shape == (tiny.CLASSES,)
            assert logits.dtype == np.float32
            assert np.abs(logits - tiny.reference_logits(pixels, *weights)).max() < tolerance
            assert tiny.LABELS[int(logits.argmax())] == label
            assert np.array_equal(pixels, before), "the caller's image was changed"


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_every_pixel_value_arrives(
    artefact: str, pristine_bundle: Path, weights: tuple[tiny.Floats, tiny.Floats]
) -> None:
    bundle = Bundle.open(pristine_bundle)
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    noise.flat[:2] = 0, 255
    with open_runtime(bundle, artefact=artefact) as runtime:
        for pixels in (noise, noise[:, ::-1], np.asfortranarray(noise), 255 - noise):  # any memory layout
            expected = tiny.reference_logits(pixels, *weights)
            assert np.abs(runtime.infer(pixels) - expected).max() < (0.5 if "int8" in artefact else 1e-3)


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_an_image_written_in_place_gives_the_same_logits(artefact: str, pristine_bundle: Path) -> None:
    frame = tiny.draw_shape("disc", 11)
    pixels = prepare(frame, tiny.SPEC)
    with open_runtime(Bundle.open(pristine_bundle), artefact=artefact) as runtime:
        given = runtime.infer(pixels).copy()
        for _ in range(2):
            runtime.infer(255 - pixels)  # what lies in the input must not matter
            written = runtime.infer_in_place(lambda out: prepare(frame, tiny.SPEC, out=out))
            assert np.array_equal(written, given)


@pytest.mark.parametrize("artefact", ARTEFACTS)
@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 1, 3), np.uint8), np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32)],
    ids=["1x1", "grey", "float"],
)
def test_wrong_images_are_rejected(artefact: str, pixels: np.ndarray, pristine_bundle: Path) -> None:
    with (
        open_runtime(Bundle.open(pristine_bundle), artefact=artefact) as runtime,
        pytest.raises(ImageError, match="uint8 \\(16, 16, 3\\) is needed"),
    ):
        runtime.infer(pixels)


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_a_model_that_does_not_match_the_manifest(
    artefact: str, bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(labels=["one", "two"])
    with pytest.raises(BundleError, match=r"is needed: pack the bundle again"):
        open_runtime(Bundle.open(bundle_root), artefact=artefact)
    edit_manifest(labels=list(tiny.LABELS), preprocessing={"size": 32})
    with pytest.raises(BundleError, match=r"is needed: pack the bundle again"):
        open_runtime(Bundle.open(bundle_root), artefact=artefact)


@pytest.mark.parametrize("name", ["litert", "openvino", "onnx"])
def test_a_file_that_is_not_a_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes(b"not a model, but long enough to be parsed " * 10)
    with pytest.raises(BundleError, match=r"model\.xml: the model cannot be loaded") as caught:
        load(name)(path, size=16, classes=3, threads=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["uint8", "int8", "float32"])
def test_litert_inputs(kind: str, tmp_path: Path, weights: tuple[tiny.Floats, tiny.Floats]) -> None:
    tiny.write_tflite(tmp_path / "m.tflite", *weights, kind=kind)
    pixels = prepare(tiny.draw_shape("disc", 3), tiny.SPEC)
    with load("litert")(tmp_path / "m.tflite", size=16, classes=3, threads=2) as runtime:
        for _ in range(3):
            logits = runtime.infer(pixels)
        assert np.abs(logits - tiny.reference_logits(pixels, *weights)).max() < 0.3


def test_the_default_is_the_first_installed_runtime(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(pristine_bundle)
    with open_runtime(bundle) as runtime:
        assert runtime.name == "litert"
    monkeypatch.delitem(sys.modules, "eyas_device.runtimes.litert")
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with open_runtime(bundle) as runtime:
        assert runtime.name == "openvino"


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("litert", "ai_edge_litert.interpreter", "pip install eyas-device"),
        ("openvino", "openvino", "pip install 'eyas-device[openvino]'"),
        ("onnx", "onnxruntime", "pip install 'eyas-device[onnx]'"),
        ("tflite", "tflite_runtime.interpreter", "pip install 'eyas-device[tflite]'"),
    ],
)
def test_a_missing_runtime_names_its_install_command(
    name: str, module: str, line: str, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"eyas_device.runtimes.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailable) as caught:
        open_runtime(Bundle.open(pristine_bundle), name)
    assert line in str(caught.value)


@pytest.mark.parametrize("name", ["onnx-cuda", "onnx-tensorrt"])
def test_an_execution_provider_that_is_not_there_is_named(
    name: str, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailable, match=r"has no (Cuda|CUDA|Tensorrt)ExecutionProvider\); install"):
        open_runtime(Bundle.open(pristine_bundle), name)


def test_unknown_names_list_what_is_allowed(pristine_bundle: Path) -> None:
    bundle = Bundle.open(pristine_bundle)
    with pytest.raises(
        RuntimeUnavailable, match="allowed are litert, tflite, openvino, onnx, onnx-cuda, onnx-tensorrt"
    ):
        open_runtime(bundle, "tensorrt")
    with pytest.raises(BundleError, match="the bundle has: litert-fp32, litert-int8, openvino-fp32, onnx-fp32"):
        open_runtime(bundle, artefact="litert-int4")
    with pytest.raises(BundleError, match="no artefact 'onnx-fp32' for runtime 'litert'"):
        open_runtime(bundle, "litert", "onnx-fp32")


def test_engines_are_kept_one_folder_for_each_content_of_a_model_file(
    tmp_path: Path, weights: tuple[tiny.Floats, tiny.Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime names an engine by the graph alone: other weights in the same file must not meet it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    requested: list[Any] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: object, providers: list[Any]) -> object:
        requested.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    loaded = importlib.import_module("eyas_device.runtimes.onnx").OnnxTensorRT
    cache, model = tmp_path / "state" / "engines", tmp_path / "model.onnx"

    def folder(scale: float) -> Path:
        tiny.write_onnx(model, weights[0] * np.float32(scale), weights[1])
        loaded(model, size=16, classes=3, threads=1).close()
        name, options = requested[-1][0]
        assert name == "TensorrtExecutionProvider" and options["trt_engine_cache_enable"] == "1"
        assert requested[-1][1:] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return Path(options["trt_engine_cache_path"])

    monkeypatch.setenv("EYAS_ENGINE_CACHE", str(cache))
    first = folder(1.0)
    (first / "engine").write_bytes(b"built in minutes")
    assert first.parent == cache and folder(1.0) == first and (first / "engine").exists()
    others = [folder(scale) for scale in (2.0, 3.0, 4.0)]
    assert len({first, *others}) == 4 and first.exists()
    for age, old in enumerate((first, *others)):
        os.utime(old, (1000 + age, 1000 + age))
    folder(5.0)
    assert not first.exists() and len(list(cache.iterdir())) == 4, "the folders of old models stay for ever"

    monkeypatch.setenv("EYAS_ENGINE_CACHE", str(model / "not a folder"))
    loaded(model, size=16, classes=3, threads=1).close()
    assert requested[-1][0] == "TensorrtExecutionProvider", "a disk that takes nothing keeps no model from running"


def test_the_engine_cache_is_in_the_state_folder_unless_something_else_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYAS_ENGINE_CACHE", "")
    monkeypatch.delenv("EYAS_ENGINE_CACHE")  # and the end of the test restores that
    use_engine_cache(tmp_path / "missing")
    assert "EYAS_ENGINE_CACHE" not in os.environ, "a first try leaves nothing behind"
    use_engine_cache(tmp_path)
    assert os.environ["EYAS_ENGINE_CACHE"] == str(tmp_path / "engines")
    use_engine_cache(tmp_path / "..")
    assert os.environ["EYAS_ENGINE_CACHE"] == str(tmp_path / "engines")
