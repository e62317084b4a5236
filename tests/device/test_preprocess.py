"""Any image a camera or a person delivers becomes the same model input; Pillow and numpy are the second opinion."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from eyas_device.errors import ImageError
from eyas_device.preprocess import Preprocessing, as_bgr, decode, prepare, read_image
from tests.support import tiny

IMAGE = tiny.draw_shape("cross", 1, 40, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """BGR pixels as Pillow decodes them."""
    from PIL import ImageOps

    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))[:, :, ::-1]


RGB = Image.fromarray(IMAGE[:, :, ::-1])


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encoded(RGB, "PNG"), 0),
        (encoded(RGB, "BMP"), 0),
        (encoded(RGB, "TIFF"), 0),
        (encoded(RGB, "WEBP", lossless=True), 0),
        (encoded(RGB, "JPEG", quality=95), 3),
        (encoded(RGB.convert("L"), "PNG"), 0),
        (encoded(RGB.convert("L"), "JPEG"), 2),
        (encoded(RGB.convert("P"), "PNG"), 0),
        (encoded(RGB.convert("1"), "PNG"), 0),
        (encoded(RGB.convert("CMYK"), "JPEG", quality=95), 4),
    ],
    ids=["png", "bmp", "tiff", "webp", "jpeg", "grey-png", "grey-jpeg", "palette", "1-bit", "cmyk"],
)
def test_decoding_agrees_with_pillow(data: bytes, tolerance: int) -> None:
    ours, theirs = decode(data), by_pillow(data)
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, "JPEG", quality=95, exif=exif)
    ours, theirs = decode(data), by_pillow(data)
    assert ours.shape == ((40, 30, 3) if orientation >= 5 else (30, 40, 3))
    assert np.abs(ours.astype(int) - theirs).max() <= 3


def test_16_bit_keeps_the_high_byte() -> None:
    deep = (IMAGE[:, :, 0].astype(np.uint16) << 8) | 0x12
    pixels = decode(cv2.imencode(".png", deep)[1].tobytes())
    assert pixels.dtype == np.uint8
    for channel in range(3):
        assert np.array_equal(pixels[:, :, channel], IMAGE[:, :, 0])


def test_the_fourth_channel_of_a_frame_is_padding() -> None:
    assert np.array_equal(as_bgr(np.dstack([IMAGE, np.full(IMAGE.shape[:2], 7, np.uint8)])), IMAGE)


@pytest.mark.parametrize("channels", [None, 1], ids=["2d", "3d"])
def test_grey_becomes_three_equal_channels(channels: int | None) -> None:
    grey = IMAGE[:, :, 1] if channels is None else IMAGE[:, :, 1:2]
    assert np.array_equal(as_bgr(grey), np.repeat(IMAGE[:, :, 1:2], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"junk", "not an image"),
        (encoded(RGB, "PNG")[:40], "not an image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 64, "not an image"),
    ],
    ids=["zero-byte", "junk", "cut-png", "jpeg-header-only"],
)
def test_bytes_that_are_not_an_image(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "frame.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_an_image_or_an_image_error(data: bytes) -> None:
    try:
        pixels = decode(data)
    except ImageError:
        return
    assert pixels.ndim == 3


def jpegs() -> dict[str, bytes]:
    """JPEGs of all structures, one with a thumbnail, which has an end marker of its own."""
    noise = np.random.default_rng(5).integers(0, 40, (120, 160, 3), dtype=np.uint8)
    image = np.dstack([np.tile(np.arange(160, dtype=np.uint8), (120, 1))] * 3) + noise
    options = {
        "baseline": [],
        "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        "restart": [cv2.IMWRITE_JPEG_RST_INTERVAL, 4],
        "grey": [],
    }
    made = {
        name: cv2.imencode(".jpg", image[..., 0] if name == "grey" else image, flags)[1].tobytes()
        for name, flags in options.items()
    }
    thumbnail = cv2.imencode(".jpg", image[:16, :16])[1].tobytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    return made | {"thumbnail": made["baseline"][:2] + segment + made["baseline"][2:]}


@pytest.mark.parametrize("name", jpegs())
@pytest.mark.parametrize("kind", ["full", "reduced"])
def test_a_jpeg_that_is_cut_short_is_refused_by_every_opencv(
    name: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions before 4.11 return what they could read, and grey."""
    data, spec = jpegs()[name], Preprocessing(size=16, decode=kind)
    assert decode(data, spec=spec).size and decode(data + b"\0" * 300, spec=spec).size, "cameras pad"
    assert decode(memoryview(data), spec=spec).size and decode(data + data, spec=spec).size
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((120, 160, 3), 128, dtype=np.uint8))
    for part in (0.98, 0.6, 0.3):
        with pytest.raises(ImageError, match=r"seen here: a JPEG of \d+ bytes that is cut short"):
            decode(data[: int(len(data) * part)], spec=spec, where="seen here")


