"""What images store: reports of values that are not what a model should see, a line for each kind.

How they are decoded is the device's rule (`eyas_device.preprocess`); here it is reported what that means for the
images. One thing cannot be known from a single file and is decided for the whole set: how many of 16 bits are used.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
from PIL import Image, ImageCms

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, Preprocessing, decode, decoder_messages, max_stored
from eyas_device.support.decoders import DECODERS, message_kind
from eyas_device.support.stored_image import inspect_image
from eyas_host.data.image_bytes import read_image_bytes
from eyas_host.support.errors import DataError

warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata, a line for each image

MAX_DARK = 31
"""An image is very dark if 99 % of its values are at most this."""
_DARK_PERCENTILE = 99
_SAMPLED = 65_536
"""Pixels of an image that are looked at."""
_SHOWN = 3
_MAX_SUSPECTS = 500
_BITS = (10, 12, 14, 16)
"""Depths of cameras whose values are stored in 16 bits."""
_SIZE_RATIO, _ASPECT_RATIO = 4.0, 2.5
"""How much an image's side, or its aspect ratio, differs from the median before it is reported."""
_SRGB_GAMMA = (0.43, 0.48)

_ALPHA = "with transparency: composited on black"
_FRAMES = "with several frames: the first is used"
_PAGES = "with several pages: the first is used"
_CMYK = "in CMYK: converted to RGB without a colour profile"
_GAMMA = "with another gamma than sRGB's: the values are used as they are stored"
_DARK = f"very dark ({_DARK_PERCENTILE} % of the values are at most {MAX_DARK} of 255): are they what the camera saw?"
_CONSTANT = "of one colour: is there anything to see?"


class StoredValues(msgspec.Struct, frozen=True, gc=False):
    """What one image stores."""

    kinds: tuple[str, ...] = ()
    """What is reported of it: the text behind `3 images`."""
    max_value: int | None = None
    """Largest stored value of an image of 16 bits per channel."""
    coloured: bool = True
    suspect: bool = False
    """Whether a decoder complained while it was decoded, perhaps about another image."""


class Examined(NamedTuple):
    """A decoded image and what its file says."""

    pixels: Pixels
    values: StoredValues
    mode: str
    """grey or colour, with `+alpha` where there is an alpha channel; `unknown` if only OpenCV knows the format."""
    bits: int
    """Per channel, in the file."""


class StoredImageFile(NamedTuple):
    """An image file with its size and what it stores."""

    path: str
    width: int
    height: int
    values: StoredValues


def examine(data: bytes, spec: Preprocessing, *, where: str = "image") -> Examined:
    """Decode an encoded image for `spec`, and look at what it stores, which is cheap beside that.

    Raises `ImageError` if it cannot be decoded.
    """
    before = DECODERS.count
    pixels = decode(data, spec=spec, where=where)
    suspect = DECODERS.count > before
    header = _read_header(data)
    kinds = list(_kinds_of_file(data, header))
    step = max(1, int((pixels.shape[0] * pixels.shape[1] / _SAMPLED) ** 0.5))
    sample = pixels[::step, ::step]
    if (sample == sample[0, 0]).all() and (pixels == pixels[0, 0]).all():
        kinds.append(_CONSTANT)
    elif _is_dark(sample):
        kinds.append(_DARK)
    blue, green, red = sample[..., 0], sample[..., 1], sample[..., 2]
    coloured = bool((blue != green).any() or (green != red).any())
    values = StoredValues(tuple(kinds), max_stored(data, where=where), coloured, suspect)
    return Examined(pixels, values, *_mode(data, header))


def _is_dark(sample: Pixels) -> bool:
    """Whether the percentile of the values is at most `MAX_DARK`; it is computed only where a count leaves it open."""
    bright = sample.size - int(np.count_nonzero(sample <= MAX_DARK))
    if bright > (1 - _DARK_PERCENTILE / 100) * sample.size + 1:
        return False
    return bool(np.percentile(sample, _DARK_PERCENTILE) <= MAX_DARK)


def used_bits(largest: int) -> int:
    """Bits of the camera whose largest value is `largest`: 10, 12, 14 or 16."""
    return next(depth for depth in _BITS if largest < 1 << depth)


def examine_files(paths: Iterable[str], bits: int = 0) -> list[StoredImageFile]:
    """Examine some files; those that cannot be read are left out."""
    files = []
    for path in paths:
        with contextlib.suppress(OSError, ImageError):
            found = examine(read_image_bytes(path), Preprocessing(size=1, bits=bits or 16), where=path)
            files.append(StoredImageFile(path, found.pixels.shape[1], found.pixels.shape[0], found.values))
    return files


def check_bits(files: Iterable[StoredImageFile], bits: int) -> None:
    """Check that the images of 16 bits per channel use the `bits` of the recipe; 0: all 16.

    Raises `DataError` if they are seen black, or white, and names the setting that is right. It is decided for all
    images at once, because a depth per image would change the meaning of brightness.
    """
    deep = {file.path: file.values.max_value for file in files if file.values.max_value is not None}
    if not deep:
        return
    brightest = max(deep, key=lambda path: deep[path] or 0)
    largest = deep[brightest] or 0
    used = used_bits(largest)
    count = f"{len(deep)} image{'s' * (len(deep) > 1)} of 16 bits per channel"
    if not bits and used < 16:
        raise DataError(
            f"{count} hold{'s' * (len(deep) == 1)} values up to {largest} of 65535 ({_short(brightest)}) and would be "
            f"seen almost black; write [image] bits = {used} if white is {(1 << used) - 1}, or bits = 16 if they are "
            "meant to be so dark"
        )
    if bits and largest >= 1 << bits:
        raise DataError(
            f"[image] bits = {bits}: {count} hold{'s' * (len(deep) == 1)} values up to {largest}, more than "
            f"{(1 << bits) - 1} ({_short(brightest)}); write bits = {used}"
        )


