"""The frame loop on live cameras: the newest frame, bounded age, pace, pause, and another model between two frames."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.agent import loop as loop_module
from eyas_device.agent import sources
from eyas_device.agent.latest import Ended, LatestFrame
from eyas_device.agent.loop import MAX_ERRORS, FramePrediction, Listener, Loop, Pace
from eyas_device.agent.signals import Signals
from eyas_device.camera import Frame, open_camera
from eyas_device.camera.reconnecting import CameraState, ReconnectingCamera
from eyas_device.errors import CameraError, CameraLost, ImageError
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import Pixels
from eyas_device.support.closing import Closing
from tests.support import tiny

JPEG = cv2.imencode(".jpg", tiny.draw_shape("disc", 1))[1].tobytes()


class LiveCamera(Closing):
    """A live source that delivers `items`, one every `every_s`; blocks at None."""

    live = True

    def __init__(self, items: Iterator[Frame | Exception | None], every_s: float = 0.0) -> None:
        self._items = items
        self._every_s = every_s
        self._closed = threading.Event()
        self.delivered = 0

    def capture(self) -> Frame | None:
        self._closed.wait(self._every_s)
        item = next(self._items, None)
        if isinstance(item, Exception):
            raise item
        if item is None:
            self._closed.wait()
            return None
        self.delivered += 1
        return item

    def close(self) -> None:
        self._closed.set()


def numbered(image: bytes = JPEG) -> Iterator[Frame]:
    return (Frame(image=image, time=time.time(), source=str(n)) for n in itertools.count())


class Recorder(Listener):
    """Records all callbacks; may delay each prediction."""

    def __init__(self, loop_s: float = 0.0) -> None:
        self.predictions: list[FramePrediction] = []
        self.reasons: list[str] = []
        self.states: list[CameraState] = []
        self.models: list[str] = []
        self.turns = 0
        self._loop_s = loop_s

    def on_prediction(self, predicted: FramePrediction) -> None:
        self.predictions.append(predicted)
        time.sleep(self._loop_s)

    def on_unreadable(self, error: ImageError) -> None:
        self.reasons.append(str(error))

    def on_camera_state(self, state: CameraState) -> None:
        self.states.append(state)

    def on_model(self, classifier: Classifier) -> None:
        self.models.append(classifier.artefact.name)

    def on_tick(self) -> None:
        self.turns += 1


@pytest.fixture
def classifier(pristine_bundle: Path) -> Iterator[Classifier]:
    with Classifier.open(pristine_bundle) as opened:
        yield opened


def test_a_fast_camera_is_answered_with_its_newest_frame(classifier: Classifier) -> None:
    behind: list[int] = []

    class Behind(Recorder):
        def on_prediction(self, predicted: FramePrediction) -> None:
            behind.append(camera.delivered - 1 - int(predicted.source))
            super().on_prediction(predicted)

    recorder = Behind(loop_s=0.03)  # a slow model: about 30 frames a second of the camera's 500
    camera = LiveCamera(numbered(), every_s=0.002)
    loop = Loop(classifier, camera, [recorder])
    loop.run(frames=15)
    numbers = [int(predicted.source) for predicted in recorder.predictions]
    assert numbers == sorted(set(numbers)), "a frame came twice or out of order"
    assert numbers[-1] > 15 + 5, "the model was not slower than the camera"
    assert sorted(behind)[7] <= 5, "it worked off old frames"
    assert loop.dropped >= numbers[-1] - len(numbers) - 1
    ages = sorted(predicted.age_ms for predicted in recorder.predictions)
    assert ages[len(ages) // 2] < 30, "frames waited for longer than the camera's interval and the prediction"


def test_dropped_frames_are_counted_while_the_loop_runs(classifier: Classifier) -> None:
    """Each reader of the count, such as a telemetry window, sees what was dropped so far."""
    seen: list[tuple[int, int]] = []

    class Reader(Recorder):
        def on_prediction(self, predicted: FramePrediction) -> None:
            super().on_prediction(predicted)
            seen.append((loop.dropped, int(predicted.source) - predicted.number))

    reader = Reader(loop_s=0.02)
    loop = Loop(classifier, LiveCamera(numbered(), every_s=0.001), [reader])
    for _ in range(2):  # the count goes on over several runs
        before = loop.dropped
        loop._stopping = False
        loop.run(frames=10)
        assert loop.dropped >= seen[-1][0] > before
    dropped, missing = zip(*seen[:10], strict=True)
    assert dropped[0] < dropped[5] < dropped[9] and list(dropped) == sorted(dropped)
    assert all(0 <= count - lost <= 25 for count, lost in zip(dropped, missing, strict=True)), seen


class DemandCamera(LiveCamera):
    """A live camera that drops what nobody captures; counts the captures."""

    on_demand = True

    def __init__(self, items: Iterator[Frame | Exception | None], every_s: float = 0.0) -> None:
        super().__init__(items, every_s)
        self.captures = 0

    def capture(self) -> Frame | None:
        self.captures += 1
        return super().capture()


def fresh(image: bytes | Pixels = JPEG) -> Iterator[Frame]:
    """Frames that are captured when they are asked for."""
    return (Frame(image=image, time=time.time(), source=str(n)) for n in itertools.count())


@pytest.mark.parametrize("pace", [Pace(fps=25.0), Pace(duty=0.05)], ids=["fps", "duty"])
def test_a_pace_bounds_what_is_captured(classifier: Classifier, pace: Pace) -> None:
    camera, recorder = DemandCamera(fresh(), every_s=0.001), Recorder(loop_s=0.002)
    Loop(classifier, camera, [recorder], pace=pace).run(frames=15)
    assert camera.captures <= 1.2 * len(recorder.predictions), camera.captures
    ages = sorted(predicted.age_ms for predicted in recorder.predictions)
    assert ages[len(ages) // 2] < 30, "frames waited for long"
    camera = DemandCamera(fresh(), every_s=0.001)
    Loop(classifier, camera, [Recorder(loop_s=0.02)]).run(frames=15)
    assert camera.captures > 40, "without a pace the newest of all frames is taken"


@pytest.mark.parametrize("error", [ImageError("x: black"), None], ids=["black", "broken"])
def test_frames_that_are_no_use_are_paced_too(classifier: Classifier, error: ImageError | None) -> None:
    items: Iterator[Frame | Exception] = itertools.repeat(error) if error else fresh(JPEG[:200])
    camera, recorder = DemandCamera(items, every_s=0.001), Recorder()
    loop = Loop(classifier, camera, [recorder], pace=Pace(fps=20.0))
    threading.Timer(0.6, loop.stop).start()
    loop.run()
    assert 5 <= len(recorder.reasons) <= 14 and camera.captures <= 1.2 * len(recorder.reasons) + 1


def test_a_paused_loop_asks_for_no_frames_and_then_takes_a_fresh_one(classifier: Classifier) -> None:
    camera, recorder = DemandCamera(fresh(), every_s=0.001), Recorder()
    loop = Loop(classifier, camera, [recorder], pace=Pace(fps=20.0))
    loop.pause()
    threading.Timer(0.5, loop.resume).start()
    started = time.monotonic()
    loop.run(frames=2)
    assert time.monotonic() - started >= 0.5 and camera.captures <= 5
    assert max(predicted.age_ms for predicted in recorder.predictions) < 250, "a frame from before the pause"


def test_a_camera_that_is_seldom_asked_is_still_watched(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHECK_S", 0.05)
    camera = DemandCamera(fresh(), every_s=0.001)
    loop = Loop(classifier, camera, pace=Pace(fps=0.01))
    threading.Timer(0.5, loop.stop).start()
    loop.run()
    assert 4 <= camera.captures <= 12


def test_a_frame_is_fresh_though_the_camera_was_looked_at_in_between(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHECK_S", 0.3)
    camera, recorder = DemandCamera(fresh(), every_s=0.001), Recorder()
    Loop(classifier, camera, [recorder], pace=Pace(fps=2.0)).run(frames=4)
    assert camera.captures > 5
    assert sorted(predicted.age_ms for predicted in recorder.predictions)[2] < 120


def test_a_pace_slower_than_the_patience_does_not_give_the_camera_up(classifier: Classifier) -> None:
    """Each frame takes longer than the one before, so it is not there when it is due."""

    class Slower(DemandCamera):
        def capture(self) -> Frame | None:
            self._every_s += 0.08
            return super().capture()

    recorder = Recorder()
    Loop(classifier, Slower(fresh()), [recorder], pace=Pace(fps=3.0, give_up_s=0.25)).run(frames=4)
    assert len(recorder.predictions) == 4


def test_images_that_only_decoding_finds_broken_make_the_camera_degraded(classifier: Classifier) -> None:
    """Their headers are right, so the capture thread takes them for good."""
    whole = cv2.imencode(".jpg", cv2.resize(tiny.draw_shape("disc", 1), (320, 240)))[1].tobytes()
    images = itertools.cycle([whole, whole, whole[: len(whole) // 2]])
    changing = (image + bytes([0, number % 251]) for number, image in enumerate(images))
    source = LiveCamera((Frame(image=image, time=0.0, source="x") for image in changing), every_s=0.005)
    camera, recorder = ReconnectingCamera(lambda: source), Recorder()
    Loop(classifier, camera, [recorder]).run(frames=40)
    share, _, text = next(state.reason for state in recorder.states if state.condition == "degraded").partition("%")
    assert text == " of the frames of the last 30 s are broken" and 5 <= int(share) <= 75
    assert len(recorder.predictions) == 40 and recorder.reasons, "the good frames are answered"


class ChangingCamera(LiveCamera):
    """A live camera with a state that the test sets."""

    state = CameraState()


def test_the_reason_of_a_lost_camera_is_reported_when_it_changes(classifier: Classifier) -> None:
    recorder = Recorder()
    camera = ChangingCamera(numbered(), every_s=0.002)
    loop = Loop(classifier, camera, [recorder])
    for reason in ("connection refused", "refused (401)", "refused (401)"):
        camera.state = CameraState(condition="lost", reason=reason)
        loop._notify_camera_state()
    assert [state.reason for state in recorder.states] == ["connection refused", "refused (401)"]
    for number in range(1000):
        camera.state = CameraState(condition="lost" if number % 2 else "delivering", reason=str(number))
        loop._notify_camera_state()
    assert len(recorder.states) < 12, "a camera that flaps makes no flood"
    camera.state = CameraState(condition="closed")
    loop._notify_camera_state()
    assert recorder.states[-1].condition == "closed"


def test_what_is_replaced_is_not_decoded(classifier: Classifier) -> None:
    decoded = []

    class Watched(Frame):
        def pixels(self, spec: object = None) -> object:  # type: ignore[override]
            decoded.append(self.source)
            return super().pixels()

    frames = (Watched(image=JPEG, time=0.0, source=str(n)) for n in itertools.count())
    recorder = Recorder(loop_s=0.02)
    Loop(classifier, LiveCamera(frames, every_s=0.001), [recorder]).run(frames=5)
    assert decoded == [predicted.source for predicted in recorder.predictions]


def test_old_frames_are_dropped(classifier: Classifier) -> None:
    stale = Frame(image=JPEG, time=0.0, source="old", captured=time.monotonic() - 9)
    camera = LiveCamera(itertools.cycle([stale, Frame(image=JPEG, time=0.0, source="new", captured=1e12)]), 0.002)
    recorder = Recorder()
    loop = Loop(classifier, camera, [recorder], pace=Pace(max_age_s=5.0))
    loop.run(frames=4)
    assert {predicted.source for predicted in recorder.predictions} == {"new"}
    assert loop.dropped >= 1


def test_the_duty_cycle_is_kept(classifier: Classifier) -> None:
    recorder = Recorder(loop_s=0.02)
    started = time.monotonic()
    Loop(classifier, LiveCamera(numbered()), [recorder], pace=Pace(duty=0.25)).run(frames=5)
    assert time.monotonic() - started >= 4 * 0.02 / 0.25


def test_a_silent_camera_is_given_up(classifier: Classifier) -> None:
    camera = LiveCamera(itertools.chain(itertools.islice(numbered(), 2), [None]))
    recorder = Recorder()
    with pytest.raises(CameraLost, match=r"no frame for"):
        Loop(classifier, camera, [recorder], pace=Pace(give_up_s=0.3)).run()
    assert 1 <= len(recorder.predictions) <= 2
    assert recorder.turns >= 3, "the watchdog heard nothing while the camera was silent"
    assert CameraLost("x").exit_code == 3


def test_errors_of_a_live_camera_reach_the_loop(classifier: Classifier) -> None:
    recorder = Recorder()
    frame = Frame(image=JPEG, time=0.0, source="x")
    with pytest.raises(CameraError, match="unplugged"):
        Loop(
            classifier, LiveCamera(iter([frame, ImageError("torn"), CameraError("unplugged")]), 0.05), [recorder]
        ).run()
    assert recorder.reasons == ["torn"]
    assert len(recorder.predictions) == 1


def test_a_live_loop_goes_on_after_unexpected_errors_and_ends_when_nothing_else_comes(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_PAUSE_S", 0.0)
    monkeypatch.setattr(sources, "_PAUSE_S", 0.0)
    frame = Frame(image=JPEG, time=0.0, source="x")
    defects = [ZeroDivisionError(f"oops {n}") for n in range(3 * MAX_ERRORS)]
    noticed: list[Exception] = []

    class Watching(Listener):
        def on_error(self, error: Exception) -> None:
            noticed.append(error)
            raise RuntimeError("a listener that fails as well")

    recorder = Recorder()
    loop = Loop(classifier, LiveCamera(iter([*defects[:3], frame, *defects[3:]]), 0.02), [Watching(), recorder])
    with pytest.raises(ZeroDivisionError, match="oops"):
        loop.run()
    assert len(recorder.predictions) == 1, "the loop ended at the first error"
    assert noticed[:3] == defects[:3] and loop.errors == len(noticed) == 3 + MAX_ERRORS - 1


def test_a_model_and_a_listener_that_fail_once_do_not_end_a_live_loop(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_PAUSE_S", 0.0)
    monkeypatch.setattr(sources, "_PAUSE_S", 0.0)

    class Flaky(Classifier):
        calls = 0

        def predict(self, frame: Pixels) -> Prediction:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("Node number 3 failed to invoke")
            return super().predict(frame)

    class Fragile(Recorder):
        def on_prediction(self, predicted: FramePrediction) -> None:
            super().on_prediction(predicted)
            if len(self.predictions) == 4:
                raise OSError(5, "Input/output error")

    fragile = Fragile()
    with Flaky.open(pristine_bundle) as flaky:
        loop = Loop(flaky, LiveCamera(numbered(), 0.005), [fragile])
        loop.run(frames=6)
    assert loop.errors == 2 and len(fragile.predictions) >= 6


def test_a_finite_source_ends_at_the_first_unexpected_error(classifier: Classifier) -> None:
    class Broken(Listener):
        def on_tick(self) -> None:
            raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError):
        Loop(classifier, open_camera("fake:?frames=3"), [Broken()]).run()


def test_a_loop_without_a_model_ticks_until_one_is_swapped_in(pristine_bundle: Path) -> None:
    recorder = Recorder()
    loop = Loop(None, LiveCamera(numbered(), 0.005), [recorder])
    thread = threading.Thread(target=lambda: loop.run(frames=3))
    thread.start()
    while recorder.turns < 5:
        time.sleep(0.01)
    assert recorder.predictions == []
    model = Classifier.open(pristine_bundle)
    assert loop.swap(model)
    thread.join(30)
    assert not thread.is_alive() and len(recorder.predictions) == 3 and loop.classifier is model
    model.close()


def test_a_model_that_comes_after_the_end_is_closed(classifier: Classifier) -> None:
    closed: list[str] = []

    class Late(Classifier):
        def close(self) -> None:
            closed.append("late")

    loop = Loop(classifier, open_camera("fake:?frames=1"))
    loop.run()
    assert not loop.swap(Late(classifier.bundle, classifier.runtime, classifier.artefact))
    assert closed == ["late"], "a reload that ended late leaked its model"


def test_pause_and_resume(classifier: Classifier) -> None:
    recorder = Recorder()
    loop = Loop(classifier, LiveCamera(numbered(), 0.005), [recorder], pace=Pace(give_up_s=0.2))
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        until(lambda: len(recorder.predictions) > 3)
        loop.pause()
        time.sleep(0.3)  # longer than give_up_s: a pause is no loss
        count, turns = len(recorder.predictions), recorder.turns
        time.sleep(0.2)
        assert loop.paused and len(recorder.predictions) == count
        assert recorder.turns > turns, "a paused loop must stay alive for the watchdog"
        loop.resume()
        until(lambda: len(recorder.predictions) > count + 3)
    finally:
        loop.stop()
        thread.join(10)
    assert not thread.is_alive()


def test_another_model_between_two_frames(pristine_bundle: Path) -> None:
    first = Classifier.open(pristine_bundle, artefact="litert-fp32")
    recorder = Recorder()
    loop = Loop(first, LiveCamera(numbered(), 0.002), [recorder])
    closed = []
    first.close = lambda: closed.append("first")  # type: ignore[method-assign]
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        until(lambda: len(recorder.predictions) > 3)
        loop.swap(Classifier.open(pristine_bundle, artefact="litert-int8"))
        until(lambda: len(recorder.models) == 2)
        seen = len(recorder.predictions)
        until(lambda: len(recorder.predictions) > seen + 3)
    finally:
        loop.stop()
        thread.join(10)
    assert recorder.models == ["litert-fp32", "litert-int8"]
    assert closed == ["first"]
    assert [int(a.source) for a in recorder.predictions] == sorted(int(a.source) for a in recorder.predictions)
    assert {predicted.prediction.label for predicted in recorder.predictions} == {"disc"}


@pytest.mark.parametrize(("number", "paused"), [(signal.SIGUSR1, True), (signal.SIGUSR2, False)])
def test_signals_pause_and_resume(classifier: Classifier, number: int, paused: bool) -> None:
    loop = Loop(classifier, LiveCamera(numbered()))
    if not paused:
        loop.pause()
    with Signals() as signals:
        signals.guard(loop)
        os.kill(os.getpid(), number)
        until(lambda: loop.paused is paused)


def test_a_signal_before_there_is_a_loop_is_not_lost(classifier: Classifier) -> None:
    recorder = Recorder()
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: signals.requested)
        signals.guard(Loop(classifier, LiveCamera(numbered()), [recorder])).run()
    assert recorder.predictions == []


def test_no_memory_is_gathered_or_taken_again(classifier: Classifier) -> None:
    """Beside OpenCV's decoding, a frame takes no image-sized memory, and keeps none at all."""
    image = tiny.draw_shape("disc", 1, width=640, height=480)
    marks: list[tuple[int, int]] = []

    class Meter(Listener):
        def on_prediction(self, predicted: FramePrediction) -> None:
            if predicted.number in (50, 250):
                gc.collect()
                marks.append(tracemalloc.get_traced_memory())
                tracemalloc.reset_peak()

    frames = (Frame(image=image, time=0.0, source="x") for _ in range(251))
    tracemalloc.start()
    try:
        loop = Loop(classifier, _Replay(frames), [Meter()])
        loop.run()
    finally:
        tracemalloc.stop()
    (before, _), (after, peak) = marks
    assert after - before < 2_000, "memory grows with the frames"
    assert peak - before < 30_000, "a frame takes new memory for images"


