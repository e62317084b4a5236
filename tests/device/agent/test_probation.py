"""Probation across the seam: real models that differ, in a running agent, and what becomes of each of them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from eyas_device.agent.active import ModelSwitch
from eyas_device.agent.app import Agent
from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.outputs import Outputs
from eyas_device.agent.probation import HEALTHY_S, Probation
from eyas_device.agent.report import StatusText
from eyas_device.agent.reporter import Reporter
from eyas_device.agent.systemd import Notifier
from eyas_device.camera import open_camera
from eyas_device.config import CameraSection, Config, DeviceSection, LoopSection, OutputSection, TelemetrySection
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import Pixels
from eyas_device.updates.records import MAX_ATTEMPTS, Verdict, read_agent
from eyas_device.updates.release import Bounds
from eyas_device.updates.slots import SlotError, Slots
from tests.support.cut_process import cut_at
from tests.support.tiny_updates import signed, write_update

FRAMES = "fake:?frames=100000000&size=64x48"
"""A source that waits for the loop: what a loaded machine does to a live one is not tested here."""
BOUNDS = Bounds(frames=100, min_frames=20, seconds=600.0, max_error_rate=0.05, shadow_every=4)
LIMIT_S = 120.0


class Watcher(Listener):
    """What a running agent does, and when; ends it when `until` is true."""

    def __init__(self, until: Callable[[], bool]) -> None:
        self.frames: list[tuple[int, str]] = []
        """Number of the camera's frame, version of the model."""
        self.swaps: list[tuple[float, str]] = []
        self.agent: Agent | None = None
        self._until, self._version = until, ""
        self._deadline = time.monotonic() + LIMIT_S
        self._looked = 0.0

    def on_model(self, classifier: Classifier) -> None:
        self._version = classifier.bundle.manifest.version
        self.swaps.append((time.monotonic(), self._version))

    def on_prediction(self, predicted: FramePrediction) -> None:
        self.frames.append((int(predicted.source.rpartition("#")[2]), self._version))

    def on_tick(self) -> None:
        assert self.agent is not None
        now = time.monotonic()
        if now > self._deadline or (now - self._looked > 0.05 and self._until()):
            self.agent.loop.stop()
        self._looked = now if now - self._looked > 0.05 else self._looked

    @property
    def versions(self) -> list[str]:
        """Versions that ran, one after the other."""
        return [version for _, version in self.swaps]

    def lost_at_swaps(self) -> list[int]:
        """Frames of the camera between the last prediction of a model and the first of the next."""
        return [b[0] - a[0] - 1 for a, b in pairwise(self.frames) if a[1] != b[1]]


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    (tmp_path / "state").mkdir()
    return Slots(tmp_path / "state")


@pytest.fixture
def old(tmp_path: Path, slots: Slots) -> Path:
    """The model that has run so far, in slot a."""
    bundle = write_update(tmp_path / "1.0.0", "1.0.0")
    slots.install(bundle)
    return bundle


def configured(slots: Slots, source: str = FRAMES) -> Config:
    return Config(
        device=DeviceSection(name="cam", state=str(slots.state)),
        camera=CameraSection(source=source),
        loop=LoopSection(fps=200.0),
    )


def run(slots: Slots, until: Callable[[], bool], *, update: Path | None = None, bounds: Bounds = BOUNDS,
        source: str = FRAMES) -> Watcher:  # fmt: skip
    """Run an agent until `until` is true, and give it `update` as an updater of its own would."""
    watcher = Watcher(until)
    config = configured(slots, source)
    with Agent(config, listeners=lambda agent: [watcher], service=lambda: config) as agent:
        watcher.agent = agent

        def deliver() -> None:
            while len(watcher.frames) < 20:
                time.sleep(0.02)
            assert update is not None
            slots.install(update, release=signed(update, bounds))
            os.kill(os.getpid(), signal.SIGHUP)

        thread = threading.Thread(target=deliver, daemon=True)
        if update is not None:
            thread.start()
        agent.run()
        if update is not None:
            thread.join(10)
    return watcher


def ended(slots: Slots, slot: str = "b") -> Callable[[], bool]:
    def check() -> bool:
        verdict = slots.verdict(slot)
        return verdict is not None and verdict.state != "running"

    return check