def test_a_missing_file() -> None:
    with pytest.raises(ImageError, match=r"nowhere/x\.png: cannot be read"):
        read_image(Path("nowhere/x.png"))


@pytest.mark.parametrize(
    "frame",
    [np.zeros((4, 4), np.float32), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8)],
    ids=["float", "1d", "empty", "2-channels"],
)
def test_unsupported_frames_are_rejected(frame: np.ndarray) -> None:
    with pytest.raises(ImageError, match="allowed"):
        prepare(frame, tiny.SPEC)


SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))
FITS = st.sampled_from(["crop", "stretch", "pad"])
METHODS = st.sampled_from(["area", "linear"])


@settings(max_examples=200, deadline=None)
@given(
    shape=SHAPES,
    channels=st.sampled_from([None, 1, 3, 4]),
    fit=FITS,
    method=METHODS,
    size=st.integers(8, 64),
    part=st.floats(0.05, 1.0),
    seed=st.integers(0, 9),
)
def test_every_shape_fits(
    shape: tuple[int, int], channels: int | None, fit: str, method: str, size: int, part: float, seed: int
) -> None:
    full = shape if channels is None else (*shape, channels)
    frame = np.random.default_rng(seed).integers(0, 256, full, dtype=np.uint8)
    before = frame.copy()
    spec = Preprocessing(size=size, fit=fit, interpolation=method, crop_fraction=part)
    out = np.full((size, size, 3), 77, dtype=np.uint8)
    prepared = prepare(frame, spec, out=out)
    assert np.shares_memory(prepared, out), "not written to `out`"
    assert np.array_equal(out, prepare(frame, spec)), "`out` was not written"
    assert np.array_equal(frame, before), "the frame was changed"


@settings(max_examples=60, deadline=None)
@given(scale=st.sampled_from([1, 2, 4]), size=st.integers(8, 24), wide=st.integers(0, 40), tall=st.booleans())
def test_crop_is_the_centre_averaged(scale: int, size: int, wide: int, tall: bool) -> None:
    """By `area` at a ratio of 2, 4, ..., each output pixel is the mean of its block: numpy computes that as well."""
    side = size * scale
    shape = (side + 2 * wide, side, 3) if tall else (side, side + 2 * wide, 3)
    frame = np.random.default_rng(wide).integers(0, 256, shape, dtype=np.uint8)
    centre = frame[wide : wide + side] if tall else frame[:, wide : wide + side]
    blocks = centre.reshape(size, scale, size, scale, 3).mean(axis=(1, 3))
    assert np.abs(prepare(frame, Preprocessing(size=size)) - blocks).max() <= 0.51 + 0.5 * np.log2(scale)


@pytest.mark.parametrize(("height", "width"), [(20, 60), (60, 20)])
def test_pad_keeps_everything_and_adds_grey(height: int, width: int) -> None:
    out = prepare(np.full((height, width, 3), 200, np.uint8), Preprocessing(size=30, fit="pad"))
    image = out if width > height else out.transpose(1, 0, 2)
    assert (image[10:20] == 200).all()
    assert (image[:10] == 128).all()
    assert (image[20:] == 128).all()


