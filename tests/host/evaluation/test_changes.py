"""Changes of images as cameras suffer them: each does what it is called, and nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from eyas_device.preprocess import Pixels
from eyas_host.evaluation import changes
from eyas_host.evaluation.changes import CHANGES, Change

BY_NAME = {change.name: change for change in CHANGES}


def scene(height: int = 90, width: int = 120) -> Pixels:
    """Smooth colours between 40 and 120, different everywhere, with a bright patch on the left."""
    generator = np.random.default_rng(3)
    image = ndimage.gaussian_filter(generator.normal(size=(height, width, 3)), (5, 5, 0))
    image = 80 + 40 * image / np.abs(image).max()
    image[height // 4 : height // 2, : width // 4] += 60
    return np.asarray(np.rint(image), dtype=np.uint8)


def grey(image: Pixels) -> npt.NDArray[np.float64]:
    return np.asarray(image @ np.array([0.114, 0.587, 0.299]))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("size", [(90, 120), (300, 300), (33, 8)])
def test_a_change_is_pure_and_keeps_type_and_size(change: Change, size: tuple[int, int]) -> None:
    image = scene(*size)
    before = image.copy()
    changed, again = change.apply(image), change.apply(image)
    assert (changed.dtype, changed.shape) == (np.uint8, image.shape)
    assert np.array_equal(image, before), "the image itself was changed"
    assert np.array_equal(changed, again), "the same image was changed in two ways"
    assert not np.shares_memory(changed, image)


def test_names_are_unique_and_every_function_of_the_module_is_in_the_list() -> None:
    assert len(BY_NAME) == len(CHANGES) > 20
    public = {
        name
        for name, value in vars(changes).items()
        if callable(value) and getattr(value, "__module__", "") == changes.__name__ and not name.startswith("_")
    }
    assert {change.kind for change in CHANGES} == public - {"Change"}


def test_levels_of_a_kind_grow() -> None:
    """The farther the level, the farther the image."""
    image = scene(300, 300)

    def error(name: str) -> float:
        return float(np.abs(BY_NAME[name].apply(image).astype(float) - image).mean())

    for weaker, stronger in (
        ("light x0.5", "light x0.3"),
        ("light x0.3", "light x0.05"),
        ("blur 2 px", "blur 8 px"),
        ("blur 8 px", "blur 20 px"),
        ("noise 10", "noise 30"),
        ("dirt 6 px", "dirt 15 px"),
    ):
        assert 0 < error(weaker) < error(stronger), (weaker, stronger)


def test_light_and_tint_scale_and_clip() -> None:
    image = np.array([[[10, 100, 200], [128, 255, 0]]], dtype=np.uint8)
    assert changes.light(image, 0.5).tolist() == [[[5, 50, 100], [64, 128, 0]]]
    assert changes.light(image, 2.0).tolist() == [[[20, 200, 255], [255, 255, 0]]]
    assert changes.tint(image, (2.0, 1.0, 0.5)).tolist() == [[[20, 100, 100], [255, 255, 0]]]
    assert changes.negative(image).tolist() == [[[245, 155, 55], [127, 0, 255]]]


def test_contrast_keeps_the_mean_and_scales_the_deviation() -> None:
    image = scene()
    changed = changes.contrast(image, 0.3)
    assert changed.mean() == pytest.approx(image.mean(), abs=0.1)
    assert changed.std() == pytest.approx(0.3 * image.std(), rel=0.02)


def test_blur_is_a_gaussian_of_the_reference_size() -> None:
    """Second formulation: scipy's filter, at a sigma in proportion to the image's side."""
    image = scene(600, 800)
    wanted = ndimage.gaussian_filter(image.astype(float), (16, 16, 0), mode="reflect")
    assert np.abs(changes.blur(image, 8.0) - wanted).max() <= 1.5


def test_noise_has_the_deviation_and_no_bias() -> None:
    image = np.full((300, 300, 3), 128, np.uint8)
    difference = changes.noise(image, 10.0) - image.astype(float)
    assert difference.std() == pytest.approx(10, rel=0.02)
    assert difference.mean() == pytest.approx(0, abs=0.1)
    assert not np.array_equal(changes.noise(image, 10.0)[:, :, 0], changes.noise(image + 1, 10.0)[:, :, 0] - 1)


def test_zoom_magnifies_and_shrinks_about_the_centre() -> None:
    image = scene(120, 120)
    wanted = cv2.resize(image[30:90, 30:90], (120, 120), interpolation=cv2.INTER_LINEAR)
    inner = (slice(4, -4), slice(4, -4))
    assert np.abs(changes.zoom(image, 2.0)[inner].astype(int) - wanted[inner]).max() <= 4
    small = changes.zoom(image, 0.5)
    assert (
        np.abs(grey(small)[30:90, 30:90] - grey(cv2.resize(image, (60, 60), interpolation=cv2.INTER_AREA))).mean() < 3
    )
    assert np.abs(grey(small)[:30].astype(float) - grey(small)[60:90]).mean() < 3, "it repeats around itself"


def test_rotation_by_right_angles_is_exact_on_a_square() -> None:
    image = scene(64, 64)
    assert np.array_equal(changes.rotate(image, 90), np.rot90(image))
    assert np.array_equal(changes.rotate(image, 180), image[::-1, ::-1])
    turned = ndimage.rotate(grey(image), 15, reshape=False, order=1)
    centre = (slice(16, 48), slice(16, 48))
    assert np.abs(grey(changes.rotate(image, 15))[centre] - turned[centre]).mean() < 2


def test_cover_shift_and_flat() -> None:
    image = scene(40, 40)
    covered = changes.cover(image, 0.5)
    assert np.array_equal(covered[:20], image[:20])
    assert set(covered[20:].ravel().tolist()) == {20}
    assert np.array_equal(changes.shift(image, 0.5)[:, 20:], image[:, :20])
    assert set(changes.flat(image, 128).ravel().tolist()) == {128}


def test_dirt_stays_where_it_is() -> None:
    """The same pixels of every image, a limited fraction of them, and dark."""
    one, other = scene(300, 300), np.full((300, 300, 3), 200, np.uint8)
    hit = (changes.dirt(other, 15.0) != other).any(axis=2)
    assert 0.01 < hit.mean() < 0.3
    assert np.median(changes.dirt(other, 15.0)[hit]) < 40, "it is not opaque"
    assert not ((changes.dirt(one, 15.0) != one).any(axis=2) & ~hit).any()


def test_jpeg_and_text_are_what_they_say() -> None:
    image = scene(300, 300)
    assert np.array_equal(
        changes.jpeg(image, 10), cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], 1)
    )
    page = grey(changes.text(image))
    assert page.max() == pytest.approx(245, abs=1)
    assert 0.02 < (page < 128).mean() < 0.4
