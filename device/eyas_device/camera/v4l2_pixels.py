"""From the pixels that a V4L2 driver delivers to BGR.

Most cameras deliver YCbCr as OpenCV converts it: BT.601, limited range. HDMI inputs and a few cameras deliver BT.709,
BT.2020 or full range, and RGB of limited range. Source of the layouts and matrices: the kernel's "Video for Linux API",
chapters "Image Formats" and "Detailed Colorspace Descriptions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyas_device.camera.v4l2_device import PixelFormat
from eyas_device.errors import ImageError

Bytes = npt.NDArray[np.uint8]
JPEG = ("MJPG", "JPEG")
"""Formats that stay encoded."""


class _Layout(NamedTuple):
    """How one image lies in memory."""

    kind: str
    """`packed`, or where chroma lies: `semiplanar` (a plane of pairs), `planar` (two planes)."""
    convert: Callable[[Bytes], npt.NDArray[np.generic]]
    """From rows of bytes [rows, bytes], without padding, to uint8 BGR or grey."""
    pixel_bytes: int = 1


def _code(code: int, channels: int = 1) -> Callable[[Bytes], npt.NDArray[np.generic]]:
    """An OpenCV conversion of rows with `channels` bytes a pixel."""

    def convert(rows: Bytes) -> npt.NDArray[np.generic]:
        height, row_bytes = rows.shape
        image = rows if channels == 1 else rows.reshape(height, row_bytes // channels, channels)
        return np.asarray(cv2.cvtColor(image, code))

    return convert


def _grey(bits: int, order: str = "<") -> Callable[[Bytes], npt.NDArray[np.generic]]:
    """The upper 8 of the `bits` low bits of 16-bit values."""
    return lambda rows: cv2.cvtColor((rows.view(f"{order}u2") >> (bits - 8)).astype(np.uint8), cv2.COLOR_GRAY2BGR)


def _bayer(code: int, bits: int) -> Callable[[Bytes], npt.NDArray[np.generic]]:
    """A mosaic of 16-bit values."""
    return lambda rows: cv2.cvtColor((rows.view("<u2") >> (bits - 8)).astype(np.uint8), code)


def _copy(rows: Bytes) -> npt.NDArray[np.generic]:
    return rows.reshape(rows.shape[0], -1, 3).copy()  # the driver will write to its own buffer again


# OpenCV names a mosaic by the second row's second and third pixel.
_MOSAICS = {"RGGB": cv2.COLOR_BayerBG2BGR, "BGGR": cv2.COLOR_BayerRG2BGR, "GRBG": cv2.COLOR_BayerGB2BGR}
_MOSAICS["GBRG"] = cv2.COLOR_BayerGR2BGR
_DEEP_MOSAICS = {
    10: {"RG10": "RGGB", "BG10": "BGGR", "BA10": "GRBG", "GB10": "GBRG"},
    12: {"RG12": "RGGB", "BG12": "BGGR", "BA12": "GRBG", "GB12": "GBRG"},
    16: {"RG16": "RGGB", "BYR2": "BGGR", "GR16": "GRBG", "GB16": "GBRG"},
}
LAYOUTS: dict[str, _Layout] = {
    "YUYV": _Layout("packed", _code(cv2.COLOR_YUV2BGR_YUYV, 2), 2),
    "UYVY": _Layout("packed", _code(cv2.COLOR_YUV2BGR_UYVY, 2), 2),
    "YVYU": _Layout("packed", _code(cv2.COLOR_YUV2BGR_YVYU, 2), 2),
    "NV12": _Layout("semiplanar", _code(cv2.COLOR_YUV2BGR_NV12)),
    "NV21": _Layout("semiplanar", _code(cv2.COLOR_YUV2BGR_NV21)),
    "YU12": _Layout("planar", _code(cv2.COLOR_YUV2BGR_I420)),
    "YV12": _Layout("planar", _code(cv2.COLOR_YUV2BGR_YV12)),
    "BGR3": _Layout("packed", _copy, 3),
    "RGB3": _Layout("packed", _code(cv2.COLOR_RGB2BGR, 3), 3),
    "XR24": _Layout("packed", _code(cv2.COLOR_BGRA2BGR, 4), 4),
    "AR24": _Layout("packed", _code(cv2.COLOR_BGRA2BGR, 4), 4),
    "BGR4": _Layout("packed", _code(cv2.COLOR_BGRA2BGR, 4), 4),
    "XB24": _Layout("packed", _code(cv2.COLOR_RGBA2BGR, 4), 4),
    "AB24": _Layout("packed", _code(cv2.COLOR_RGBA2BGR, 4), 4),
    "RGBP": _Layout("packed", _code(cv2.COLOR_BGR5652BGR, 2), 2),
    "RGGB": _Layout("packed", _code(_MOSAICS["RGGB"])),
    "BA81": _Layout("packed", _code(_MOSAICS["BGGR"])),
    "GRBG": _Layout("packed", _code(_MOSAICS["GRBG"])),
    "GBRG": _Layout("packed", _code(_MOSAICS["GBRG"])),
    **{
        code: _Layout("packed", _bayer(_MOSAICS[order], bits), 2)
        for bits, orders in _DEEP_MOSAICS.items()
        for code, order in orders.items()
    },
    "GREY": _Layout("packed", _code(cv2.COLOR_GRAY2BGR)),
    "Y10": _Layout("packed", _grey(10), 2),
    "Y12": _Layout("packed", _grey(12), 2),
    "Y16": _Layout("packed", _grey(16), 2),
    "Y16-BE": _Layout("packed", _grey(16, ">"), 2),
}
"""Code of a format -> its layout, in the order of preference: fewest bytes with full colour first."""


_CHROMA = {
    "YUYV": (0, 1, 3),
    "UYVY": (1, 0, 2),
    "YVYU": (0, 3, 1),
    "NV12": (0, 0, 1),
    "NV21": (0, 1, 0),
    "YU12": (0, 0, 1),
    "YV12": (0, 1, 0),
}
"""YCbCr format -> positions: of luma, Cb and Cr in a group of four bytes; in planes 0, then Cb and Cr in the chroma."""
_EXPAND = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
_WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593), "240": (0.212, 0.087)}
"""Weights of red and blue in luma."""


def _split(rows: Bytes, code: str, height: int) -> list[Bytes]:
    """Luma, Cb and Cr, each [height, width]."""
    luma, blue, red = _CHROMA[code]
    if LAYOUTS[code].kind == "packed":
        return [rows[:, luma::2], *(rows[:, position::4].repeat(2, axis=1) for position in (blue, red))]
    chroma = rows[height:]
    if LAYOUTS[code].kind == "semiplanar":
        both = [chroma[:, position::2] for position in (blue, red)]
    else:
        planes = chroma.reshape(2, height // 2, -1)
        both = [planes[blue], planes[red]]
    return [rows[:height], *(plane.repeat(2, axis=0).repeat(2, axis=1) for plane in both)]


def _matrix(encoding: str, *, full_range: bool) -> npt.NDArray[np.float32]:
    """From luma, Cb and Cr to blue, green and red, [3, 4]."""
    red, blue = _WEIGHTS[encoding]
    green = 1 - red - blue
    luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    to_blue, to_red = 2 * (1 - blue) * chroma, 2 * (1 - red) * chroma
    matrix = np.array(
        [[luma, to_blue, 0], [luma, -to_blue * blue / green, -to_red * red / green], [luma, 0, to_red]], np.float32
    )
    zero = np.array([0 if full_range else 16, 128, 128], np.float32)
    return np.column_stack([matrix, -matrix @ zero])


def to_bgr(data: Bytes, form: PixelFormat) -> npt.NDArray[np.generic]:
    """Convert a buffer to BGR, uint8 [height, width, 3]. Raises `ImageError` if it is shorter than the image."""
    layout, height = LAYOUTS[form.code], form.height
    used = form.width * layout.pixel_bytes
    stride = max(form.row_bytes, used)
    rows = height if layout.kind == "packed" else height + height // 2
    if len(data) < stride * (rows - 1) + used:
        raise ImageError(f"cut short: {len(data)} bytes instead of {stride * rows}")
    lines = _rows(data, layout, height, used, stride)
    try:
        if form.code in _CHROMA and (form.encoding, form.full_range or False) != ("601", False):
            yuv = cv2.merge(_split(lines, form.code, height))
            return np.asarray(cv2.transform(yuv, _matrix(form.encoding, full_range=form.full_range or False)))
        image = layout.convert(lines)
        is_rgb = form.code not in _CHROMA and not form.code.startswith(("Y", "GREY"))
        return np.asarray(cv2.LUT(image, _EXPAND)) if is_rgb and form.full_range is False else image
    except cv2.error as error:
        raise ImageError(f"cannot be decoded ({error.err})") from None


def _rows(data: Bytes, layout: _Layout, height: int, used: int, stride: int) -> Bytes:
    """The image's rows without what pads them, contiguous."""
    rows = height if layout.kind == "packed" else height + height // 2
    if stride == used:
        return data[: rows * used].reshape(rows, used)
    if len(data) < rows * stride:  # the last row may lack its padding
        data = np.concatenate([data, np.zeros(rows * stride - len(data), np.uint8)])
    if layout.kind != "planar":
        return np.ascontiguousarray(data[: rows * stride].reshape(rows, stride)[:, :used])
    luma = data[: height * stride].reshape(height, stride)[:, :used]
    chroma = data[height * stride : rows * stride].reshape(-1, stride // 2)[:, : used // 2]
    return np.concatenate([luma, chroma.reshape(height // 2, used)])