def settled(slots: Slots, version: str) -> Callable[[], bool]:
    """That a probation has ended and the agent runs `version`."""

    def check() -> bool:
        record = read_agent(slots.state)
        return ended(slots)() and record is not None and record.model.endswith(version) and slots.linked() is not None

    return check


def verdict_of(slots: Slots, slot: str = "b") -> Verdict:
    return slots.verdict(slot) or pytest.fail("no verdict")


def test_the_previous_model_predicts_after_everybody_has_the_new_ones_prediction(slots: Slots, old: Path) -> None:
    config = msgspec.structs.replace(
        configured(slots),
        telemetry=TelemetrySection(broker="127.0.0.1:1"),
        output=(OutputSection(kind="mqtt"),),
    )
    with Agent(config) as agent:
        kinds = [type(listener) for listener in agent.loop.listeners]
    assert kinds.index(Reporter) < kinds.index(Outputs) < kinds.index(Probation) == len(kinds) - 3
    assert kinds[-2:] == [StatusText, Notifier]


def test_a_good_model_is_committed(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0")
    watcher = run(slots, ended(slots), update=update)
    verdict = verdict_of(slots)
    assert verdict.state == "passed" and verdict.previous == "tiny-shapes 1.0.0"
    assert verdict.reason.startswith("100 predictions in ") and "the same label on 25 of 25 frames" in verdict.reason
    assert watcher.versions == ["1.0.0", "2.0.0"] and slots.linked() == "b"
    assert slots.attempts("b") == 0 and slots.refusal("b") == ""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong", "the previous model's label on 0 of 25 frames; 70.0% are required"),
        ("slow", "more than 2 times as slow as the previous model on "),
        ("nan", " predictions failed or were not finite; 5.0% are allowed"),
    ],
)
def test_a_bad_model_goes_back_by_itself(kind: str, reason: str, slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", kind)
    watcher = run(slots, settled(slots, "1.0.0"), update=update)
    verdict = verdict_of(slots)
    assert verdict.state == "failed" and reason in verdict.reason
    assert watcher.versions == ["1.0.0", "2.0.0", "1.0.0"] and slots.linked() == "a"
    assert slots.refusal("b") == f"failed on probation: {verdict.reason}"
    assert watcher.swaps[-1][0] - (time.monotonic() - time.time() + verdict.ended) < 1.0, "back within a second"
    assert run(slots, lambda: True).versions == ["1.0.0"], "it stays so after a restart"


def test_a_bad_model_goes_back_also_where_the_previous_one_is_not_in_memory(
    slots: Slots, old: Path, tmp_path: Path
) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", "nan")
    bounds = msgspec.structs.replace(BOUNDS, shadow_every=0)
    watcher = run(slots, settled(slots, "1.0.0"), update=update, bounds=bounds)
    assert watcher.versions == ["1.0.0", "2.0.0", "1.0.0"] and slots.linked() == "a"
    assert verdict_of(slots).previous == "" and slots.refusal("b").startswith("failed on probation: ")
    good = write_update(tmp_path / "3.0.0", "3.0.0")
    run(slots, lambda: slots.linked() == "b" and ended(slots)(), update=good, bounds=bounds)
    assert (verdict_of(slots).model, verdict_of(slots).state) == ("tiny-shapes 3.0.0", "passed")
    assert verdict_of(slots).reason.endswith("not compared with a previous model")


@pytest.mark.parametrize(("kinds", "state"), [(("known", "right"), "failed"), (("right", "known"), "passed")])
def test_a_model_to_which_the_camera_is_strange_goes_back_if_it_was_not_so_to_the_previous_one(
    kinds: tuple[str, str], state: str, slots: Slots, tmp_path: Path
) -> None:
    slots.install(write_update(tmp_path / "1.0.0", "1.0.0", kinds[0]))
    update = write_update(tmp_path / "2.0.0", "2.0.0", kinds[1])
    run(slots, ended(slots), update=update, bounds=msgspec.structs.replace(BOUNDS, max_ood_share=0.2))
    verdict = verdict_of(slots)
    assert verdict.state == state
    if state == "failed":
        assert (
            "frames are out of distribution for it and not for the previous model; 20.0% are allowed" in verdict.reason
        )


def test_the_dark_is_no_fault_of_a_model(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", "nan")
    bounds = msgspec.structs.replace(BOUNDS, seconds=1.0)
    slots.install(update, release=signed(update, bounds))
    run(slots, ended(slots), source="fake:?live=1&fps=20&frames=100000000&size=64x48&black=0-99999999")
    verdict = verdict_of(slots)
    assert verdict.state == "passed" and verdict.reason.startswith("0 predictions in 1 s")
    assert verdict.reason.endswith("too few to compare the answers")
    assert slots.attempts("b") == 0 and slots.linked() == "b"


def test_an_ordered_restart_continues_a_probation_and_is_no_fault(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", "wrong")
    slots.install(update, release=signed(update, BOUNDS))
    config = configured(slots)
    for _ in range(MAX_ATTEMPTS + 1):  # more restarts than a crash loop may have
        watcher = Watcher(lambda: False)
        with Agent(config, listeners=lambda agent, w=watcher: [w], service=lambda: config) as agent:
            watcher.agent = agent
            agent.run(frames=10)
        assert watcher.versions == ["2.0.0"]
        assert slots.attempts("b") == 0
    verdict = verdict_of(slots)
    assert (verdict.state, verdict.tally.frames) == ("running", 40)
    watcher = run(slots, settled(slots, "1.0.0"))
    assert watcher.versions == ["2.0.0", "1.0.0"]
    after = verdict_of(slots)
    assert after.state == "failed" and after.started == verdict.started and after.previous == "tiny-shapes 1.0.0"
    assert "the previous model's label on 0 of " in after.reason


def test_nothing_is_installed_over_the_previous_model(slots: Slots, old: Path, tmp_path: Path) -> None:
    first, second = (write_update(tmp_path / version, version) for version in ("2.0.0", "3.0.0"))
    slots.install(first, release=signed(first, BOUNDS))
    refusals: list[str] = []

    def installed() -> bool:
        try:
            slots.install(second, release=signed(second, BOUNDS))
        except SlotError as error:
            refusals.append(str(error))
            return False
        return True

    watcher = run(slots, installed)
    assert refusals and "a model is on probation" in refusals[0]
    assert watcher.versions == ["2.0.0"] and verdict_of(slots).state == "passed"
    assert slots.verdict("a") is None and slots.linked() == "a"
    assert run(slots, ended(slots, "a")).versions == ["3.0.0"]
    assert verdict_of(slots, "a").previous == "tiny-shapes 2.0.0"


def test_without_a_previous_model_errors_are_judged_and_a_bad_one_stays_and_says_so(
    slots: Slots, tmp_path: Path
) -> None:
    update = write_update(tmp_path / "1.0.0", "1.0.0", "nan")
    slots.install(update, release=signed(update, BOUNDS))
    problems: list[str] = []

    def said() -> bool:
        record = read_agent(slots.state)
        problems.append(record.refused_reason if record is not None else "")
        return bool(problems[-1])

    watcher = run(slots, said)
    assert watcher.versions == ["1.0.0"] and len(watcher.frames) > 10, "a camera never goes dark because of us"
    assert verdict_of(slots, "a").state == "failed" and "no other model to go back to" in problems[-1]
    assert run(slots, lambda: True).versions == ["1.0.0"]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Versions that raise on the camera's frames from the first frame of version 2.0.0 on, not on golden images."""
    versions: set[str] = set()
    predict, begun = Classifier.predict, threading.Event()

    def failing(classifier: Classifier, frame: Pixels) -> Prediction:
        if frame[6:9, :3].mean() > 50:  # the background: 40 in golden images, 60 in the camera's
            if classifier.bundle.manifest.version == "2.0.0":
                begun.set()
            if begun.is_set() and classifier.bundle.manifest.version in versions:
                raise RuntimeError("a kernel failed")
        return predict(classifier, frame)

    monkeypatch.setattr(Classifier, "predict", failing)
    monkeypatch.setattr("eyas_device.agent.loop._PAUSE_S", 0.1)
    return versions


def test_a_previous_model_that_fails_is_no_fault_of_the_new_one(
    slots: Slots, old: Path, tmp_path: Path, fails: set[str]
) -> None:
    fails.add("1.0.0")
    run(slots, ended(slots), update=write_update(tmp_path / "2.0.0", "2.0.0"))
    verdict = verdict_of(slots)
    assert verdict.state == "passed" and verdict.reason.endswith("not compared with a previous model")


def test_a_model_that_raises_goes_back_before_its_errors_end_the_agent(
    slots: Slots, old: Path, tmp_path: Path, fails: set[str]
) -> None:
    fails.add("2.0.0")
    live = "fake:?live=1&fps=20&frames=100000000&size=64x48"
    watcher = run(slots, settled(slots, "1.0.0"), update=write_update(tmp_path / "2.0.0", "2.0.0"), source=live)
    assert watcher.versions == ["1.0.0", "2.0.0", "1.0.0"]
    assert "predictions failed or were not finite" in verdict_of(slots).reason


def test_at_most_two_frames_are_lost_at_a_swap_and_at_a_roll_back(slots: Slots, old: Path, tmp_path: Path) -> None:
    """Of a live camera; the best of three, because other work on the machine loses frames, too."""
    lost = []
    for number in range(2, 5):
        update = write_update(tmp_path / str(number), f"{number}.0.0", "wrong")
        watcher = run(slots, settled(slots, "1.0.0"), update=update,
                      source="fake:?live=1&fps=20&frames=100000000&size=64x48")  # fmt: skip
        assert watcher.versions == ["1.0.0", f"{number}.0.0", "1.0.0"]
        lost.append(max(watcher.lost_at_swaps()))
        if lost[-1] <= 2:
            return
    pytest.fail(f"frames lost: {lost}")


# --- kills and power cuts --------------------------------------------------------------------------------------------


def test_a_crash_loop_on_probation_ends_in_the_previous_model(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0")
    slots.install(update, release=signed(update, Bounds()))
    (config := tmp_path / "device.toml").write_text(
        f'[device]\nname = "cam"\nstate = "{slots.state}"\n[camera]\n'
        'source = "fake:?live=1&fps=20&frames=100000000&size=64x48"\n'
    )
    ran = []
    for _ in range(MAX_ATTEMPTS + 1):
        process = subprocess.Popen([sys.executable, "-m", "eyas_device", "run", "--config", str(config)])
        try:
            deadline = time.monotonic() + LIMIT_S
            while (record := read_agent(slots.state)) is None or record.pid != process.pid or not record.model:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            ran.append(record.model)
        finally:
            process.kill()
            process.wait(10)
    assert ran == ["tiny-shapes 2.0.0"] * MAX_ATTEMPTS + ["tiny-shapes 1.0.0"]
    verdict = verdict_of(slots)
    assert verdict.state == "failed" and f"{MAX_ATTEMPTS} attempts to run it ended" in verdict.reason
    assert slots.linked() == "a" and verdict.reason == slots.refusal("b")


def test_a_power_cut_at_any_write_of_a_roll_back(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", "wrong")
    slots.install(update, release=signed(update, BOUNDS))
    config, at, running = configured(slots), 0, 0
    pristine = tmp_path / "pristine"
    shutil.copytree(slots.state, pristine, symlinks=True)
    while True:
        shutil.rmtree(slots.state)
        shutil.copytree(pristine, slots.state, symlinks=True)
        with switched(config) as (jobs, version):
            assert version == "2.0.0"
            cut = cut_at(slots.state, lambda jobs=jobs: jobs[-1](), at)
        with switched(config, run=False) as (_, version):
            verdict = verdict_of(slots)
            if verdict.state == "running":
                assert cut and version == "2.0.0"
                running += 1
            else:
                assert (verdict.state, version) == ("failed", "1.0.0"), at
                assert slots.refusal("b") == f"failed on probation: {verdict.reason}", at
        if not cut:
            break
        at += 1
    assert at > running > 0
    assert at >= 6


@contextmanager
def switched(config: Config, *, run: bool = True) -> Iterator[tuple[list[Callable[[], object]], str]]:
    """An agent's models, killed at the end, whose trial has ended and is not settled: its jobs, what version runs."""
    jobs: list[Callable[[], object]] = []
    with ModelSwitch(config, Notifier(environ={})) as switch, open_camera(FRAMES) as camera:
        classifier = switch.open_first(required=True)
        assert classifier is not None
        loop = Loop(classifier, camera, [switch, switch.probation])
        switch.crashed = True
        switch.submit = jobs.append
        switch.connect(loop, lambda: config)
        if run:
            loop.run(frames=1)
            jobs.pop()()  # load the previous model
            loop.run(frames=BOUNDS.frames)
        yield jobs, classifier.bundle.manifest.version


def test_a_board_that_is_switched_off_after_a_while_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(tmp_path)
    slots.folder.mkdir()
    for boot in ("first", "second", "third", "fourth"):
        monkeypatch.setattr("eyas_device.updates.slot_records.boot_id", lambda boot=boot: boot)
        slots.count_attempt("a", "")
        assert slots.attempts("a") == 1
        slots.settle_attempt("a")
    for count in (2, 3):
        slots.count_attempt("a", "")
        assert slots.attempts("a") == count, "a process that ends in the same boot is the model's fault"
    monkeypatch.setattr("eyas_device.updates.slot_records.boot_id", lambda: "fifth")
    slots.count_attempt("a", "")
    assert slots.attempts("a") == 4, "a board that went down in the first minute may be its fault, too"


def test_power_cuts_in_the_first_seconds_take_no_model_back_that_has_been_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never was may have brought the board down; crashes in one boot count against any model."""
    slots, now = Slots(tmp_path), [0.0]
    slots.folder.mkdir()

    def start(boot: str, key: str = "") -> int:
        monkeypatch.setattr("eyas_device.updates.slot_records.boot_id", lambda: boot)
        slots.count_attempt("a", key)
        return slots.excess("a")

    assert [start(boot) for boot in ("1", "2", "3")] == [0, 0, 1], "nothing speaks for it yet"
    for frames in (0, 1):
        probation = Probation(slots, clock=lambda: now[0])
        probation.begin("a")
        for _ in range(frames):
            probation.on_prediction(None)  # type: ignore[arg-type]
        now[0] += HEALTHY_S
        probation.on_tick()
        assert slots.attempts("a") == 0
        cuts = [start(boot) for boot in ("4", "5", "6", "7")]
        assert cuts == ([0] * 4 if frames else [0, 0, 1, 2]), "a minute in the dark proves nothing of a model"
    assert [start("7") for _ in range(3)] == [0, 1, 2], "its process ends, and the board goes on"
    slots.end_attempt("a", healthy=True)
    slots.count_attempt("a", "")
    slots.end_attempt("a", healthy=False)
    assert [start(boot) for boot in ("8", "9", "10", "11")] == [0] * 4, "an ordered stop forgets nothing good"
    assert [start(boot, "other libraries") for boot in ("12", "13", "14")] == [0, 0, 1]


def test_a_pause_is_no_time_on_probation(slots: Slots, old: Path, tmp_path: Path) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0")
    slots.install(update, release=signed(update, BOUNDS))
    now, paused = [0.0], [True]
    probation = Probation(slots, clock=lambda: now[0])
    probation.is_paused = lambda: paused[0]
    trial = probation.prepare("b")
    assert trial is not None
    with trial:
        probation.begin("b", trial)
        for now[0], paused[0] in ((50.0, True), (60.0, False), (75.0, False), (80.0, True)):
            probation.on_tick()
        assert trial.tally.seconds == 25.0


def test_a_disk_that_takes_nothing_keeps_no_bad_model_running(
    slots: Slots, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = write_update(tmp_path / "2.0.0", "2.0.0", "wrong")
    slots.install(update, release=signed(update, BOUNDS))
    ran: list[str] = []
    on_model = ModelSwitch.on_model

    def noted(switch: ModelSwitch, classifier: Classifier) -> None:
        on_model(switch, classifier)
        ran.append(classifier.bundle.manifest.version)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ModelSwitch, "on_model", noted)
    monkeypatch.setattr("eyas_device.updates.records.atomic_write", full)
    monkeypatch.setattr(Path, "symlink_to", full)
    assert run(slots, lambda: ran == ["2.0.0", "1.0.0"]).versions == ["2.0.0", "1.0.0"]
    assert slots.linked() == "b" and slots.verdict("b") is None