def halved_then_interpolated(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """The second formulation of `area`: 2 x 2 means in numpy, then bilinear interpolation written out."""
    image = frame.astype(np.float64)
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
        rows, columns = image.shape[0] // 2, image.shape[1] // 2
        image = np.round(image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3)))

    def places(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(centre).astype(int)
        return low, np.minimum(low + 1, old - 1), centre - low

    top, bottom, down = places(height, image.shape[0])
    left, right, across = places(width, image.shape[1])
    rows_ = image[top] * (1 - down)[:, None, None] + image[bottom] * down[:, None, None]
    return rows_[:, left] * (1 - across)[:, None] + rows_[:, right] * across[:, None]


@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 40), st.integers(0, 9))
def test_area_halves_and_then_interpolates(height: int, width: int, size: int, seed: int) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    halvings = min(int(np.log2(max(1.0, side / size))) for side in (height, width))
    assume(max(height, width) >> halvings < 2 * size)  # else one side alone still has to shrink to less than half
    scratch: dict[tuple[int, int], np.ndarray] = {}
    ours = prepare(frame, Preprocessing(size=size, fit="stretch"), scratch=scratch)
    assert np.abs(ours - halved_then_interpolated(frame, size, size)).max() <= 2
    again = prepare(frame, Preprocessing(size=size, fit="stretch"), scratch=scratch)
    assert np.array_equal(ours, again)


@pytest.mark.parametrize("shape", [(480, 640), (111, 100), (200, 64)])
def test_area_does_not_alias(shape: tuple[int, int]) -> None:
    """Lines of one pixel become grey; picked pixels would become stripes."""
    frame = np.zeros((*shape, 3), np.uint8)
    frame[::2] = 255
    for fit in ("crop", "stretch", "pad"):
        out = prepare(frame, Preprocessing(size=32, fit=fit)).astype(int)  # type: ignore[arg-type]
        image = out[8:24, 12:20]
        assert image.max() - image.min() < 60, f"{fit}: {image.min()} to {image.max()}"


@pytest.mark.parametrize("size", [10, 17])
def test_stretch_is_near_pillows_box_filter(size: int) -> None:
    frame = decode(encoded(RGB, "PNG"))
    theirs = np.asarray(Image.fromarray(frame[:, :, ::-1]).resize((size, size), Image.Resampling.BOX))[:, :, ::-1]
    ours = prepare(frame, Preprocessing(size=size, fit="stretch"))
    assert np.abs(ours.astype(int) - theirs).mean() < 6


@pytest.mark.parametrize(
    "out", [np.zeros((15, 16, 3), np.uint8), np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32)]
)
def test_an_out_of_the_wrong_shape_is_rejected(out: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"uint8 \(16, 16, 3\) is needed"):
        prepare(IMAGE, tiny.SPEC, out=out)


@pytest.mark.parametrize(
    "out",
    [np.zeros((16, 3, 16), np.uint8).transpose(0, 2, 1), np.zeros((32, 32, 3), np.uint8)[::2, ::2]],
    ids=["transposed", "strided"],
)
def test_an_out_of_any_layout_is_written(out: np.ndarray) -> None:
    assert prepare(IMAGE, tiny.SPEC, out=out) is out
    assert np.array_equal(out, prepare(IMAGE, tiny.SPEC))


def test_array_views_are_prepared_like_copies() -> None:
    for view in (IMAGE[::-1], IMAGE[:, ::-1], IMAGE[:, :, ::-1], IMAGE[::2, ::2], IMAGE.transpose(1, 0, 2)):
        assert np.array_equal(prepare(view, tiny.SPEC), prepare(np.ascontiguousarray(view), tiny.SPEC))
