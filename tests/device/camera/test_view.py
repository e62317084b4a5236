"""The view of a camera: turned, mirrored and cropped images, for raw pixels and for JPEGs at every scale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.snapshot import take
from eyas_device.camera import Frame, ViewedCamera, open_camera, open_configured
from eyas_device.camera.fake import FakeCamera
from eyas_device.camera.view import View
from eyas_device.config import CameraSection, read_config
from eyas_device.errors import ConfigError
from eyas_device.ood import OodJudge
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels, Preprocessing, decode, prepare
from tests.support import tiny


def numbered(height: int, width: int) -> Pixels:
    """An image whose pixels are all different."""
    count = np.arange(height * width, dtype=np.uint32)
    return (
        np.stack([count % 251, count // 251 % 251, count // 63001], axis=-1).astype(np.uint8).reshape(height, width, 3)
    )


def expected(image: Pixels, view: View) -> Pixels:
    """The same with numpy: turn, mirror, and then cut out."""
    image = np.rot90(image, -view.rotate // 90)
    if view.flip in ("horizontal", "both"):
        image = image[:, ::-1]
    if view.flip in ("vertical", "both"):
        image = image[::-1]
    if view.region:
        height, width = image.shape[:2]
        left, top, wide, high = view.region
        image = image[
            round(top * height) : round((top + high) * height), round(left * width) : round((left + wide) * width)
        ]
    return image


FLIPS = ("none", "horizontal", "vertical", "both")
TURNED = [View(rotate=r, flip=f) for r, f in itertools.product((0, 90, 180, 270), FLIPS)]


@given(
    view=st.sampled_from(TURNED),
    size=st.tuples(st.integers(20, 61), st.integers(20, 61)),
    box=st.tuples(*[st.integers(0, 10)] * 2, *[st.integers(1, 10)] * 2),
    scale=st.sampled_from([20.0, 23.0]),
)
def test_turning_mirroring_and_cropping_are_those_of_numpy(
    view: View, size: tuple[int, int], box: tuple[int, int, int, int], scale: float
) -> None:
    image = numbered(*size)
    view = View(view.rotate, view.flip, tuple(part / scale for part in box))
    wanted = expected(image, view)
    if wanted.size:
        assert np.array_equal(view.apply(image), wanted)
        assert np.array_equal(view.apply(image[..., 0]), wanted[..., 0])


def test_a_sliver_keeps_a_pixel() -> None:
    for rotate in (0, 90, 180, 270):
        assert View(rotate=rotate, region=(0.999, 0.0, 0.001, 0.001)).apply(numbered(30, 40)).shape[:2] == (1, 1)


def jpeg(image: Pixels, exif: int = 0) -> bytes:
    """A JPEG; `exif` is its orientation."""
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, exif, 0, 0]) + bytes(4)
    segment = b"Exif\0\0" + tiff
    return data if not exif else data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


def smooth(height: int, width: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.dstack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)]).astype(np.uint8)


@pytest.mark.parametrize("view", TURNED, ids=lambda v: f"{v.rotate}-{v.flip}")
@pytest.mark.parametrize("kind", ["full", "reduced"])
def test_a_turned_camera_with_the_view_gives_the_upright_images_prediction(
    pristine_bundle: Path, view: View, kind: Any
) -> None:
    """The camera hangs as the view undoes: what is upright comes turned, and is turned back."""
    upright = cv2.resize(tiny.draw_shape("stripes", 3), (64, 48), interpolation=cv2.INTER_NEAREST)
    hung = np.ascontiguousarray(upright)
    if view.flip in ("horizontal", "both"):
        hung = hung[:, ::-1]
    if view.flip in ("vertical", "both"):
        hung = hung[::-1]
    hung = np.ascontiguousarray(np.rot90(hung, view.rotate // 90))
    with Classifier.open(pristine_bundle) as classifier:
        wanted = classifier.predict(upright).probabilities
        assert np.array_equal(classifier.predict(Frame(hung, 0.0, "x", view=view).pixels()).probabilities, wanted)
    spec = Preprocessing(size=16, decode=kind)
    seen = prepare(Frame(jpeg(hung), 0.0, "x", view=view).pixels(spec), spec).astype(int)
    assert np.abs(seen - prepare(upright, spec)).mean() < 12


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_a_region_is_what_cropping_before_gives(rotate: Any) -> None:
    image, view = smooth(720, 1280), View(rotate=rotate, region=(0.25, 0.5, 0.5, 0.25))
    encoded = jpeg(image)
    cut = expected(decode(encoded), view)
    assert np.array_equal(Frame(encoded, 0.0, "x", view=view).pixels(), cut)
    spec = Preprocessing(size=96)
    assert np.array_equal(prepare(Frame(encoded, 0.0, "x", view=view).pixels(spec), spec), prepare(cut, spec))


@pytest.mark.parametrize(
    ("view", "size", "shape"),
    [
        (View(), 160, (180, 320)),  # 1/4
        (View(region=(0.25, 0.25, 0.5, 0.5)), 160, (180, 320)),  # 1/2 of half the image
        (View(region=(0.0, 0.0, 1.0, 0.25)), 160, (180, 1280)),  # a whole strip is needed as it is
        (View(rotate=90, region=(0.0, 0.0, 0.25, 1.0)), 160, (1280, 180)),  # the same strip, turned
        (View(rotate=90, region=(0.0, 0.0, 1.0, 0.5)), 160, (160, 180)),  # half of the camera's width
    ],
)
def test_the_scale_of_decoding_follows_from_the_region(view: View, size: int, shape: tuple[int, int]) -> None:
    frame = Frame(jpeg(smooth(720, 1280)), 0.0, "x", view=view)
    spec = Preprocessing(size=size, decode="reduced")
    seen = frame.pixels(spec)
    assert seen.shape[:2] == shape
    whole = prepare(frame.pixels(), Preprocessing(size=size)).astype(int)
    assert np.abs(prepare(seen, spec).astype(int) - whole).max() <= 6


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_exif_orientation_comes_first(orientation: int) -> None:
    view = View(rotate=90, flip="vertical", region=(0.0, 0.5, 0.25, 0.5))
    turned = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]
    encoded = jpeg(smooth(480, 640), orientation)
    upright = View(rotate=turned).apply(decode(jpeg(smooth(480, 640))))  # type: ignore[arg-type]
    assert np.array_equal(Frame(encoded, 0.0, "x", view=view).pixels(), expected(upright, view))
    small = Frame(encoded, 0.0, "x", view=view).pixels(Preprocessing(size=100, decode="reduced"))
    assert min(small.shape[:2]) >= 100, "a region may lie along either side of the stored image"


def test_the_loop_the_judge_and_the_snapshot_see_the_view(pristine_bundle: Path, tmp_path: Path) -> None:
    upright = tiny.draw_shape("disc", 4)
    hung = np.ascontiguousarray(np.rot90(np.pad(upright, ((0, 8), (0, 24), (0, 0))), 1))  # in a corner, turned
    height, width = upright.shape[:2]
    view = View(rotate=90, region=(0.0, 0.0, width / (width + 24), height / (height + 8)))
    seen: list[FramePrediction] = []

    class Recorder(Listener):
        def on_prediction(self, predicted: FramePrediction) -> None:
            seen.append(predicted)

    with Classifier.open(pristine_bundle) as classifier:
        wanted = classifier.predict(upright)
        camera = ViewedCamera(FakeCamera([Frame(hung, 0.0, "x")]), view)
        Loop(classifier, camera, [Recorder()]).run()
        assert np.array_equal(seen[0].prediction.probabilities, wanted.probabilities)
        assert np.array_equal(seen[0].frame.pixels(), upright), "events take their images here"
        plain, viewed = OodJudge(classifier.bundle), OodJudge(classifier.bundle)
        plain.measure(upright)
        viewed.measure(seen[0].frame.pixels(classifier.spec))
        assert plain.judgement() == viewed.judgement()
        snapshot = take(seen[0].frame, classifier, tmp_path)
    assert np.array_equal(cv2.imread(str(tmp_path / snapshot.frame)), upright)
    assert snapshot.label == wanted.label and np.array_equal(
        cv2.imread(str(tmp_path / snapshot.input)), prepare(upright, classifier.spec)
    )


def test_the_configuration_names_the_view(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(
        '[camera]\nsource = "fake:?frames=1&size=64x48"\nrotate = 270\nflip = "both"\nregion = [0.5, 0, 0.5, 1]\n'
    )
    section = read_config(tmp_path / "device.toml").camera
    with open_configured(section) as camera, open_camera(section.source) as bare:
        frame, plain = camera.capture(), bare.capture()
    assert frame is not None and plain is not None and frame.image == plain.image
    assert np.array_equal(frame.pixels(), expected(plain.pixels(), View(270, "both", (0.5, 0, 0.5, 1))))
    with open_configured(CameraSection(source="fake:", region=(0.0, 0.0, 1.0, 1.0))) as camera:
        frame = camera.capture()
        assert frame is not None and frame.view is None, "the whole image costs nothing"


@pytest.mark.parametrize(
    "line",
    [
        "rotate = 45",
        "rotate = 90.5",
        'flip = "left"',
        "region = [0, 0, 1]",
        "region = [0.5, 0, 0.6, 1]",
        "region = [0, 0, 0, 1]",
    ],
)
def test_an_impossible_view_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "device.toml").write_text(f"[camera]\n{line}\n")
    with pytest.raises(ConfigError, match=rf"\[camera\] {line.split()[0]} = .*"):
        read_config(tmp_path / "device.toml")
