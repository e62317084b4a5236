"""Whether a camera sees what the model was trained on, and what a snapshot shows of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from eyas_device.agent.loop import FramePrediction
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.snapshot import Snapshot, SnapshotError, take
from eyas_device.bundle import REFERENCE, Bundle
from eyas_device.camera import Frame
from eyas_device.errors import BundleError, ImageError
from eyas_device.ood import describe, distance, ood_quantile
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import Pixels, prepare
from eyas_device.reference import Reference, reference_arrays
from tests.support import tiny
from tests.support.bundles import entry

SIZE = 64
"""Of the images that are described here."""


def shapes(count: int, seed: int) -> list[Pixels]:
    return [tiny.draw_shape(tiny.LABELS[n % 3], seed + n, width=SIZE, height=SIZE) for n in range(count)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return tiny.reference_of(shapes(90, 1000), shapes(60, 5000))


def middle(images: list[Pixels], reference: Reference) -> float:
    return ood_quantile(float(np.median([distance(describe(p), reference) for p in images])), reference)


def test_images_like_the_training_images_are_in_distribution(reference: Reference) -> None:
    assert 0.1 < middle(shapes(30, 9000), reference) < 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda p: np.full_like(p, 128),
        lambda p: np.rot90(p).copy(),
        lambda p: (p // 4).astype(np.uint8),
        lambda p: cv2.GaussianBlur(p, (0, 0), 4),
        lambda p: np.random.default_rng(0).integers(0, 256, p.shape, dtype=np.uint8),
        lambda p: np.roll(p, SIZE // 2, axis=1),
    ],
    ids=["wall", "turned", "dark", "unsharp", "noise", "shifted"],
)
def test_a_camera_that_sees_something_else_is_out_of_distribution(
    change: Callable[[Pixels], Pixels], reference: Reference
) -> None:
    assert middle([change(image) for image in shapes(30, 9000)], reference) > 0.95


def test_the_distance_is_mahalanobis_inside_and_the_residual_outside(reference: Reference) -> None:
    """Second formulation: the covariance matrix that the reference stands for, inverted as a whole."""
    image = describe(shapes(1, 77)[0]).astype(np.float64)
    centred = (image - reference.mean) / reference.scale
    basis = reference.components.astype(np.float64)
    inside = basis.T @ np.diag(reference.spread.astype(np.float64) ** 2) @ basis
    outside = (np.eye(len(centred)) - basis.T @ basis) * reference.residual
    wanted = np.sqrt(centred @ np.linalg.inv(inside + outside) @ centred / (len(basis) + 1))
    assert distance(image.astype(np.float32), reference) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 16, 3), (224, 224, 3), (2048, 2048, 3)])
def test_every_size_has_a_descriptor(shape: tuple[int, ...]) -> None:
    described = describe(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    assert described.shape == (324,)
    assert described.dtype == np.float32
    assert np.isfinite(described).all()


def with_reference(root: Path, edit_manifest: Callable[..., None], **over: object) -> Path:
    train = [prepare(tiny.draw_shape(tiny.LABELS[n % 3], 1000 + n), tiny.SPEC) for n in range(90)]
    reference = reference_arrays(tiny.reference_of(train, train[:40])) | over
    with (root / REFERENCE).open("wb") as stream:
        np.savez(stream, **{name: value for name, value in reference.items() if value is not None})
    edit_manifest(reference=msgspec.to_builtins(entry(root / REFERENCE)))
    return root


def frame_prediction(number: int, image: Pixels) -> FramePrediction:
    frame = Frame(image=image, time=0.0, source=str(number))
    prediction = Prediction("disc", 1, 0.9, False, np.array([0.05, 0.9, 0.05], np.float32), 0.0)
    return FramePrediction(number, "", 0.0, prediction, 0.0, 0.0, 0.0, frame)


def test_the_loop_judges_a_frame_a_second(
    bundle_root: Path, edit_manifest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(with_reference(bundle_root, edit_manifest))
    now = [100.0]
    monkeypatch.setattr("eyas_device.agent.ood.monotonic", lambda: now[0])
    detector = OodDetector(bundle)
    for number in range(60):
        detector.on_prediction(frame_prediction(number, tiny.draw_shape("disc", 300 + number)))
        now[0] += 0.25
    judged = detector.judgement()
    assert judged is not None and judged.images == 15, "one a second"
    assert not judged.ood
    assert str(judged).startswith("in distribution")
    for number in range(40):
        detector.on_prediction(frame_prediction(number, np.full((48, 64, 3), 230, np.uint8)))
        now[0] += 1.0
    judged = detector.judgement()
    assert judged is not None and judged.ood and judged.images == 30
    assert "does not see what the model was trained on" in str(judged)


def test_a_bundle_without_a_reference_judges_nothing(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(reference=None)
    detector = OodDetector(Bundle.open(bundle_root))
    detector.on_prediction(frame_prediction(0, tiny.draw_shape("disc", 1)))
    assert detector.judgement() is None


@pytest.mark.parametrize(
    "over",
    [
        {"mean": None},
        {"mean": np.zeros(7, np.float32)},
        {"scale": np.zeros(324, np.float32)},
        {"residual": np.nan},
        {"residual": -1.0},
        {"spread": np.ones(3, np.float32)},
        {"distances": np.zeros(0, np.float32)},
        {"components": np.zeros(324, np.float32)},
        {"distances": np.array(["x"])},
    ],
    ids=["missing", "short", "zero", "nan", "negative", "spread", "no distances", "flat", "text"],
)
def test_a_malformed_reference_is_refused(
    over: dict[str, object], bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    bundle = Bundle.open(with_reference(bundle_root, edit_manifest, **over))
    with pytest.raises(BundleError, match=r"reference\.npz"):
        bundle.reference()


@pytest.mark.parametrize("encoded", [".jpg", ".png", None])
def test_a_snapshot_holds_the_frame_the_input_and_the_answer(
    encoded: str | None, bundle_root: Path, edit_manifest: Callable[..., None], tmp_path: Path
) -> None:
    image = tiny.draw_shape("stripes", 4)
    image = image if encoded is None else cv2.imencode(encoded, image)[1].tobytes()
    frame = Frame(image=image, time=1_700_000_000.25, source="here")
    with Classifier.open(with_reference(bundle_root, edit_manifest)) as classifier:
        snapshot = take(frame, classifier, tmp_path / "out")
        wanted = prepare(frame.pixels(), classifier.spec)
        prediction = classifier.predict(frame.pixels())
    assert np.array_equal(cv2.imread(str(tmp_path / "out" / snapshot.input)), wanted)
    written = (tmp_path / "out" / snapshot.frame).read_bytes()
    assert written == image if encoded else np.array_equal(cv2.imdecode(np.frombuffer(written, np.uint8), 1), image)
    read_back = msgspec.json.decode((tmp_path / "out" / "20231114T221320.250000Z.json").read_bytes(), type=Snapshot)
    assert read_back == snapshot
    assert (read_back.label, read_back.confidence) == (prediction.label, pytest.approx(prediction.confidence, abs=1e-4))
    assert read_back.ood_quantile is not None and 0 <= read_back.ood_quantile <= 1
    assert len(list((tmp_path / "out").iterdir())) == 3, "a temporary file was left"


def test_a_snapshot_that_cannot_be_written_or_decoded(pristine_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Classifier.open(pristine_bundle) as classifier:
        with pytest.raises(SnapshotError, match="cannot be written"):
            take(Frame(image=tiny.draw_shape("disc", 1), time=0.0, source="x"), classifier, tmp_path / "file" / "x")
        with pytest.raises(ImageError):
            take(Frame(image=b"junk", time=0.0, source="x"), classifier, tmp_path / "out")
    assert not (tmp_path / "out").exists()
