"""Statistics of an image, each against a second formulation by scipy and numpy in float64."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage, stats

from eyas_device.image_statistics import STATISTICS, image_statistics
from eyas_device.preprocess import Pixels

Grey = npt.NDArray[np.float64]
HIGH_PASS = [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]


def scene(seed: int, size: int = 96) -> Pixels:
    """Smooth coloured ground with a bright corner, black and white areas, and some noise."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=(size, size, 3)), (4, 4, 0))
    image = 110 + 60 * image / np.abs(image).max() + rng.normal(0, 4, image.shape)
    image[: size // 4, : size // 3] += 70
    image[-size // 8 :, -size // 8 :] = 0
    image[-size // 8 :, : size // 8] = 255
    return np.asarray(np.clip(np.rint(image), 0, 255), dtype=np.uint8)


def measured(image: Pixels) -> dict[str, float]:
    return dict(zip((s.name for s in STATISTICS), image_statistics(image).tolist(), strict=True))


def grey(image: Pixels) -> Grey:
    return np.asarray(np.rint(image @ np.array([0.114, 0.587, 0.299])))


def pooled(image: npt.NDArray[np.generic], side: int) -> Grey:
    """Mean over whole blocks."""
    block = len(image) // side
    return np.asarray(image.astype(float).reshape(side, block, side, block, -1).mean(axis=(1, 3)).squeeze())


def centre(mass: Grey, floor: float) -> tuple[float, float]:
    down, across = ndimage.center_of_mass(mass + floor)
    return (across + 0.5) / len(mass) - 0.5, (down + 0.5) / len(mass) - 0.5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [64, 128, 192])
def test_each_statistic_by_a_second_formulation(seed: int, size: int) -> None:
    image = scene(seed, size)
    found, light = measured(image), grey(image)
    brightness, contrast = light.mean(), light.std()
    assert found["brightness"] == pytest.approx(brightness, abs=0.3)
    assert found["contrast"] == pytest.approx(contrast, abs=0.2)
    assert found["black"] == pytest.approx(math.sqrt((light < 6).mean()), abs=0.01)
    assert found["white"] == pytest.approx(math.sqrt((light > 249).mean()), abs=0.01)
    cubed = stats.skew(light.ravel()) * contrast**3 / (contrast + 2) ** 3
    assert found["skewness"] == pytest.approx(cubed, abs=0.02)
    fine = np.abs(ndimage.laplace(light, mode="mirror")).mean()
    assert found["sharpness"] == pytest.approx(math.log((fine + 0.3) / (contrast + 2)), abs=0.03)
    small = pooled(image, 32)
    coarse = np.abs(ndimage.laplace(small @ [0.114, 0.587, 0.299], mode="mirror")).mean()
    assert found["detail"] == pytest.approx(math.log((coarse + 0.3) / (contrast + 2)), abs=0.03)
    residue = np.abs(ndimage.convolve(light[::2], np.asarray(HIGH_PASS, float), mode="mirror"))
    assert found["noise"] == pytest.approx(math.log(np.median(residue) + 0.5), abs=0.1)
    blue, green, red = image.reshape(-1, 3).mean(axis=0)
    assert found["blue"] == pytest.approx(math.log((blue + 4) / (green + 4)), abs=0.01)
    assert found["red"] == pytest.approx(math.log((red + 4) / (green + 4)), abs=0.01)
    chroma = 0.5 * (np.abs(small[..., 0] - small[..., 1]).mean() + np.abs(small[..., 2] - small[..., 1]).mean())
    assert found["colour"] == pytest.approx(math.log(chroma + 1), abs=0.02)
    grid = light if size == 64 else pooled(light, 64) if size == 128 else cv2.resize(light, (64, 64), interpolation=3)
    across, down = (np.abs(ndimage.sobel(grid, axis=axis, mode="mirror")) for axis in (1, 0))
    assert found["direction"] == pytest.approx(math.log((across.mean() + 2) / (down.mean() + 2)), abs=0.03)
    strength = across + down
    assert found["edges"] == pytest.approx((strength > 2 * strength.mean() + 4).mean(), abs=0.02)
    assert (found["light_x"], found["light_y"]) == pytest.approx(centre(small @ [0.114, 0.587, 0.299], 1), abs=2e-3)
    assert (found["edges_x"], found["edges_y"]) == pytest.approx(centre(strength, 4), abs=5e-3)


@pytest.mark.parametrize("value", [0, 1, 128, 255])
@pytest.mark.parametrize("size", [8, 17, 224])
def test_a_flat_image_has_finite_statistics(value: int, size: int) -> None:
    found = image_statistics(np.full((size, size, 3), value, np.uint8))
    assert found.shape == (len(STATISTICS),) and np.isfinite(found).all()


def test_an_image_of_extremes_has_finite_statistics() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.isfinite(image_statistics(np.repeat(board[:, :, None], 3, axis=2))).all()


@pytest.mark.parametrize(
    ("name", "sign", "change"),
    [
        ("brightness", -1, lambda p: (p * 0.5).astype(np.uint8)),
        ("sharpness", -1, lambda p: cv2.GaussianBlur(p, (0, 0), 2)),
        ("detail", -1, lambda p: cv2.GaussianBlur(p, (0, 0), 8)),
        ("noise", 1, lambda p: np.clip(p + np.random.default_rng(1).normal(0, 15, p.shape), 0, 255).astype(np.uint8)),
        ("red", 1, lambda p: np.clip(p * [0.8, 0.8, 1.3], 0, 255).astype(np.uint8)),
        ("blue", 1, lambda p: np.clip(p * [1.3, 0.8, 0.8], 0, 255).astype(np.uint8)),
        ("contrast", -1, lambda p: (100 + 0.3 * (p.astype(float) - 100)).astype(np.uint8)),
        ("light_x", 1, lambda p: p[:, ::-1].copy()),
        ("light_y", 1, lambda p: np.concatenate([p[:48] // 4, p[48:]])),
        ("skewness", -1, lambda p: 255 - p),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_statistic_moves_as_its_name_says(name: str, sign: int, change: object) -> None:
    image = scene(7)
    moved = measured(change(image))[name] - measured(image)[name]  # type: ignore[operator]
    assert sign * moved > 0