class _Replay(Closing):
    live = False

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames

    def capture(self) -> Frame | None:
        return next(self._frames, None)


_STEPS = st.lists(st.sampled_from(["frame", "error", "end", "take"]), max_size=40)


@given(_STEPS)
def test_the_slot_holds_the_newest_and_counts_the_rest(steps: list[str]) -> None:
    slot = LatestFrame()
    held: object = None
    replaced = 0
    for number, step in enumerate(steps):
        if step == "take":
            assert slot.take(0.0) is held
            held = None
            continue
        item = {
            "frame": Frame(image=b"", time=0.0, source=str(number)),
            "error": ImageError(str(number)),
            "end": Ended(),
        }[step]
        if not isinstance(held, Ended):
            replaced += isinstance(held, Frame)
            held = item
        slot.put(item)
    assert slot.replaced == replaced


def until(true: object, timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_a_handler_that_python_did_not_install_is_replaced_by_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` returns None for it, and does not take None."""
    before, real = signal.getsignal(signal.SIGUSR1), signal.signal

    def foreign(number: int, handler: Any) -> Any:
        assert handler is not None
        previous = real(number, handler)
        return None if number == signal.SIGUSR1 and callable(handler) else previous

    monkeypatch.setattr(signal, "signal", foreign)
    try:
        with Signals():
            pass
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        real(signal.SIGUSR1, before)
