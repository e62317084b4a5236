"""Shared parts of the HTML pages: template environment, number formats, thumbnails as data URIs.

The template engine escapes all text from data. Imports no torch.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Sequence
from typing import Any

import cv2
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, Preprocessing
from eyas_host.data.image_bytes import file_name, read_pixels

NOT_MEASURED = "not measured"

_THUMBNAIL = 128
_JPEG_QUALITY = 82


@functools.cache
def environment(package: str = "") -> Environment:
    """Jinja environment of the pages, with this module's number formats as filters.

    Args:
        package: Another package with templates, which may include those of this one.

    """
    own = PackageLoader("eyas_host.report", "")
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), own]) if package else own,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "percent": percent,
        "number": number,
        "fixed": fixed,
        "small": small,
        "megabytes": megabytes,
        "kilobytes": kilobytes,
        "money": money,
        "duration": duration,
        "setting": setting,
        "file_name": file_name,
    }
    return pages


def thumbnail(path: str, bits: int = 0) -> str | None:
    """The image as a JPEG data URI with its longer side at 128 pixels; None if it cannot be read.

    `bits` are those that images of 16 bits use; 0: all.
    """
    try:
        image = read_pixels(path, Preprocessing(size=_THUMBNAIL, bits=bits or 16))
    except (ImageError, ValueError):  # ValueError: a path with a null byte
        return None
    return jpeg(image)


def jpeg(image: Pixels) -> str:
    """An image as a JPEG data URI with its longer side at 128 pixels."""
    height, width = image.shape[:2]
    scale = _THUMBNAIL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(image, size, interpolation=method)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def confusion_cells(matrix: Sequence[Sequence[int]]) -> list[list[tuple[int, float]]]:
    """(images, fraction of the row) of each cell."""
    return [[(cell, cell / (sum(row) or 1)) for cell in row] for row in matrix]


def confused_pairs(confusion: Sequence[Sequence[int]], count: int = 10) -> list[tuple[int, int, int, float]]:
    """(true label, predicted label, images, fraction of the true label's images) of the commonest confusions."""
    cells = [
        (true, predicted, images, images / sum(row))
        for true, row in enumerate(confusion)
        for predicted, images in enumerate(row)
        if predicted != true and images
    ]
    return sorted(cells, key=lambda cell: (-cell[2], -cell[3], cell[:2]))[:count]


def percent(value: float | None, decimals: int = 1) -> str:
    """`80.1 %`."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1
    return f"{value:,.{max(0, places)}f}"


def fixed(value: float | None, decimals: int = 3) -> str:
    """A number with a fixed count of decimals."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def small(value: float | None) -> str:
    """A difference with four decimals; `< 0.0001` if it would round to zero."""
    return "< 0.0001" if value is not None and 0 < abs(value) < 5e-5 else fixed(value, 4)


def megabytes(size: int | None) -> str:
    """`1.1 MB`, or kilobytes below a tenth of that."""
    if size is None:
        return NOT_MEASURED
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def kilobytes(size: int) -> str:
    """`1,348.1 kB`."""
    return f"{size / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def money(value: float | None) -> str:
    """A cost with as many decimals as it needs: `1,234` or `0.52`."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else number(value)


def setting(value: Any) -> str:
    """A recipe's value as it is written in TOML, without quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return "–" if value is None or value == "" else str(value)  # noqa: RUF001 - a dash for no value
