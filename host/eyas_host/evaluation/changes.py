"""Named changes of an image that a camera in use suffers: light, colour, focus, noise, dirt, position, compression.

Each change is a pure function of a decoded image, uint8 [h, w, 3] BGR, and returns a new image of the same size; what
looks random (noise, dirt) follows from the image's size and content alone. Lengths (blur, dirt) are in pixels of an
image whose shorter side is 300; other images are changed in proportion.

Source: kinds and the idea of levels follow Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", 2019, without weather and with what happens at an installation: another light, a covered
or dirty lens, a camera that was moved, turned or plugged in elsewhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels

_REFERENCE_SIDE = 300
_SPECKS = 30
_WORDS = "The quick brown fox jumps over the lazy dog 0123456789"


class Change(msgspec.Struct, frozen=True):
    """A change at one level."""

    name: str
    """Unique and stable, for reports: the kind and its level."""
    kind: str
    apply: Callable[[Pixels], Pixels]
    keeps_view: bool = True
    """Whether the scene stays where it was, so that the label can still be read from the image."""


def light(image: Pixels, factor: float) -> Pixels:
    """Multiply all values: exposure or lamp; above 1 highlights clip."""
    return _clipped(image.astype(np.float32) * factor)


def contrast(image: Pixels, factor: float) -> Pixels:
    """Move all values towards their mean: haze, a fogged or greasy lens (ImageNet-C's `contrast`)."""
    values = image.astype(np.float32)
    middle = values.mean()
    return _clipped(middle + factor * (values - middle))


def tint(image: Pixels, gains: tuple[float, float, float]) -> Pixels:
    """Multiply blue, green and red by `gains`: another lamp or white balance."""
    return _clipped(image.astype(np.float32) * np.asarray(gains, dtype=np.float32))


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur: out of focus, condensation."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma * _scale(image), borderType=cv2.BORDER_REFLECT))


def motion(image: Pixels, length: float) -> Pixels:
    """Average along a horizontal line of this length: the scene or the camera moves during the exposure."""
    width = max(1, round(length * _scale(image)))
    return np.asarray(cv2.blur(image, (width, 1), borderType=cv2.BORDER_REFLECT))


def noise(image: Pixels, deviation: float) -> Pixels:
    """Add Gaussian noise to each value: high gain in little light."""
    generator = np.random.default_rng(zlib.crc32(image.tobytes()))
    return _clipped(image + generator.normal(0.0, deviation, image.shape))


def negative(image: Pixels) -> Pixels:
    """Invert all values: a wrong setting of a thermal or X-ray camera."""
    return np.asarray(255 - image)


def dirt(image: Pixels, radius: float) -> Pixels:
    """Draw opaque dark specks of up to this radius, always at the same positions: dirt on the lens."""
    height, width = image.shape[:2]
    generator = np.random.default_rng(0)
    changed = image.copy()
    for x, y, size in generator.random((_SPECKS, 3)):
        extent = max(1, round(radius * _scale(image) * (0.3 + 0.7 * size)))
        cv2.circle(changed, (int(x * width), int(y * height)), extent, (25, 28, 30), -1, cv2.LINE_AA)
    return changed


def cover(image: Pixels, fraction: float) -> Pixels:
    """Cover this fraction of the image from below by something dark: an object before the lens."""
    changed = image.copy()
    changed[round(image.shape[0] * (1.0 - fraction)) :] = 20
    return changed


def zoom(image: Pixels, factor: float) -> Pixels:
    """Magnify the centre (factor above 1), or shrink the scene and repeat it around itself (below 1)."""
    height, width = image.shape[:2]
    across = ((np.arange(width) + 0.5 - width / 2) / factor + width / 2 - 0.5).astype(np.float32)
    down = ((np.arange(height) + 0.5 - height / 2) / factor + height / 2 - 0.5).astype(np.float32)
    if factor < 1:  # smooth first: every second pixel alone would add sharpness
        image = cv2.GaussianBlur(image, (0, 0), 0.4 / factor)
    grid_x, grid_y = np.meshgrid(across, down)
    return np.asarray(cv2.remap(image, grid_x, grid_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))


def shift(image: Pixels, fraction: float) -> Pixels:
    """Move the scene to the right by this fraction of the width; what leaves comes in on the left, as in a row."""
    return np.roll(image, round(fraction * image.shape[1]), axis=1)


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Turn the scene about the centre; corners are mirrored. The size stays, so 90 degrees stretch a wide image."""
    height, width = image.shape[:2]
    if degrees % 90 == 0:
        turned = np.rot90(image, round(degrees / 90))
        return np.asarray(cv2.resize(np.ascontiguousarray(turned), (width, height), interpolation=cv2.INTER_AREA))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return np.asarray(
        cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    )


def jpeg(image: Pixels, quality: int) -> Pixels:
    """Compress as JPEG and decode: a narrow link."""
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)


def flat(image: Pixels, value: int) -> Pixels:
    """Replace the image by one grey level: a wall, a lens cap, glare."""
    return np.full_like(image, value)


def text(image: Pixels) -> Pixels:
    """Replace the image by a printed page."""
    page = np.full_like(image, 245)
    scale = 0.6 * _scale(image)
    step = max(4, round(22 * _scale(image)))
    for number, y in enumerate(range(step, image.shape[0] + step, step)):
        words = _WORDS[number % len(_WORDS) :] + " " + _WORDS
        cv2.putText(page, words, (3, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (25, 25, 25), 1, cv2.LINE_AA)
    return page


def _change(name: str, function: Callable[..., Pixels], *, keeps_view: bool = True, **level: object) -> Change:
    return Change(name, function.__name__, partial(function, **level), keeps_view)


CHANGES: tuple[Change, ...] = (
    _change("light x0.5", light, factor=0.5),
    _change("light x0.3", light, factor=0.3),
    _change("light x0.05", light, factor=0.05),
    _change("light x2", light, factor=2.0),
    _change("contrast x0.3", contrast, factor=0.3),
    _change("red tint", tint, gains=(0.6, 0.8, 1.25)),
    _change("blue tint", tint, gains=(1.25, 0.8, 0.6)),
    _change("blur 2 px", blur, sigma=2.0),
    _change("blur 8 px", blur, sigma=8.0),
    _change("blur 20 px", blur, sigma=20.0),
    _change("motion 15 px", motion, length=15.0),
    _change("noise 10", noise, deviation=10.0),
    _change("noise 30", noise, deviation=30.0),
    _change("JPEG quality 10", jpeg, quality=10),
    _change("negative", negative),
    _change("dirt 6 px", dirt, radius=6.0),
    _change("dirt 15 px", dirt, radius=15.0),
    _change("half covered", cover, fraction=0.5),
    _change("zoom x0.5", zoom, factor=0.5, keeps_view=False),
    _change("zoom x1.5", zoom, factor=1.5, keeps_view=False),
    _change("zoom x2", zoom, factor=2.0, keeps_view=False),
    _change("shift by half", shift, fraction=0.5, keeps_view=False),
    _change("rotate 15 degrees", rotate, degrees=15.0, keeps_view=False),
    _change("rotate 90 degrees", rotate, degrees=90.0, keeps_view=False),
    _change("rotate 180 degrees", rotate, degrees=180.0, keeps_view=False),
    _change("flat grey", flat, value=128, keeps_view=False),
    _change("flat white", flat, value=250, keeps_view=False),
    _change("text", text, keeps_view=False),
)
"""All changes, by kind and level; names are unique."""


def _scale(image: Pixels) -> float:
    return float(min(image.shape[:2]) / _REFERENCE_SIDE)


def _clipped(values: npt.NDArray[np.floating]) -> Pixels:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)
