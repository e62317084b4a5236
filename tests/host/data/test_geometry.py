"""The rotated crop of a view: what rotating, cropping and preparing one after the other gives, without aliasing."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from eyas_device.preprocess import Preprocessing, decode, prepare
from eyas_host.data.geometry import Crop, prepare_crop
from eyas_host.data.transforms import Augmenter
from eyas_host.recipe.augment import AugmentSection


def waves(height: int, width: int) -> np.ndarray:
    """A smooth image, so that any proper resampling gives its values at the sampled places."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [
        np.sin(2 * np.pi * (x * a + y * b)) for a, b in ((1 / width, 0), (0, 1.3 / height), (1 / width, -1 / height))
    ]
    return np.clip(128 + 100 * np.stack(channels, axis=2), 0, 255).astype(np.uint8)


def step_by_step(image: np.ndarray, crop: Crop, spec: Preprocessing) -> np.ndarray:
    """Rotate the full image, cut the crop out, prepare it."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), crop.degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return prepare(turned[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], spec)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize(("height", "width"), [(300, 300), (611, 803), (1000, 500), (40, 50), (1024, 130)])
@pytest.mark.parametrize("degrees", [-10.0, 7.0])
def test_one_warp_equals_step_by_step(fit: str, height: int, width: int, degrees: float) -> None:
    image = waves(height, width)
    crop = Crop(height // 10, width // 7, round(height * 0.8), round(width * 0.75), degrees)
    for spec in (
        Preprocessing(size=64, fit=fit),  # type: ignore[arg-type]
        Preprocessing(size=64, fit=fit, interpolation="linear", crop_fraction=0.875),  # type: ignore[arg-type]
    ):
        difference = prepare_crop(image, crop, spec).astype(int) - step_by_step(image, crop, spec)
        inner = difference[4:-4, 4:-4]
        assert np.abs(inner).mean() < 0.6 and np.quantile(np.abs(inner), 0.9) <= 1  # roundings, and what is mirrored
        assert np.abs(inner.mean()) < 0.4  # nothing is shifted


def test_the_warp_hits_the_computed_coordinates() -> None:
    """One bright spot, found where a rotation about the centre, the crop and the scale put it."""
    spec = Preprocessing(size=64)
    for x, y, degrees in ((230.0, 150.0, 9.0), (260.0, 190.0, -4.0), (180.0, 250.0, 10.0)):
        yy, xx = np.mgrid[:400, :500]
        spot = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * 8.0**2))
        image = np.repeat((255 * spot).astype(np.uint8)[..., None], 3, axis=2)
        view = prepare_crop(image, Crop(60, 90, 300, 300, degrees), spec)[..., 0].astype(float)
        rows, columns = np.mgrid[:64, :64]
        found = np.array([(view * columns).sum(), (view * rows).sum()]) / view.sum()
        angle = np.deg2rad(degrees)  # counter-clockwise on the screen, where y points down
        dx, dy = x - 249.5, y - 199.5
        turned = 249.5 + dx * np.cos(angle) + dy * np.sin(angle), 199.5 - dx * np.sin(angle) + dy * np.cos(angle)
        wanted = (np.array(turned) - (90, 60) + 0.5) * 64 / 300 - 0.5
        assert np.abs(found - wanted).max() < 0.1


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 160)])
def test_fine_detail_does_not_alias(fit: str, shape: tuple[int, int]) -> None:
    """A checkerboard of single pixels becomes grey, not a moire pattern."""
    height, width = shape
    board = (np.indices(shape).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    spec = Preprocessing(size=64, fit=fit)  # type: ignore[arg-type]
    view = prepare_crop(board, Crop(10, 4, height - 20, width - 8, 6.0), spec).astype(float)
    assert np.abs(view[3:-3, 3:-3] - 127.5).max() < 20
    aliased = prepare_crop(
        board,
        Crop(10, 4, height - 20, width - 8, 6.0),
        Preprocessing(size=64, fit=fit, interpolation="linear"),  # type: ignore[arg-type]
    )
    assert aliased.std() > 2 * view.std()


def test_a_view_of_12_megapixels_costs_less_than_decoding_them() -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8), (4032, 3024))
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    augmenter = Augmenter(AugmentSection(), Preprocessing(size=224))
    augmenter.view(image, np.random.default_rng(9))
    decoding, viewing = [], []
    for seed in range(3):
        start = time.process_time()
        pixels = decode(encoded)
        decoding.append(time.process_time() - start)
        augmenter.view(pixels, np.random.default_rng(seed))
        viewing.append(time.process_time() - start - decoding[-1])
    assert min(viewing) < min(decoding)