def describe_values(files: Sequence[StoredImageFile], bits: int = 0) -> list[str]:
    """What is to be known of the images' stored values, a line for each kind with a count and examples."""
    groups: dict[str, list[str]] = {}

    def add(kind: str, file: StoredImageFile) -> None:
        groups.setdefault(kind, []).append(file.path)

    if not files:
        return []
    largest = max((file.values.max_value or 0 for file in files), default=0)
    width, height = median(file.width for file in files), median(file.height for file in files)
    aspect = median(file.width / file.height for file in files)
    coloured = sum(file.values.coloured for file in files)
    for file in files:
        for kind in file.values.kinds:
            add(kind, file)
        if file.values.max_value is not None:
            add(f"of 16 bits per channel: the upper 8 of {bits or 16} bits are used", file)
            if file.values.max_value << 2 <= largest:
                add(f"of 16 bits that are less than a quarter as bright as others (up to {largest})", file)
        if 2 * coloured > len(files) > coloured and not file.values.coloured:
            add("in grey among others in colour: a class must not be known by that", file)
        if max(file.width, file.height) * _SIZE_RATIO <= max(width, height):
            add(f"much smaller than the others (half of them have {width:g} x {height:g} pixels or more)", file)
        elif max(file.width, file.height) >= max(width, height) * _SIZE_RATIO:
            add(f"much larger than the others (half of them have {width:g} x {height:g} pixels or less)", file)
        ratio = file.width / file.height / aspect
        if max(ratio, 1 / ratio) >= _ASPECT_RATIO:
            add("of another shape than the others", file)
    lines = [
        f"{len(paths)} image{'s' * (len(paths) > 1)} {kind} ({_examples(paths)})"
        for kind, paths in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return lines + _describe_damage(files)


def _describe_damage(files: Iterable[StoredImageFile]) -> list[str]:
    """What decoders complain of, a line for each kind; suspects are decoded again, one at a time, to name them."""
    groups: dict[str, list[str]] = {}
    suspects = [file.path for file in files if file.values.suspect]
    for path in suspects[:_MAX_SUSPECTS]:
        with contextlib.suppress(OSError, ImageError):
            for kind in {message_kind(message) for message in decoder_messages(read_image_bytes(path))}:
                groups.setdefault(kind, []).append(path)
    least = "at least " * (len(suspects) > _MAX_SUSPECTS)
    return [
        f"{least}{len(paths)} damaged image{'s' * (len(paths) > 1)}, used as decoded ({kind}): {_examples(paths)}"
        for kind, paths in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _examples(paths: Sequence[str]) -> str:
    return ", ".join(map(_short, paths[:_SHOWN])) + ", …" * (len(paths) > _SHOWN)


class _Header(NamedTuple):
    mode: str
    """Pillow's."""
    info: dict[Any, Any]


def _read_header(data: bytes) -> _Header | None:
    """What Pillow reads without decoding; None for a format that it does not know."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _Header(image.mode, image.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _mode(data: bytes, header: _Header | None) -> tuple[str, int]:
    """Mode and bits per channel, as in `Examined`."""
    if data.startswith(b"\x89PNG"):  # the first chunk holds bit depth and colour type: ISO/IEC 15948, 11.2.2
        depth, kind = data[24], data[25]
        mode = "grey" if kind in (0, 4) else "colour"
        return mode + ("+alpha" if kind in (4, 6) else ""), 8 if kind == 3 else depth
    if header is None:
        return "unknown", 8
    mode = header.mode
    alpha = "+alpha" if mode in ("LA", "La", "PA", "RGBA", "RGBa") else ""
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    return ("grey" if grey else "colour") + alpha, {"1": 1, "I": 32, "F": 32}.get(mode, 16 if "16" in mode else 8)


def _kinds_of_file(data: bytes, header: _Header | None) -> Iterable[str]:
    if data[:2] != b"\xff\xd8":
        stored = inspect_image(data)
        if not isinstance(stored, str):
            if stored.transparent:
                yield _ALPHA
            if stored.further:
                yield _FRAMES if stored.further == "frames" else _PAGES
    if header is None:
        return
    if header.mode == "CMYK":
        yield _CMYK
    name = _profile_name(header.info.get("icc_profile") or b"")
    if name:
        yield f"with the colour profile {name}: the values are used as they are stored"
    elif _other_gamma(header.info):
        yield _GAMMA


@lru_cache(maxsize=64)
def _profile_name(profile: bytes) -> str:
    """Name of a colour profile that is not sRGB; empty for sRGB or without a profile."""
    if not profile:
        return ""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (OSError, ValueError, ImageCms.PyCMSError):
        return "(unreadable)"
    name = " ".join(name.split())[:60]
    return "" if "srgb" in name.lower() else name or "(without a name)"


def _other_gamma(info: dict[Any, Any]) -> bool:
    gamma = info.get("gamma")
    return gamma is not None and "srgb" not in info and not _SRGB_GAMMA[0] <= gamma <= _SRGB_GAMMA[1]


def _short(path: str) -> str:
    """The last folder and the name."""
    return "/".join(Path(path).parts[-2:])
