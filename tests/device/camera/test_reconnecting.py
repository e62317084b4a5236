"""ReconnectingCamera with scripted sources, mostly on a fake clock."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyas_device.camera import Camera, Frame, open_camera
from eyas_device.camera.fake import FakeCamera, Hang
from eyas_device.camera.reconnecting import Backoff, CameraState, ReconnectingCamera
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, ImageError
from eyas_device.support.closing import Closing
from tests.support.clocks import FakeClock
from tests.support.servers import PLENTY_S, RtspServer, StreamServer
from tests.support.streams import jpeg_image

LOST = CameraError("camera x: pulled out")
Item = tuple[float, Any]
"""Seconds that pass, and then an image to deliver, an exception to raise or None."""


class Source(Closing):
    """A source that plays items on a clock."""

    live = True

    def __init__(self, clock: FakeClock, items: list[Item]) -> None:
        self._clock, self._items = clock, iter(items)
        self.closed = 0

    def capture(self) -> Frame | None:
        seconds, item = next(self._items, (0.0, LOST))
        self._clock.move(seconds)
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        return Frame(image=item, time=0.0, source="x")

    def close(self) -> None:
        self.closed += 1


class Plan:
    """What each opening gives: items of a source, or an exception; after the last, nothing is there."""

    def __init__(self, *openings: list[Item] | Exception, **options: Any) -> None:
        self.clock = FakeClock()
        self.opened: list[Source] = []
        self.states: list[CameraState] = []
        self._openings = iter(openings)
        options = {"backoff": Backoff(jitter=lambda: 1.0), "on_change": self.states.append, **options}
        self.camera = ReconnectingCamera(self._open, clock=self.clock, **options)

    def _open(self) -> Camera:
        items = next(self._openings, None)
        if items is None:
            self.camera.close()  # so that a test which waits for more than it planned ends
            raise CameraError("the plan has ended")
        if isinstance(items, Exception):
            raise items
        self.opened.append(Source(self.clock, items))
        return self.opened[-1]

    def take(self) -> Frame:
        frame = self.camera.capture()
        assert frame is not None, self.camera.state
        return frame

    @property
    def conditions(self) -> list[str]:
        return [state.condition for state in self.states]


def shown(number: int, *, width: int = 32, height: int = 24) -> Any:
    """Pixels that differ for each number."""
    return np.full((height, width, 3), 40 + number % 200, dtype=np.uint8)


BLACK = np.zeros((24, 32, 3), dtype=np.uint8)


def test_frames_of_a_good_source_are_returned() -> None:
    plan = Plan([(1.0, shown(n)) for n in range(3)])
    assert plan.camera.live and plan.camera.state.condition == "opening"
    assert [plan.take().image[0, 0, 0] for _ in range(3)] == [40, 41, 42]  # type: ignore[call-overload]
    state = plan.camera.state
    assert (state.condition, state.reason, state.frames, state.losses) == ("delivering", "", 3, 0)
    assert state.last_frame == plan.clock.monotonic() and state.since == plan.clock.monotonic() - 2
    assert plan.conditions == ["delivering"]
    plan.camera.close()
    assert plan.camera.capture() is None and plan.opened[0].closed == 1
    assert plan.conditions == ["delivering", "closed"]


def test_a_wrong_specification_raises_and_an_absent_camera_is_awaited() -> None:
    with pytest.raises(CameraSpecError, match="unknown kind"):
        ReconnectingCamera(lambda: open_camera("webcam:0"))
    plan = Plan(CameraError("not there"), CameraSpecError("gone mad"), OSError("no descriptors"), [(0.0, shown(0))])
    assert plan.camera.state.condition == "lost" and plan.camera.state.reason == "not there"
    plan.take()
    assert plan.camera.state.condition == "delivering" and plan.camera.state.losses == 0
    assert [state.reason for state in plan.states] == ["not there", "gone mad", "no descriptors", ""]


def test_backoff_doubles_up_to_a_second_with_jitter() -> None:
    plan = Plan(*[LOST] * 8, [(0.0, shown(0))])
    plan.take()
    assert plan.clock.waits == [0.5, 0.5, 0.5, 0.8, 1, 1, 1, 1]  # 0.1, 0.2, 0.4, but at most two attempts a second
    plan = Plan(*[LOST] * 3, [(0.0, shown(0))], backoff=Backoff(first_s=8, max_s=10, jitter=lambda: 0.0))
    plan.take()
    assert plan.clock.waits == [4.0, 5.0, 5.0]
    assert Backoff().bound_s(10_000) == 1


@pytest.mark.parametrize("end", [LOST, None, OSError(5, "I/O")])
def test_a_camera_that_ends_every_two_seconds_and_accepts_again_delivers_nearly_always(end: Any) -> None:
    clips = [[(0.04, shown(n)) for n in range(50)] + [(0.0, end)] for _ in range(30)]
    plan = Plan(*clips)
    started = plan.clock.monotonic()
    for _ in range(30 * 50):
        plan.take()
    dark = plan.clock.monotonic() - started - 30 * 2.0
    assert len(plan.opened) == 30 and dark <= 0.05 * 60, f"dark for {dark:.1f} of 60 s"
    assert plan.camera.state.condition == "degraded" and "lost 5 times or more within 60 s" in plan.camera.state.reason


def test_a_source_that_gives_one_frame_each_time_is_opened_at_most_twice_a_second() -> None:
    plan = Plan(*[[(0.0, shown(n)), (0.0, None)] for n in range(20)])
    started = plan.clock.monotonic()
    for _ in range(20):
        plan.take()
    assert plan.clock.monotonic() - started == pytest.approx(19 * 0.5)


@pytest.mark.parametrize("tries", [1, 6, 40])
def test_a_source_that_is_well_again_is_back_within_two_seconds(tries: int) -> None:
    plan = Plan([(0.0, shown(0)), (0.0, LOST)], *[LOST] * tries, [(0.0, shown(1))])
    plan.take()
    plan.take()
    assert max(plan.clock.waits) <= 1.0 and plan.camera.state.condition == "delivering"


def test_a_refused_login_is_tried_again_rarely_because_cameras_lock_users_out() -> None:
    refused = [CameraRefused("camera x: refused (401)")] * 6
    plan = Plan(*refused, LOST, [(0.0, shown(0))])
    plan.take()
    low, high = (15, 30, 60, 120, 150, 150), (30, 60, 120, 240, 300, 300)
    waits = plan.clock.waits
    assert all(least <= wait <= most for least, wait, most in zip(low, waits[:6], high, strict=True))
    assert waits[6] <= 1.0, "a refusal that is over no longer counts"


def test_a_child_process_that_starts_slowly_is_not_started_in_vain_all_the_time() -> None:
    slow = CameraError("camera x: the device is busy")
    slow.started_s = 4.0
    plan = Plan(slow, slow, [(0.0, shown(0))])
    plan.take()
    assert plan.clock.waits == [8.0, 8.0]


def test_the_reason_is_the_present_one_and_says_how_old_it_is() -> None:
    killed, refused = CameraError("camera x: connection refused"), CameraRefused("camera x: refused (401)")
    plan = Plan([(0.0, shown(0)), (0.0, None)], killed, refused, [(0.0, shown(1))])
    plan.take()
    plan.take()
    assert [state.reason for state in plan.states] == ["", "the stream ended", str(killed), str(refused), ""]
    state, now = plan.states[2], plan.states[2].reason_since
    assert state.reason_at(now + 2) == str(killed)
    ages = [state.reason_at(now + seconds).removeprefix(str(killed)) for seconds in (40, 119, 600, 7300)]
    assert ages == [" (for 40 s)", " (for 119 s)", " (for 10 min)", " (for 2 h)"]
    assert plan.camera.state.reason_at(now + 1e6) == ""


@pytest.mark.parametrize(
    ("end", "reason"), [(LOST, "pulled out"), (None, "the stream ended"), (OSError(5, "I/O"), "I/O")]
)
def test_a_lost_source_is_reopened(end: Any, reason: str) -> None:
    plan = Plan([(0.0, shown(0)), (0.0, end)], [(0.0, shown(1))])
    plan.take()
    plan.take()
    assert plan.conditions == ["delivering", "lost", "delivering"] and reason in plan.states[1].reason
    assert plan.camera.state.losses == 1 and [source.closed for source in plan.opened] == [1, 0]


@pytest.mark.parametrize("image", [shown(3, width=64, height=48), jpeg_image(3)])
def test_a_frozen_source_is_reopened_until_it_moves(image: Any) -> None:
    first, later = (shown(n, width=64, height=48) for n in (1, 2))
    still = [(10.0, image)] * 9
    plan = Plan([(0.0, first), *still], still, LOST, still, [(0.0, later)], frozen_s=30.0)
    assert sum(plan.take().image is image for _ in range(4)) == 3  # at 0, 10 and 20 s; at 30 s it is frozen
    plan.take()
    assert plan.conditions == ["delivering", "frozen", "lost", "frozen", "delivering"]
    assert "the same image for 30 s" in plan.states[1].reason
    assert plan.camera.state.losses == 3 and plan.camera.state.frames == 5


def test_a_camera_that_begins_with_its_old_image_is_not_frozen_for_ever() -> None:
    """It keeps the last image and sends it to each new reader first; here twice, and then what it sees."""
    old = shown(7)
    plan = Plan([(10.0, old)] * 5, [(0.1, old), (0.1, old), (0.1, shown(8))], [(0.5, old)] * 3, frozen_s=30.0)
    for _ in range(3):
        plan.take()
    for _ in range(2):
        with pytest.raises(ImageError, match="still the image that did not change"):
            plan.camera.capture()
        assert plan.camera.state.condition == "frozen", "an old image is not classified, and not called broken"
    assert plan.take().image is not old and plan.camera.state.condition == "delivering"


def test_a_still_image_is_not_frozen_before_its_time() -> None:
    plan = Plan([(20.0, shown(0))] * 2 + [(0.0, LOST)], [(20.0, shown(0))] * 2 + [(0.0, LOST)], frozen_s=30.0)
    for _ in range(4):
        plan.take()
    assert "frozen" not in plan.conditions
    plan = Plan([(1000.0, shown(0))] * 5, frozen_s=0.0)
    for _ in range(5):
        plan.take()
    noisy = [(10.0, shown(0)) for _ in range(9)]
    for number, (_, image) in enumerate(noisy):
        image[16, 3, 1] = number  # noise in one of the rows that are compared
    plan = Plan(noisy, frozen_s=30.0)
    for _ in range(9):
        plan.take()


@pytest.mark.parametrize("black", [BLACK, cv2.imencode(".jpg", BLACK)[1].tobytes(), BLACK + 4])
def test_black_images_are_rejected_until_there_is_light(black: Any) -> None:
    plan = Plan([(1.0, shown(0)), *[(1.0, black)] * 2, (0.1, black), (0.1, shown(1)), (0.5, black), (0.6, black)])
    plan.take()
    for _ in range(3):
        with pytest.raises(ImageError, match="black"):
            plan.camera.capture()
    assert plan.camera.state.condition == "black" and plan.camera.state.unusable == 3
    plan.take()
    assert plan.camera.state.condition == "delivering" and plan.camera.state.frames == 2
    plan.take()  # checked once a second only
    with pytest.raises(ImageError):
        plan.camera.capture()
    assert plan.conditions == ["delivering", "black", "delivering", "black"] and plan.camera.state.losses == 0


def test_what_counts_as_black() -> None:
    spot = BLACK.copy()
    spot[10:20, 10:20] = 200
    for image, level, dark in (
        (BLACK + 4, 4.0, True),
        (BLACK + 5, 4.0, False),
        (BLACK + 1, 0.0, False),
        (BLACK, 0.0, True),
    ):
        plan = Plan([(0.0, image)], black_level=level)
        if dark:
            with pytest.raises(ImageError):
                plan.camera.capture()
        else:
            plan.take()
    Plan([(0.0, spot)]).take()


def test_a_sensor_stuck_in_black_is_reopened() -> None:
    plan = Plan([(10.0, BLACK)] * 9, [(2.0, BLACK)], [(0.0, shown(0))], frozen_s=30.0)
    for _ in range(3):
        with pytest.raises(ImageError):
            plan.camera.capture()
    plan.take()
    assert (
        plan.conditions[0] == "black" and set(plan.conditions[:-1]) == {"black"} and plan.conditions[-1] == "delivering"
    )
    assert plan.camera.state.losses == 2


def test_another_size_is_reopened_once_and_then_accepted() -> None:
    def small(n: int) -> Any:
        return shown(n, width=16, height=12)

    plan = Plan(
        [(1.0, shown(0)), (1.0, small(1)), (1.0, small(2))],
        [
            (1.0, small(3)),
            (1.0, small(4)),
            (1.0, shown(5)),
            (1.0, small(6)),
            (1.0, cv2.imencode(".jpg", small(7))[1].tobytes()),
        ],
        [(1.0, shown(8))],
    )
    sizes = [plan.take().pixels().shape[1] for _ in range(5)]
    assert sizes == [32, 16, 16, 32, 32]
    assert plan.conditions == ["delivering", "lost", "resized", "delivering", "lost", "delivering"]
    assert "16x12 pixels, 32x24 at first" in plan.states[1].reason and plan.camera.state.losses == 2


def test_a_changed_size_is_reported_while_it_lasts() -> None:
    small = [(1.0, shown(n, width=16)) for n in range(9)]
    plan = Plan([(1.0, shown(0)), *small], small)
    for _ in range(8):
        plan.take()
    state = plan.camera.state
    assert state.condition == "resized" and state.frames == 8 and state.losses == 1 and len(plan.opened) == 2


def test_a_resized_source_that_does_not_come_back_is_lost() -> None:
    plan = Plan([(1.0, shown(0)), (1.0, shown(1, width=16))], CameraError("camera x: gone"), [(0.0, shown(2))])
    plan.take()
    plan.take()
    assert plan.conditions == ["delivering", "lost", "lost", "delivering"]
    assert "16x24 pixels" in plan.states[1].reason and plan.states[2].reason == "camera x: gone"


def broken_plan(broken: list[bool], every_s: float = 0.1) -> Plan:
    """A plan that is captured to its end."""
    torn = ImageError("torn")
    plan = Plan([(every_s, torn if bad else shown(number)) for number, bad in enumerate(broken)])
    for _ in broken:
        with contextlib.suppress(ImageError):
            plan.camera.capture()
    return plan


def test_a_camera_with_broken_frames_is_degraded_and_says_how_many() -> None:
    plan = broken_plan([number % 3 == 0 for number in range(300)])
    state = plan.camera.state
    assert state.condition == "degraded" and state.losses == 0
    share, text = state.reason.split("%")
    assert abs(int(share) - 33) <= 2 and text == " of the frames of the last 30 s are broken"


@pytest.mark.parametrize(("period", "degraded"), [(10, True), (15, True), (25, False), (50, False)])
def test_more_than_a_twentieth_of_broken_frames_is_degraded(period: int, degraded: bool) -> None:
    conditions = broken_plan([number % period == period // 2 for number in range(2000)]).conditions
    assert ("degraded" in conditions[1:]) == degraded


def test_a_degraded_camera_recovers_and_few_messages_come_of_it() -> None:
    rng = np.random.default_rng(7)
    plan = broken_plan([*(rng.random(6000) < 0.05), *[False] * 400])  # 10 minutes at the threshold itself
    assert plan.camera.state.condition == "delivering"
    assert len(plan.states) <= 10 + 400 / 10, plan.conditions


def test_frames_that_only_decoding_finds_broken_degrade_and_at_last_reopen() -> None:
    plan = Plan([(0.5, shown(n)) for n in range(200)], [(0.5, shown(n)) for n in range(20)], frozen_s=30.0)
    for number in range(20):
        plan.take()
        plan.camera.decoded(number % 2 == 0)
    assert plan.camera.state.condition == "degraded" and "50% of the frames" in plan.camera.state.reason
    while plan.camera.state.losses == 0:
        plan.take()
        plan.camera.decoded(False)
    assert [state.reason for state in plan.states if state.condition == "lost"] == [
        "no image could be decoded for 30 s"
    ]


def test_a_server_that_accepts_and_stays_silent_is_left_soon() -> None:
    """The first frame usually came at once, so the time-out of five minutes is not waited for."""
    silent = FakeCamera([Hang()], live=True, timeout_s=300)
    openings = iter([FakeCamera([Frame(shown(0), 0.0, "x"), LOST], live=True), silent])
    well = FakeCamera([Frame(shown(1), 0.0, "x")], live=True)
    started = time.monotonic()
    with ReconnectingCamera(lambda: next(openings, well)) as camera:
        assert camera.capture() is not None and camera.capture() is not None
        assert time.monotonic() - started < PLENTY_S and silent.closed and camera.state.losses == 2


def test_a_reopened_camera_in_the_dark_starts_no_thread_for_each_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: started.append(timer))
    monkeypatch.setattr(threading.Timer, "join", lambda timer: None)
    plan = Plan([(0.0, shown(0)), (0.0, LOST)], [(1.0, BLACK), *[(0.1, BLACK)] * 39])
    plan.take()
    for _ in range(40):
        with pytest.raises(ImageError):
            plan.camera.capture()
    assert len(started) == 1


ODD = [
    np.zeros((0, 0, 3), dtype=np.uint8),
    np.zeros((24, 32, 3), dtype=np.uint16),
    np.zeros((24, 32, 2), dtype=np.uint8),
    np.zeros((2, 2, 2, 2), dtype=np.uint8),
    np.zeros((24, 32, 3), dtype=np.float32),
    b"",
    b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x00\x00\x00\x03" + bytes(30),
    jpeg_image(0)[:300],
    b"\xff\xd8",
]


@pytest.mark.parametrize("image", ODD)
def test_unsupported_frames_are_rejected_and_counted(image: Any) -> None:
    plan = Plan([(0.0, image), (5.0, shown(0))])
    with pytest.raises(ImageError):
        plan.camera.capture()
    assert plan.camera.state.unusable == 1 and plan.camera.state.condition == "opening"
    plan.take()
    assert plan.camera.state.condition == "delivering"


def test_nothing_but_unusable_frames_is_a_loss() -> None:
    torn = ImageError("torn")
    plan = Plan([(0.0, shown(0)), *[(10.0, torn)] * 9], [(0.0, shown(1))], frozen_s=30.0)
    plan.take()
    for _ in range(3):
        with pytest.raises(ImageError):
            plan.camera.capture()
    plan.take()
    lost = [state.reason for state in plan.states if state.condition == "lost"]
    assert len(lost) == 1 and "no usable image for 30 s" in lost[0]


images = st.one_of(
    st.integers(0, 5).map(shown),
    st.just(BLACK),
    st.sampled_from(ODD),
    st.integers(0, 3).map(lambda n: shown(n, width=16)),
    st.just(shown(0, height=8)),
    st.binary(max_size=20),
    st.sampled_from([LOST, None, ImageError("torn"), OSError("odd")]),
)
scripts = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 5.0, 40.0]), images), max_size=12)


@given(openings=st.lists(st.one_of(scripts, st.just(LOST), st.just(CameraSpecError("x"))), max_size=5))
def test_whatever_a_source_does(openings: list[Any]) -> None:
    """Never a `CameraError`; each opened source is closed; the counters agree with what was captured."""
    try:
        plan = Plan([], *openings)
    except CameraSpecError:
        return
    good = bad = 0
    while True:
        try:
            frame = plan.camera.capture()
        except ImageError:
            bad += 1
            continue
        if frame is None:
            break
        good += 1
        assert plan.camera.state.condition in ("delivering", "resized", "degraded")
    assert (plan.camera.state.frames, plan.camera.state.unusable) >= (good, bad)
    assert plan.camera.state.frames == good
    assert [source.closed for source in plan.opened] == [1] * len(plan.opened)
    assert plan.camera.state.condition == "closed" and plan.camera.state.losses <= len(plan.opened)


# --- Closing from another thread, on the real clock


def waits_and_is_closed(camera: ReconnectingCamera) -> None:
    captured: list[Frame | None] = []

    def capture() -> None:
        while (frame := camera.capture()) is not None:
            captured.append(frame)
        captured.append(None)

    waiting = threading.Thread(target=capture, daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    started = time.monotonic()
    camera.close()
    waiting.join(PLENTY_S)
    assert captured[-1:] == [None] and camera.state.condition == "closed"
    assert time.monotonic() - started < PLENTY_S / 2


def test_closing_wakes_a_capture_that_hangs() -> None:
    waits_and_is_closed(ReconnectingCamera(lambda: FakeCamera([Hang()], live=True, timeout_s=300)))


def test_closing_wakes_a_capture_that_waits_to_reopen() -> None:
    def absent() -> Camera:
        raise LOST

    waits_and_is_closed(ReconnectingCamera(absent, backoff=Backoff(first_s=300, max_s=300, jitter=lambda: 1.0)))


def test_closing_does_not_wait_for_opening_and_closes_a_late_camera() -> None:
    slow, release, made = threading.Event(), threading.Event(), []

    def opened() -> Camera:
        if slow.is_set():
            assert release.wait(PLENTY_S)
        made.append(FakeCamera([LOST], live=True))
        return made[-1]

    camera = ReconnectingCamera(opened, backoff=Backoff(first_s=0.01, interval_s=0.0))
    slow.set()
    waits_and_is_closed(camera)
    assert [source.closed for source in made] == [True]
    release.set()
    deadline = time.monotonic() + PLENTY_S
    while time.monotonic() < deadline and not (len(made) == 2 and made[1].closed):
        time.sleep(0.02)
    assert [source.closed for source in made] == [True, True]


# --- Real sources that die and come back

QUICK = Backoff(first_s=0.1, max_s=0.5, interval_s=0.0)


def frames_until(camera: ReconnectingCamera, done: Callable[[CameraState], bool]) -> CameraState:
    """Capture until the state is as expected."""
    deadline = time.monotonic() + 2 * PLENTY_S
    while time.monotonic() < deadline:
        assert camera.capture() is not None
        if done(camera.state):
            return camera.state
    raise AssertionError(f"in vain: {camera.state}")


@pytest.fixture
def streams() -> Iterator[StreamServer]:
    server = StreamServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def rtsp() -> Iterator[RtspServer]:
    server = RtspServer()
    server.start()
    yield server
    server.kill()


def test_an_mjpeg_server_that_is_killed_and_comes_back(streams: StreamServer) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    states: list[CameraState] = []
    before = held()
    with ReconnectingCamera(
        lambda: open_camera(streams.spec("normal"), timeout_s=5), backoff=QUICK, on_change=states.append
    ) as camera:
        for turn in range(1, 4):
            frames_until(camera, lambda state: state.condition == "delivering")
            streams.kill()
            again = threading.Timer(0.5, streams.start)
            again.start()
            frames_until(camera, lambda state, turn=turn: state.losses >= turn)  # type: ignore[misc]
            again.join()
    assert [state.condition for state in states if state.condition != "lost"] == ["delivering"] * 4 + ["closed"]
    assert any("nothing listens there" in state.reason for state in states)
    assert held()[0] <= before[0] + 1 and held()[1] <= before[1]  # the server's own pipe


def test_a_stream_that_stalls_is_reopened(streams: StreamServer) -> None:
    with ReconnectingCamera(lambda: open_camera(streams.spec("stall"), timeout_s=0.5), backoff=QUICK) as camera:
        state = frames_until(camera, lambda state: state.losses >= 2)
    assert state.condition == "delivering"


def test_an_rtsp_server_and_the_process_that_reads_it_are_killed_and_come_back(rtsp: RtspServer) -> None:
    opened: list[Any] = []

    def open_it() -> Camera:
        opened.append(open_camera(rtsp.url, timeout_s=15))
        return opened[-1]

    with ReconnectingCamera(open_it, backoff=QUICK) as camera:
        frames_until(camera, lambda state: state.frames >= 2)
        os.kill(opened[-1].pid, signal.SIGKILL)
        frames_until(camera, lambda state: state.losses == 1 and state.condition == "delivering")
        rtsp.kill()
        again = threading.Timer(0.5, rtsp.start)
        again.start()
        frames_until(camera, lambda state: state.losses >= 2 and state.condition == "delivering")
        again.join()
    assert not Path(f"/proc/{opened[-1].pid}").exists()
