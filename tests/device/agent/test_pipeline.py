"""Sources, the classifier, the golden check and the frame loop, on a real bundle."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.agent.accuracy import Accuracy
from eyas_device.agent.loop import FramePrediction, Listener, Loop, Pace
from eyas_device.agent.signals import Signals
from eyas_device.bundle import GOLDEN, Bundle, Confidence
from eyas_device.camera import Camera, Frame, open_camera
from eyas_device.camera.fake import FakeCamera
from eyas_device.errors import BundleError, CameraError, ImageError, RuntimeUnavailable
from eyas_device.predict import Classifier, calibrated_probabilities
from eyas_device.preprocess import prepare, read_image
from eyas_device.telemetry.aggregate import LoopStats
from eyas_device.updates.golden import check_bundle, check_loaded
from tests.support import tiny
from tests.support.bundles import TEMPERATURE, entry


class Recorder(Listener):
    """Records all callbacks."""

    def __init__(self) -> None:
        self.predictions: list[FramePrediction] = []
        self.reasons: list[str] = []

    def on_prediction(self, predicted: FramePrediction) -> None:
        self.predictions.append(predicted)

    def on_unreadable(self, error: ImageError) -> None:
        self.reasons.append(str(error))


def frames_of(camera: Camera) -> list[Frame]:
    with camera:
        return list(iter(camera.capture, None))


def test_a_folder_delivers_every_image_in_order(image_folder: Path) -> None:
    frames = frames_of(open_camera(f"folder:{image_folder}"))
    assert [frame.source for frame in frames] == sorted(str(p) for p in image_folder.rglob("*.*"))
    assert len(frames) == 12
    assert all(isinstance(frame.image, bytes) for frame in frames), "decoded before anybody looked"
    assert np.array_equal(frames[0].pixels(), read_image(Path(frames[0].source)))


def test_a_video_delivers_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "belt.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for label in tiny.LABELS * 3:
        writer.write(tiny.draw_shape(label, 1))
    writer.release()
    frames = frames_of(open_camera(f"video:{path}"))
    assert [frame.source for frame in frames] == [f"{path}#{n}" for n in range(9)]
    assert np.abs(frames[4].pixels().astype(int) - tiny.draw_shape("disc", 1)).mean() < 8


def test_the_fake_is_the_same_for_the_same_seed() -> None:
    first, again, other = (frames_of(open_camera(f"fake:?frames=3&size=40x24&seed={s}")) for s in (1, 1, 2))
    assert [f.image for f in first] == [f.image for f in again]
    assert [f.image for f in first] != [f.image for f in other]
    assert first[0].pixels().shape == (24, 40, 3)
    assert len(frames_of(open_camera("fake:"))) == 20


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("images", "allowed are v4l2:"),
        ("usb:0", "allowed are v4l2:"),
        ("folder:", "write folder:PATH"),
        ("folder:/nowhere", "no such folder"),
        ("video:", "write video:PATH"),
        ("video:/nowhere.mp4", "no such file"),
        ("fake:?frames=many", "allowed are fake: and"),
        ("fake:?speed=2", "allowed are fake: and"),
        ("fake:?size=4x4", "allowed are fake: and"),
        ("fake:x", "allowed are fake: and"),
    ],
)
def test_sources_that_cannot_be_opened(spec: str, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        open_camera(spec)


def test_folders_and_videos_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(CameraError, match=r"no image files; looked for \.bmp"):
        open_camera(f"folder:{tmp_path}")
    with pytest.raises(CameraError, match="not a video"):
        open_camera(f"video:{tmp_path / 'notes.txt'}")


def test_looping_starts_again_and_ends_with_an_empty_source() -> None:
    with open_camera("fake:?frames=3&size=16x16", loop=True) as camera:
        sources = [frame.source for frame in itertools.islice(iter(camera.capture, None), 8)]
    assert sources == [f"fake#{n}" for n in (0, 1, 2, 0, 1, 2, 0, 1)]
    with open_camera("fake:?frames=0", loop=True) as camera:
        assert camera.capture() is None


@pytest.mark.parametrize("runtime", ["litert", "openvino", "onnx"])
def test_the_shortest_program(runtime: str, pristine_bundle: Path) -> None:
    with Classifier.open(pristine_bundle, runtime) as classifier:
        for label in tiny.LABELS:
            prediction = classifier.predict(tiny.draw_shape(label, 9))
            assert prediction.label == label == tiny.LABELS[prediction.index]
            assert prediction.confidence == pytest.approx(float(prediction.probabilities.max()))
            assert prediction.probabilities.sum() == pytest.approx(1.0)
            assert not prediction.uncertain
            assert prediction.latency_ms > 0
        blank = classifier.predict(np.full((48, 64), 90, np.uint8))
        assert blank.uncertain
        assert blank.confidence < 0.9


def test_confidence_is_calibrated(pristine_bundle: Path, weights: tuple[tiny.Floats, tiny.Floats]) -> None:
    frame = tiny.draw_shape("disc", 4)
    logits = tiny.reference_logits(prepare(frame, tiny.SPEC), *weights).astype(float) / TEMPERATURE
    with Classifier.open(pristine_bundle, "onnx") as classifier:
        confidence = classifier.predict(frame).confidence
    assert confidence == pytest.approx(np.exp(logits[1]) / np.exp(logits).sum(), abs=1e-4)


def test_the_bias_corrects_probabilities_and_leaves_the_label(
    bundle_root: Path, edit_manifest: Callable[..., None], weights: tuple[tiny.Floats, tiny.Floats]
) -> None:
    frame = tiny.draw_shape("disc", 4)
    logits = tiny.reference_logits(prepare(frame, tiny.SPEC), *weights).astype(float)
    bias = (9.0, -9.0, 0.0)
    edit_manifest(confidence={"temperature": 2.0, "bias": bias})
    odds = np.exp(logits / 2) * np.exp(bias)
    with Classifier.open(bundle_root, "onnx") as classifier:
        prediction = classifier.predict(frame)
    assert prediction.probabilities == pytest.approx(odds / odds.sum(), abs=1e-4)
    assert prediction.probabilities.argmax() == 0
    assert prediction.label == "disc", "without costs the network's own label"
    assert prediction.confidence == pytest.approx(odds[1] / odds.sum(), abs=1e-4)
    edit_manifest(decision={"costs": [[0, 1, 1], [1, 0, 1], [1, 1, 0]]})
    with Classifier.open(bundle_root, "onnx") as classifier:
        assert classifier.predict(frame).index == 0, "costs are weighed with the calibrated probabilities"


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9), st.floats(0.05, 20))
def test_calibrated_probabilities_are_a_distribution(logits: list[float], temperature: float) -> None:
    probabilities = calibrated_probabilities(np.array(logits, np.float32), Confidence(temperature=temperature))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    assert (probabilities >= 0).all()
    assert probabilities[int(np.argmax(logits))] == probabilities.max()


def test_golden_images_agree(pristine_bundle: Path) -> None:
    results = check_bundle(Bundle.open(pristine_bundle))
    assert [r.artefact for r in results] == ["litert-fp32", "litert-int8", "openvino-fp32", "onnx-fp32"]
    for result in results:
        assert result.status == "ok", result
        assert result.max_dp is not None and result.max_dp <= (0.05 if result.precision == "int8" else 1e-4)
        assert result.agreement == 1.0
        assert result.latency_ms is not None and result.latency_ms > 0


def rewrite_golden(root: Path, edit: Callable[..., None], change: Callable[[dict[str, np.ndarray]], object]) -> None:
    with np.load(root / GOLDEN) as data:
        arrays = dict(data)
    change(arrays)
    np.savez(root / GOLDEN, **arrays)
    edit(golden=msgspec.to_builtins(entry(root / GOLDEN)))


def test_golden_images_that_differ(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["p.onnx-fp32"][0] = 1 / 3
        arrays["p.litert-fp32"][0, 0] = np.nan
        del arrays["p.litert-int8"]
        del arrays["settings"]  # they would notice it first

    rewrite_golden(bundle_root, edit_manifest, change)
    status = {result.artefact: result for result in check_bundle(Bundle.open(bundle_root))}
    assert {name: result.status for name, result in status.items()} == {
        "litert-fp32": "failed",
        "litert-int8": "failed",
        "openvino-fp32": "ok",
        "onnx-fp32": "failed",
    }
    assert "no probabilities are recorded" in status["litert-int8"].note
    assert "more than 0.05" in status["onnx-fp32"].note


def test_what_cannot_be_checked(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    bundle = Bundle.open(pristine_bundle)
    for module in ("onnxruntime", "openvino", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("onnx", "openvino", "litert"):
        monkeypatch.delitem(sys.modules, f"eyas_device.runtimes.{name}", raising=False)
    with pytest.raises(RuntimeUnavailable, match="nothing can be checked"):
        check_bundle(bundle)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    results = {result.artefact: result for result in check_bundle(bundle)}
    assert results["onnx-fp32"].status == "ok"
    assert results["litert-int8"].status == "not checked"
    assert "pip install eyas-device" in results["litert-int8"].note
    with pytest.raises(RuntimeUnavailable, match="eyas-device\\[openvino\\]"):
        check_bundle(bundle, runtime="openvino")


def test_no_artefact_to_check(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    manifest = Bundle.open(bundle_root).manifest
    edit_manifest(
        artefacts=msgspec.to_builtins([a for a in manifest.artefacts if a.runtime != "onnx"]),
        use={"litert": "litert-int8"},
    )
    with pytest.raises(BundleError, match="no artefact for runtime onnx"):
        check_bundle(Bundle.open(bundle_root), runtime="onnx")


def test_every_frame_is_answered_in_order(pristine_bundle: Path, image_folder: Path) -> None:
    recorder = Recorder()
    accuracy = Accuracy(tiny.LABELS, str(image_folder))
    with Classifier.open(pristine_bundle) as classifier, open_camera(f"folder:{image_folder}") as camera:
        Loop(classifier, camera, [recorder]).run()
    for found in recorder.predictions:
        accuracy.add(found.source, found.prediction.index)
    assert [found.number for found in recorder.predictions] == list(range(12))
    assert [Path(a.source).parent.name for a in recorder.predictions] == [
        a.prediction.label for a in recorder.predictions
    ]
    assert all(a.latency_ms >= a.prediction.latency_ms > 0 for a in recorder.predictions)
    score = accuracy.score()
    assert score is not None and (score.images, score.accuracy, score.balanced_accuracy) == (12, 1.0, 1.0)


def test_unreadable_images_are_counted_and_skipped(pristine_bundle: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), tiny.draw_shape("disc", 1))
    (tmp_path / "b.jpg").write_bytes(b"junk")
    (tmp_path / "c.png").touch()
    cv2.imwrite(str(tmp_path / "e.png"), tiny.draw_shape("cross", 1))
    recorder = Recorder()
    with Classifier.open(pristine_bundle) as classifier, open_camera(f"folder:{tmp_path}") as camera:
        Loop(classifier, camera, [recorder]).run()
    assert [a.prediction.label for a in recorder.predictions] == ["disc", "cross"]
    assert [Path(reason.split(":")[0]).name for reason in recorder.reasons] == ["b.jpg", "c.png"]


def test_a_lost_camera_ends_the_loop_after_its_last_frame(pristine_bundle: Path) -> None:
    recorder = Recorder()
    with (
        Classifier.open(pristine_bundle) as classifier,
        open_camera("fake:?frames=9&junk=1&lost=4") as camera,
        pytest.raises(CameraError, match="lost at frame 4"),
    ):
        Loop(classifier, camera, [recorder]).run()
    assert len(recorder.predictions) == 3
    assert len(recorder.reasons) == 1


def test_frames_and_fps_limit_the_loop(pristine_bundle: Path) -> None:
    recorder = Recorder()
    with Classifier.open(pristine_bundle) as classifier, open_camera("fake:", loop=True) as camera:
        started = time.monotonic()
        Loop(classifier, camera, [recorder], pace=Pace(fps=20)).run(frames=6)
        seconds = time.monotonic() - started
    assert len(recorder.predictions) == 6
    assert seconds >= 5 / 20


def test_a_signal_ends_the_loop_after_its_frame(pristine_bundle: Path) -> None:
    class Kill(Recorder):
        def on_prediction(self, predicted: FramePrediction) -> None:
            super().on_prediction(predicted)
            if predicted.number == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    recorder = Kill()
    with (
        Classifier.open(pristine_bundle) as classifier,
        open_camera("fake:", loop=True) as camera,
        Signals() as signals,
    ):
        signals.guard(Loop(classifier, camera, [recorder], pace=Pace(fps=1000))).run()
    assert len(recorder.predictions) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_scripted_camera(pristine_bundle: Path) -> None:
    frame = Frame(image=tiny.draw_shape("stripes", 2), time=1.5, source="here")
    camera = FakeCamera([frame, ImageError("torn"), frame])
    recorder = Recorder()
    with Classifier.open(pristine_bundle) as classifier, camera:
        Loop(classifier, camera, [recorder]).run()
    assert [(a.source, a.time, a.prediction.label) for a in recorder.predictions] == [("here", 1.5, "stripes")] * 2
    assert recorder.reasons == ["torn"]
    assert camera.closed


def test_balanced_accuracy_is_the_mean_recall() -> None:
    accuracy = Accuracy(("a", "b", "never"))
    for path, predicted in [("x/a/1.png", 0), ("x/a/2.png", 0), ("x/a/deep/3.png", 1), ("x/b/4.png", 0), ("b.png", 1)]:
        accuracy.add(path, predicted)
    score = accuracy.score()
    assert score is not None
    assert (score.images, score.accuracy, score.balanced_accuracy) == (4, 0.5, pytest.approx((2 / 3 + 0) / 2))
    assert accuracy.unlabelled == 1
    assert Accuracy(("a", "b")).score() is None


@pytest.mark.parametrize(
    ("root", "source"),
    [
        ("set", "set/a/b/1.png"),  # on the host the first folder is the class, too
        ("/b/set", "/b/set/a/1.png"),  # what lies around the root says nothing
        ("b", "b/train/a/1.png"),
        ("/b/a", "/b/a/1.png"),  # a class folder alone
        ("/b/a", "/b/a/2021/1.png"),
        (".", "a/1.png"),
        ("set/../b", "set/../b/a/1.png"),
    ],
)
def test_the_label_is_the_first_folder_below_the_root(root: str, source: str) -> None:
    accuracy = Accuracy(("b", "a"), root)
    accuracy.add(source, 1)
    score = accuracy.score()
    assert score is not None and score.accuracy == 1.0


def test_a_folders_name_is_a_label_in_every_form_of_unicode() -> None:
    accuracy = Accuracy(("Ger\u00e4t", "ok"), "set")
    accuracy.add("set/Gera\u0308t/1.png", 0)
    accuracy.add("set/\udcfc/2.png", 0)
    assert accuracy.score() is not None
    assert accuracy.unlabelled == 1


def test_loop_stats_count_by_label(pristine_bundle: Path) -> None:
    stats = LoopStats()
    with Classifier.open(pristine_bundle) as classifier:
        for label in ("disc", "disc", "cross"):
            stats.add(classifier.predict(tiny.draw_shape(label, 1)), 2.0)
        stats.add(
            msgspec.structs.replace(classifier.predict(tiny.draw_shape("disc", 1)), confidence=0.42, uncertain=True),
            8.0,
        )
    assert (stats.frames, stats.uncertain, dict(stats.counts)) == (4, 1, {"disc": 3, "cross": 1})
    assert stats.latency.summary() == {"p50": pytest.approx(2.0, rel=0.01), "p90": 8.0, "p99": 8.0, "max": 8.0}


def test_costs_move_the_answer_but_not_the_probabilities(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    frame = tiny.draw_shape("disc", 9)
    with Classifier.open(bundle_root) as classifier:
        before = classifier.predict(frame)
    dear = 1.0 / float(before.probabilities[tiny.LABELS.index("cross")])
    edit_manifest(decision={"costs": [[0, dear * 2, dear * 2], [1, 0, 1], [1, 1, 0]], "from_a_newer_host": 1})
    with Classifier.open(bundle_root) as classifier:
        after = classifier.predict(frame)
        golden = classifier.bundle.golden()
        assert check_loaded(classifier, golden).status == "ok", "golden images compare probabilities"
    assert (before.label, after.label) == ("disc", "cross")
    assert np.array_equal(before.probabilities, after.probabilities)
    assert after.confidence == pytest.approx(float(after.probabilities[tiny.LABELS.index("cross")])) and after.uncertain
