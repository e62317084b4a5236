"""Preprocessing: the one function that evaluation, calibration, benchmarks and devices share.

Everything here is `uint8`, blue-green-red, height x width x channel, as OpenCV and most cameras deliver it.
Normalisation and channel order are part of the models, so no float image exists outside them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import ImageError
from eyas_device.support.decoders import DECODERS
from eyas_device.support.image_header import FORMATS, describe_start, header_size, jpeg_size, oversize
from eyas_device.support.jpeg import is_cut_short, jpeg_exif, jpeg_frame, jpeg_problem
from eyas_device.support.stored_image import StoredImage, inspect_image, oriented, to_bgr
from eyas_device.support.tiff import exif_orientation

Pixels = npt.NDArray[np.uint8]
"""An image: uint8 [height, width, 3], blue-green-red."""

_MAX_SCRATCH = 8

Scratch = dict[tuple[int, int], Pixels]
"""Buffers for intermediate images by (height, width), reused from frame to frame; starts empty."""


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a frame becomes the model's input; part of every bundle's manifest."""

    size: int
    """Side of the model's square input, pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """`crop` keeps the aspect and cuts the longer side, `pad` keeps it and adds grey, `stretch` ignores it."""
    interpolation: Literal["area", "linear"] = "area"
    """`area` halves the image (2 x 2 means) while that still covers `size`, then interpolates. `linear` interpolates
    directly, which is cheaper and aliases when it shrinks to less than half."""
    crop_fraction: float = 1.0
    """Central fraction that is kept before resizing, above 0 to 1 (1 keeps all)."""
    decode: Literal["full", "reduced"] = "full"
    """`reduced` decodes a JPEG at 1/2, 1/4 or 1/8 scale where that still covers `size`, which is cheaper."""
    bits: int = 16
    """Bits, 9 to 16, that the values of 16-bit images use: 12 for a camera of 12 bits, whose white is 4095."""

    def at_full_scale(self) -> Preprocessing:
        """The same, but decoding at full scale: for images that people look at."""
        return msgspec.structs.replace(self, decode="full")

    def reduction(self, width: int, height: int) -> int:
        """Divisor (1, 2, 4 or 8) of the scale at which a JPEG of width x height pixels is decoded."""
        if self.decode == "full":
            return 1
        side = max(width, height) if self.fit == "pad" else min(width, height)
        return next((by for by in (8, 4, 2) if int(side * self.crop_fraction) // by >= self.size), 1)


_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())  # else Python prints a line per image where nobody configured logging
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def decode(
    data: bytes | memoryview,
    *,
    spec: Preprocessing | None = None,
    where: str = "image",
    kept: tuple[float, float] = (1.0, 1.0),
) -> Pixels:
    """Decode an encoded image (JPEG, PNG, BMP, WebP, TIFF, GIF) to `Pixels`, for the model of `spec` if that is given.

    Grey becomes three equal channels, CMYK becomes BGR, transparency is composited on black, the Exif orientation is
    applied, and of several frames or pages the first is taken. Of 16 bits the upper 8 are kept, of the `spec.bits` that
    are used; colour profiles are ignored. `kept` are the fractions of width and height that are used: the scale follows
    from them.

    Raises `ImageError` if the bytes are not an image, or not a whole one, or one whose values have no plain meaning as
    8-bit colours (floats, signed integers, Lab), or one of more than 50 megapixels or 16384 pixels a side: that is read
    from its header, before any of it is decoded.
    """
    if len(data) == 0:
        raise ImageError(f"{where}: the file is empty (0 bytes); remove it or copy it again")
    if bytes(data[:2]) == b"\xff\xd8":
        return _decode_jpeg(data, spec, where, kept)
    stored = _inspect(data, where)
    pixels = to_bgr(imdecode(stored.data, _flag(stored), where), stored, 16 if spec is None else spec.bits)
    return np.asarray(pixels, dtype=np.uint8)


def max_stored(data: bytes | memoryview, *, where: str = "image") -> int | None:
    """Largest value of an image of 16 bits per channel, as it is stored; None for other images.

    Raises `ImageError` as `decode` does.
    """
    if bytes(data[:2]) == b"\xff\xd8":
        return None
    stored = _inspect(data, where)
    if stored.bits != 16 or stored.scaled:
        return None
    values = imdecode(stored.data, _flag(stored), where)
    return int((values[..., :3] if values.ndim == 3 else values).max())


def decoder_messages(data: bytes) -> list[str]:
    """What the decoder complains of in an image. Raises `ImageError` as `decode` does."""
    messages: list[str] = []
    stored = None if bytes(data[:2]) == b"\xff\xd8" else _inspect(data, "image")
    imdecode(data if stored is None else stored.data, cv2.IMREAD_UNCHANGED, "image", messages)
    return messages


def _decode_jpeg(data: bytes | memoryview, spec: Preprocessing | None, where: str, kept: tuple[float, float]) -> Pixels:
    size = check_encoded(data, where=where)
    if is_cut_short(data):
        raise ImageError(f"{where}: a JPEG of {len(data)} bytes that is cut short (it has no end marker)")
    frame = jpeg_frame(data)
    if frame is not None and (problem := jpeg_problem(frame)):
        raise ImageError(f"{where}: {problem}")
    exif = jpeg_exif(data)
    flag = cv2.IMREAD_COLOR
    if spec is not None and spec.decode == "reduced":
        flag = _REDUCED.get(spec.reduction(*_kept_size(size, kept, turned=bool(exif))), flag)
    # OpenCV 4.8 overlooks Exif data behind other metadata, and all versions an orientation of 32 bits
    pixels = np.asarray(imdecode(data, flag | cv2.IMREAD_IGNORE_ORIENTATION, where), dtype=np.uint8)
    return oriented(pixels, exif_orientation(exif)) if exif else pixels


def _inspect(data: bytes | memoryview, where: str) -> StoredImage:
    check_encoded(data, where=where)
    stored = inspect_image(data)
    if isinstance(stored, str):
        raise ImageError(f"{where}: {stored}")
    return stored


def _flag(stored: StoredImage) -> int:
    return cv2.IMREAD_UNCHANGED if stored.as_stored else cv2.IMREAD_COLOR


def imdecode(data: bytes | memoryview, flag: int, where: str, complaints: list[str] | None = None) -> npt.NDArray[Any]:
    """Decode with OpenCV; what its decoders print is logged, or added to `complaints`.

    Raises `ImageError` if there is no image.
    """
    try:
        with DECODERS.kept() as messages:
            values = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flag)
    except (cv2.error, SystemError, MemoryError) as error:
        reason = " ".join(str(getattr(error, "err", "") or error).split())
        raise ImageError(f"{where}: not an image that can be decoded ({reason})") from None
    if values is None:
        reason = messages[0] if messages else "it is damaged, or of a rare kind"
        raise ImageError(f"{where}: not an image that can be decoded: {reason}")
    if complaints is not None:
        complaints += messages
        return np.asarray(values)
    for message in messages:
        _logger.warning("%s: damaged, but decoded: %s", where, message)
    return np.asarray(values)


def _kept_size(size: tuple[int, int], kept: tuple[float, float], *, turned: bool) -> tuple[int, int]:
    """Width and height of what is used; of an image that may be `turned`, the smaller of both ways."""
    if turned:
        kept = (min(kept), min(kept))
    return int(size[0] * kept[0]), int(size[1] * kept[1])


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height in a JPEG's header, pixels, without decoding it; None for other or broken bytes."""
    return jpeg_size(data)


