"""The choice of golden images, and how they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eyas_device.preprocess import Preprocessing, decode, image_size, prepare
from eyas_host.export.golden import MAX_BYTES, golden_image, golden_rows, write_golden


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


def test_golden_images_are_stored_as_files(tmp_path: Path) -> None:
    """`golden.npz` unpacks to less than the decoded images."""
    spec = Preprocessing(size=224)
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    images = [golden_image(noise, spec, 12)] * 12
    write_golden(tmp_path / "golden.npz", images, {"litert-int8": np.zeros((12, 2), np.float32)})
    with np.load(tmp_path / "golden.npz") as data:
        assert sum(data[name].nbytes for name in data.files) <= MAX_BYTES
        assert bytes(data["image_00"]) == images[0] and data["p.litert-int8"].shape == (12, 2)
