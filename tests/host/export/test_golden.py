"""The choice of golden images, and how they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from eyas_device.bundle import GOLDEN, Artefact, Bundle, Confidence, File, Manifest
from eyas_device.decision import Decision
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import Preprocessing, decode, image_size, prepare
from eyas_host.export.golden import MAX_BYTES, golden_image, golden_rows, write_golden
from eyas_host.export.manifest import file_entry


def test_golden_images_go_from_low_to_high_confidence_without_the_lowest() -> None:
    confidence = np.linspace(0.5, 1.0, 40)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)[np.random.default_rng(0).permutation(40)]
    rows = golden_rows(probabilities, 6)
    confidence = probabilities.max(axis=1)[rows]
    assert len(set(rows)) == 6
    assert list(confidence) == sorted(confidence)
    assert confidence[0] > 0.54 and confidence[-1] == 1.0


@pytest.mark.parametrize(
    ("size", "count", "shape"),
    [(224, 12, (3024, 4032)), (512, 64, (3024, 4032)), (128, 12, (300, 300)), (96, 12, (9000, 60)), (32, 1, (20, 20))],
)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_all_golden_images_together_fit_into_4_mb(size: int, count: int, shape: tuple[int, int], fit: str) -> None:
    """Of 12 megapixels, of a narrow strip, of an image smaller than the model's input."""
    spec = Preprocessing(size=size, fit=fit)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    pixels = np.broadcast_to(rng.integers(0, 256, (1, 1, 3), dtype=np.uint8), (*shape, 3)).copy()
    image = golden_image(pixels, spec, count)
    found = image_size(image)
    assert found is not None
    width, height = found
    assert 3 * width * height * count <= MAX_BYTES == 4 << 20
    assert width <= shape[1] and height <= shape[0]
    side = max(shape) if fit == "pad" else min(shape)
    assert (width, height) == shape[::-1] or side > 1.5 * size or 3 * shape[0] * shape[1] * count > MAX_BYTES
    if min(shape) > 1.5 * size and 12 * 3 * (1.5 * size) ** 2 * max(shape) / min(shape) < MAX_BYTES and fit == "crop":
        assert min(width, height) == int(1.5 * size)  # still cropped and resized
    assert (
        np.abs(
            prepare(decode(image, spec=spec), spec)[(size - 1) // 2, (size - 1) // 2].astype(int) - pixels[0, 0]
        ).max()
        <= 3
    )


def manifest_of(labels: tuple[str, ...], spec: Preprocessing, **fields: Any) -> Manifest:
    artefact = Artefact("litert-int8", "litert", "int8", (File("litert-int8.tflite", "0" * 64, 0),))
    use = {"litert": "litert-int8"}
    return Manifest(1, "made", "1.0.0", labels, spec, (artefact,), use, **fields)


def test_golden_images_are_stored_as_files(tmp_path: Path) -> None:
    """`golden.npz` unpacks to less than the decoded images."""
    spec = Preprocessing(size=224)
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    images = [golden_image(noise, spec, 12)] * 12
    probabilities = {"litert-int8": np.full((12, 2), 0.5, np.float32)}
    write_golden(tmp_path / "golden.npz", images, probabilities, manifest_of(("a", "b"), spec))
    with np.load(tmp_path / "golden.npz") as data:
        assert sum(data[name].nbytes for name in data.files) <= MAX_BYTES
        assert bytes(data["image_00"]) == images[0] and data["p.litert-int8"].shape == (12, 2)


@pytest.mark.parametrize("count", [3, 101, 130])
def test_a_device_reads_what_was_written_in_the_same_order(count: int, tmp_path: Path) -> None:
    """Numbers above 99 do not sort as text; labels and uncertainty follow bias, threshold and costs."""
    spec = Preprocessing(size=8)
    images = [golden_image(np.full((12, 12, 3), n, np.uint8), spec, count) for n in range(count)]
    rng = np.random.default_rng(count)
    logits = rng.normal(size=(count, 3))
    confidence = Confidence(temperature=0.5, bias=(0.0, -1.5, 0.7), threshold=0.8)
    probabilities = calibrated_probabilities(logits, confidence)
    costs = ((0.0, 1.0, 9.0), (5.0, 0.0, 1.0), (1.0, 2.0, 0.0))
    for decision in (None, Decision(costs=costs)):
        manifest = manifest_of(("x", "y", "z"), spec, confidence=confidence, decision=decision)
        write_golden(tmp_path / GOLDEN, images, {"litert-int8": probabilities}, manifest)
        golden = Bundle(tmp_path, replace(manifest, golden=file_entry(tmp_path / GOLDEN, tmp_path))).golden()
        assert [int(frame.mean() + 0.5) for frame in golden.frames] == list(range(count))
        expected = [int(np.argmax(row)) for row in logits]
        if decision is not None:
            expected = [
                min(range(3), key=lambda p, row=row: sum(row[t] * costs[t][p] for t in range(3)))  # type: ignore[misc]
                for row in probabilities
            ]
        assert golden.labels["litert-int8"] == tuple("xyz"[index] for index in expected)
        flags = tuple(bool(row[index] < 0.8) for row, index in zip(probabilities, expected, strict=True))
        assert golden.uncertain["litert-int8"] == flags
        assert len(set(flags)) == 2 and golden.settings is not None and golden.settings.decision == decision
