"""Image files of every kind become the colours that they mean, the same with every OpenCV, or are refused in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.errors import ImageError
from eyas_device.preprocess import Preprocessing, decode, max_stored
from tests.support.stored_images import GREY, RGB, big_endian, files, png, refused, saved, three, tiff

FILES = files()
WHOLE_BEFORE_THE_END = ("png trailing bytes", "jpeg padded", "jpeg with", "jpeg multi-picture", "tiff pages")
"""What follows the image is no part of it."""
_DEVICE = Path(__file__).resolve().parents[3] / "device"
_OLD = """
import pathlib, sys, cv2, numpy as np
from eyas_device.errors import ImageError
from eyas_device.preprocess import decode
cut = wrong = answered = unreadable = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.bin")):
    data, means = path.read_bytes(), np.load(path.with_suffix(".npy"))
    try: pixels = decode(data)[..., ::-1].astype(int)
    except ImageError: unreadable += 1; print("unreadable", path.stem); continue
    if pixels.shape != means.shape or abs(pixels - means).max() > 3: wrong += 1; print("wrong", path.stem)
    if path.with_suffix(".open").exists(): continue
    for end in {*range(0, len(data), 1 + len(data) // 200), *range(len(data) - 4, len(data))}:
        cut += 1
        try: decode(data[:end])
        except ImageError: continue
        answered += 1; print("answered", path.stem, end, len(data))
print(cv2.__version__, f"{wrong} wrong, {unreadable} unreadable, {answered} of {cut} cut ones answered")
sys.exit(bool(wrong or answered))
"""


@pytest.mark.parametrize("name", FILES)
def test_colours_are_as_meant(name: str) -> None:
    stored = FILES[name]
    pixels = decode(stored.data, where=name)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape == stored.means.shape
    assert np.abs(pixels[..., ::-1].astype(int) - stored.means).max() <= stored.tolerance


@pytest.mark.parametrize("name", refused())
def test_values_without_a_plain_meaning_are_refused(name: str) -> None:
    data, message = refused()[name]
    with pytest.raises(ImageError) as caught:
        decode(data, where="in/x.png")
    assert str(caught.value).startswith("in/x.png: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def _ends(data: bytes) -> set[int]:
    return {*range(0, len(data), 1 + len(data) // 150), *range(max(0, len(data) - 4), len(data))}


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(WHOLE_BEFORE_THE_END)])
def test_a_cut_file_is_refused_whatever_opencv_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older OpenCVs answer a part of a JPEG, and all answer the start of some BMP and TIFF files."""
    data = FILES[name].data
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((24, 40, 3), 128, dtype=np.uint8))
    answered = []
    for end in _ends(data):
        try:
            decode(data[:end])
        except ImageError:
            continue
        answered.append(end)
    assert not answered, f"of {len(data)}"


def test_a_torn_jpeg_before_a_whole_one_is_cut_short() -> None:
    data = saved(RGB, "JPEG", quality=95)
    with pytest.raises(ImageError, match="cut short"):
        decode(data[:-20] + data)
    assert decode(data + data[: len(data) // 2]).shape == RGB.shape


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff white is zero"])
def test_16_bits_are_shown_by_the_bits_that_are_used(kind: str, bits: int) -> None:
    values = (GREY.astype(np.uint16) << (bits - 8)) | 1
    top = (1 << bits) - 1
    if kind == "png":
        data = png(big_endian(values), 16, 0)
    else:
        data = tiff(
            values if kind == "tiff" else top - values, photometric="miniswhite" if "white" in kind else "minisblack"
        )
    spec = Preprocessing(size=8, bits=bits)
    assert np.array_equal(decode(data, spec=spec), three(GREY))
    assert max_stored(data) == (values if kind != "tiff white is zero" else top - values).max()
    if bits < 16:  # one value beyond the range is white, not dark
        values[0, 0] = 1 << bits
        assert (decode(png(big_endian(values), 16, 0), spec=spec)[0, 0] == 255).all()


@pytest.mark.parametrize("name", ["png alpha", "tiff 12 packed", "jpeg cmyk", "png 4", "tiff palette"])
def test_the_bits_are_of_16_bit_values_alone(name: str) -> None:
    data = FILES[name].data
    assert np.array_equal(decode(data), decode(data, spec=Preprocessing(size=8, bits=12)))
    assert max_stored(data) is None


@pytest.mark.skipif("EYAS_OLD_OPENCV" not in os.environ, reason="EYAS_OLD_OPENCV names a Python with another OpenCV")
def test_another_opencv_shows_the_same(tmp_path: Path) -> None:
    for name, stored in FILES.items():
        path = tmp_path / f"{name.replace(' ', '_')}.bin"
        path.write_bytes(stored.data)
        np.save(path.with_suffix(".npy"), stored.means)
        if name.startswith(WHOLE_BEFORE_THE_END):
            path.with_suffix(".open").touch()
    done = subprocess.run(
        [os.environ["EYAS_OLD_OPENCV"], "-c", _OLD, str(tmp_path)],
        env={"PYTHONPATH": str(_DEVICE), "OPENCV_LOG_LEVEL": "SILENT"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, file=sys.stderr)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted([*FILES, *refused()])),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=5
    ),
    bits=st.sampled_from([9, 12, 16]),
)
def test_damage_anywhere_gives_an_image_or_one_line(
    name: str, edits: list[tuple[float, int, bytes]], bits: int
) -> None:
    data = bytearray(FILES[name].data if name in FILES else refused()[name][0])
    for where, length, new in edits:  # most in the header, where they matter
        at = int(where**2 * len(data))
        data[at : at + length] = new
    try:
        pixels = decode(bytes(data), spec=Preprocessing(size=8, bits=bits, decode="reduced"), where="x")
        max_stored(bytes(data))
    except ImageError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