def check_encoded(data: bytes | memoryview, *, where: str = "image") -> tuple[int, int]:
    """Width and height in the header of an encoded image, pixels, without decoding it.

    Raises `ImageError` for bytes that are no image, and for one of more than 50 megapixels or 16384 pixels a side.
    """
    size = header_size(data)
    if size is None:
        what = describe_start(data)
        raise ImageError(f"{where}: not an image that can be decoded{f': {what}' * bool(what)}; allowed are {FORMATS}")
    if problem := oversize(*size):
        raise ImageError(f"{where}: {problem}")
    return size


def read_image(path: Path, spec: Preprocessing | None = None) -> Pixels:
    """Read and decode an image file, for the model of `spec` if that is given.

    Raises `ImageError` naming the file if it cannot be read or decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    return decode(data, spec=spec, where=str(path))


def as_bgr(frame: npt.NDArray[np.uint8]) -> Pixels:
    """View or convert a uint8 frame ([h, w], [h, w, 1|3|4]) as BGR [h, w, 3]. Raises `ImageError` for other kinds."""
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or 0 in frame.shape:
        raise ImageError(
            f"frame of dtype {frame.dtype} and shape {frame.shape}; uint8 [h, w] or [h, w, 1|3|4] is allowed"
        )
    channels = 1 if frame.ndim == 2 else frame.shape[2]
    if channels == 3:
        return frame
    if channels == 1:
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    if channels == 4:
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGRA2BGR), dtype=np.uint8)
    raise ImageError(f"frame with {channels} channels; 1, 3 or 4 are allowed")


def prepare(
    frame: npt.NDArray[np.uint8], spec: Preprocessing, *, out: Pixels | None = None, scratch: Scratch | None = None
) -> Pixels:
    """Crop, pad and resize a frame to the model's square input.

    Args:
        frame: uint8 [h, w] or [h, w, 1|3|4] (grey, BGR, BGRA).
        spec: How to fit and interpolate.
        out: Where to write, uint8 [size, size, 3]; a new array by default.
        scratch: Buffers that are reused from call to call.

    Returns:
        uint8 [size, size, 3] BGR.

    Raises:
        ImageError: The frame has another type or shape, or `out` the wrong one.

    >>> spec = Bundle.open("runs/shapes/bundle").manifest.preprocessing
    >>> with open_camera("fake:?size=640x480") as camera:
    ...     frame = camera.capture().pixels()
    >>> frame.shape, prepare(frame, spec).shape
    ((480, 640, 3), (16, 16, 3))

    """
    image = as_bgr(frame)
    size = spec.size
    height, width = image.shape[:2]
    if spec.fit == "crop" or spec.crop_fraction < 1.0:
        keep_w, keep_h = width * spec.crop_fraction, height * spec.crop_fraction
        if spec.fit == "crop":
            keep_w = keep_h = min(keep_w, keep_h)
        image = _centre(image, max(1, round(keep_w)), max(1, round(keep_h)))
        height, width = image.shape[:2]
    if out is None:
        out = np.empty((size, size, 3), dtype=np.uint8)
    elif out.shape != (size, size, 3) or out.dtype != np.uint8:
        raise ImageError(f"out is {out.dtype} {out.shape}; uint8 ({size}, {size}, 3) is needed")
    if spec.fit == "pad" and height != width:
        scale = size / max(height, width)
        inner_w, inner_h = max(1, round(width * scale)), max(1, round(height * scale))
        out[...] = 128
        left, top = (size - inner_w) // 2, (size - inner_h) // 2
        _resize(image, out[top : top + inner_h, left : left + inner_w], spec, scratch)
        return out
    _resize(image, out, spec, scratch)
    return out


def _resize(image: Pixels, out: Pixels, spec: Preprocessing, scratch: Scratch | None) -> None:
    """Fill `out` with `image`."""
    height, width = out.shape[:2]
    method = cv2.INTER_LINEAR
    if spec.interpolation == "area":
        while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
            half_h, half_w = image.shape[0] // 2, image.shape[1] // 2
            even = image[: 2 * half_h, : 2 * half_w]
            image = cv2.resize(
                even, (half_w, half_h), dst=_buffer(scratch, half_h, half_w), interpolation=cv2.INTER_AREA
            )
        if image.shape[0] >= 2 * height or image.shape[1] >= 2 * width:  # one side only: `stretch`
            method = cv2.INTER_AREA
    # OpenCV refuses a dst that is not contiguous, and silently allocates a new one if it cannot use it.
    written = cv2.resize(image, (width, height), dst=out if out.flags.c_contiguous else None, interpolation=method)
    if not np.may_share_memory(written, out):
        out[...] = written


def _buffer(scratch: Scratch | None, height: int, width: int) -> Pixels | None:
    if scratch is None:
        return None
    buffer = scratch.get((height, width))
    if buffer is None:
        if len(scratch) >= _MAX_SCRATCH:  # a source whose size keeps changing
            scratch.clear()
        buffer = scratch[height, width] = np.empty((height, width, 3), dtype=np.uint8)
    return buffer


def _centre(image: Pixels, width: int, height: int) -> Pixels:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
