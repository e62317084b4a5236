"""A tiny real bundle: a linear classifier of drawn shapes for every runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np

from eyas_device.bundle import (
    GOLDEN,
    MANIFEST,
    REFERENCE,
    SCHEMA,
    Artefact,
    Confidence,
    Manifest,
    PredictionSettings,
    RuntimeName,
)
from eyas_device.preprocess import Pixels, Preprocessing, decode, prepare
from eyas_device.reference import reference_arrays
from tests.support import tiny
from tests.support.bundles import TEMPERATURE, entry

THRESHOLD = 0.9


def write_tiny_bundle(root: Path, weights: tuple[tiny.Floats, tiny.Floats] | None = None) -> Path:
    """Write the bundle into the new folder `root`; its golden probabilities come from plain numpy, from no runtime."""
    weights = weights or tiny.fit()
    root.mkdir(parents=True)
    tiny.write_tflite(root / "litert-fp32.tflite", *weights)
    tiny.write_tflite(root / "litert-int8.tflite", *weights, kind="int8")
    tiny.write_openvino(root / "openvino-fp32.xml", *weights)
    tiny.write_onnx(root / "onnx-fp32.onnx", *weights)
    return _describe(root, weights)


def write_one_model(
    root: Path,
    write: Callable[[Path], object],
    weights: tuple[tiny.Floats, tiny.Floats],
    *,
    name: str,
    version: str,
    spec: Preprocessing = tiny.SPEC,
    seen: Callable[[int], Pixels] | None = None,
) -> Path:
    """Write a bundle of one model, `litert-fp32` or `onnx-fp32`, that computes what `weights` do on the golden images.

    Args:
        root: The new folder.
        write: Writes the model's file.
        weights: Weights float32 [classes, inputs] and bias [classes].
        name: Name of the artefact.
        version: Version of the bundle.
        spec: Preprocessing, which says how many inputs there are.
        seen: Draws the images that the OOD reference is of, by their number; by default the shapes.

    """
    root.mkdir(parents=True)
    write(root / f"{name}.{'tflite' if name.startswith('litert') else 'onnx'}")
    return _describe(root, weights, only=name, version=version, spec=spec, seen=seen)


def _describe(
    root: Path,
    weights: tuple[tiny.Floats, tiny.Floats],
    *,
    only: str = "",
    version: str = "1.2.3",
    spec: Preprocessing = tiny.SPEC,
    seen: Callable[[int], Pixels] | None = None,
) -> Path:
    """Write golden images, reference and manifest beside the models."""
    artefacts = []
    kinds: tuple[tuple[RuntimeName, str, tuple[str, ...]], ...] = (
        ("litert", "fp32", (".tflite",)),
        ("litert", "int8", (".tflite",)),
        ("openvino", "fp32", (".xml", ".bin")),
        ("onnx", "fp32", (".onnx",)),
    )
    for runtime, precision, suffixes in kinds:
        name = f"{runtime}-{precision}"
        if only not in ("", name):
            continue
        files = tuple(entry(root / f"{name}{suffix}") for suffix in suffixes)
        artefacts.append(Artefact(name, runtime, "int8" if precision == "int8" else "fp32", files))
    images = [tiny.draw_shape(label, seed) for label in tiny.LABELS for seed in range(2)]
    encoded = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].ravel() for image in images]
    frames = [decode(image.tobytes()) for image in encoded]
    logits = np.stack([tiny.reference_logits(prepare(f, spec), *weights) for f in frames]) / TEMPERATURE
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    arrays = {f"image_{n:02d}": image for n, image in enumerate(encoded)} | {
        f"p.{a.name}": probabilities for a in artefacts
    }
    labels = np.array([tiny.LABELS[row.argmax()] for row in probabilities])
    for artefact in artefacts:
        arrays[f"label.{artefact.name}"] = labels
        arrays[f"uncertain.{artefact.name}"] = probabilities.max(axis=1) < THRESHOLD
    draw = seen or (lambda number: tiny.draw_shape(tiny.LABELS[number % 3], 1000 + number))
    images = [prepare(draw(number), spec) for number in range(90)]
    with (root / REFERENCE).open("wb") as stream:
        np.savez(stream, **reference_arrays(tiny.reference_of(images[:60], images[60:])))
    uses: dict[RuntimeName, str] = {"litert": "litert-int8", "openvino": "openvino-fp32", "onnx": "onnx-fp32"}
    if only:
        uses = {artefacts[0].runtime: only}  # type: ignore[dict-item]
    manifest = Manifest(
        schema=SCHEMA,
        name="tiny-shapes",
        version=version,
        labels=tiny.LABELS,
        preprocessing=spec,
        artefacts=tuple(artefacts),
        use=uses,
        reasons={} if only else {"litert": "faster: int8 1.00 ms, fp32 2.00 ms"},
        confidence=Confidence(temperature=TEMPERATURE, threshold=THRESHOLD),
        reference=entry(root / REFERENCE),
        notices=("Drawn for a test.",),
        evidence={"litert-int8": {"balanced_accuracy": 0.98765, "latency_ms_p50": None}},
    )
    arrays["settings"] = np.frombuffer(msgspec.json.encode(PredictionSettings.of(manifest)), np.uint8)
    with (root / GOLDEN).open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    manifest = msgspec.structs.replace(manifest, golden=entry(root / GOLDEN))
    (root / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return root
