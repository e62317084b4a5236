"""Handlers of the host's commands, on a real bundle."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from eyas_device.agent.handlers import handlers
from eyas_device.agent.loop import Loop
from eyas_device.agent.overrides import Overrides
from eyas_device.agent.reporter import Reporter
from eyas_device.bundle import Bundle
from eyas_device.camera import Frame
from eyas_device.config import COMMANDS, Config
from eyas_device.predict import Classifier
from eyas_device.telemetry.arguments import CommandRefused
from eyas_device.telemetry.messages import Command, Profile
from eyas_device.telemetry.remote import Handler
from tests.device.agent.test_loop import LiveCamera
from tests.support import tiny


class FakeReporter:
    """Counts and keeps what is reported."""

    def __init__(self) -> None:
        self.statuses = 0
        self.events = 0
        self.profiles: list[Profile] = []

    def report_status(self) -> None:
        self.statuses += 1

    def request_event(self, command: str, seconds: float) -> str:
        assert command == "its id" and 55 < seconds <= 60
        self.events += 1
        return "included"

    def report_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)


@pytest.fixture
def reporter() -> FakeReporter:
    return FakeReporter()


class Clocks:
    """A monotonic and a wall clock that a test moves."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 100.0, 1.8e9


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def loop(pristine_bundle: Path) -> Iterator[Loop]:
    frames = (Frame(image=tiny.draw_shape("disc", 1), time=time.time(), source=str(n)) for n in itertools.count())
    with Classifier.open(pristine_bundle) as classifier:
        yield Loop(classifier, LiveCamera(frames))


@pytest.fixture
def overrides(loop: Loop, reporter: FakeReporter, clocks: Clocks) -> Overrides:
    return Overrides(loop, on_change=reporter.report_status, clock=lambda: clocks.monotonic, wall=lambda: clocks.wall)


@pytest.fixture
def do(loop: Loop, reporter: FakeReporter, overrides: Overrides) -> Callable[..., Mapping[str, Any]]:
    table: Mapping[str, Handler] = handlers(Config, loop, cast(Reporter, reporter), overrides)
    assert set(table) == set(COMMANDS), "every command of the contract has a handler"
    return lambda name, **arguments: table[name](
        Command(id="its id", name=name, arguments=arguments, expires=time.time() + 60)
    )


Do = Callable[..., Mapping[str, Any]]


@pytest.mark.parametrize(
    ("arguments", "seconds"), [({}, 3600), ({"minutes": 2}, 120), ({"seconds": 0.5}, 0.5), ({"minutes": 1440.0}, 86400)]
)
def test_a_pause_ends_by_itself(
    do: Do, loop: Loop, overrides: Overrides, reporter: FakeReporter, clocks: Clocks, arguments: Any, seconds: float
) -> None:
    assert do("pause", **arguments) == {"until": clocks.wall + seconds}
    assert loop.paused and overrides.paused_until == clocks.wall + seconds and reporter.statuses == 1
    clocks.monotonic += seconds - 0.25
    clocks.wall += 1e6  # a clock that is corrected ends nothing
    overrides.on_tick()
    assert loop.paused and reporter.statuses == 1
    clocks.monotonic += 0.25
    overrides.on_tick()
    assert not loop.paused and overrides.paused_until is None and reporter.statuses == 2


def test_a_pause_is_prolonged_and_ended(do: Do, loop: Loop, overrides: Overrides, clocks: Clocks) -> None:
    do("pause", seconds=10)
    clocks.monotonic += 9
    do("pause", seconds=10)
    clocks.monotonic += 9
    overrides.on_tick()
    assert loop.paused
    do("resume")
    assert not loop.paused and overrides.paused_until is None
    loop.pause()  # by a signal: it has no end
    clocks.monotonic += 1e6
    overrides.on_tick()
    assert loop.paused and overrides.paused_until is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"minutes": 0},
        {"minutes": -1},
        {"minutes": 1441},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"minutes": "5"},
        {"minutes": True},
        {"minutes": 1, "seconds": 1},
        {"hours": 1},
    ],
)
def test_an_impossible_pause_is_refused(do: Do, loop: Loop, arguments: dict[str, Any]) -> None:
    with pytest.raises(CommandRefused, match=r"pause: .*(allowed|takes seconds, minutes)"):
        do("pause", **arguments)
    assert not loop.paused


def test_a_threshold_holds_for_its_time(do: Do, loop: Loop, overrides: Overrides, clocks: Clocks) -> None:
    image, classifier = tiny.draw_shape("disc", 1), loop.classifier
    assert classifier is not None and not classifier.predict(image).uncertain and overrides.fault == ""
    assert do("set-thresholds", threshold=0.95) == {"before": 0.9, "threshold": 0.95, "until": clocks.wall + 86400}
    until = clocks.wall + 600
    assert do("set-thresholds", threshold=1.0, minutes=10) == {"before": 0.95, "threshold": 1.0, "until": until}
    assert classifier.predict(image).uncertain
    assert overrides.fault.startswith("a command set the threshold to 1 instead of 0.9, until 2027-01-15 08:10 UTC")
    clocks.monotonic += 600
    overrides.on_tick()
    assert classifier.threshold == 0.9 and overrides.fault == ""


def test_another_model_comes_with_its_own_threshold(
    do: Do, loop: Loop, overrides: Overrides, reporter: FakeReporter, clocks: Clocks, pristine_bundle: Path
) -> None:
    do("set-thresholds", threshold=0.99)
    overrides.on_model(cast(Classifier, loop.classifier))
    assert overrides.fault
    with Classifier.open(pristine_bundle) as other:
        overrides.on_model(other)
        assert overrides.fault == "" and other.threshold == 0.9 and reporter.statuses == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"threshold": "0.5"},
        {"threshold": True},
        {"threshold": float("nan")},
        {"threshold": 1.5},
        {"threshold": 0},
        {"threshold": 1 / len(tiny.LABELS)},
        {"threshold": 0.8, "minutes": 20_000},
        {"other": 0.5},
    ],
)
def test_impossible_thresholds_change_nothing(arguments: dict[str, Any], do: Do, loop: Loop) -> None:
    with pytest.raises(CommandRefused, match="set-thresholds: "):
        do("set-thresholds", **arguments)
    assert loop.classifier is not None and loop.classifier.threshold == 0.9


def test_a_snapshot_asks_for_an_event(do: Do, loop: Loop, reporter: FakeReporter) -> None:
    assert do("snapshot") == {"image": "included"}
    assert reporter.events == 1
    loop.pause()
    with pytest.raises(CommandRefused, match="paused"):
        do("snapshot")
    assert reporter.events == 1


@pytest.mark.parametrize("name", ["resume", "snapshot", "bench", "doctor"])
def test_an_unknown_argument_is_refused(do: Do, name: str) -> None:
    with pytest.raises(CommandRefused, match=f"{name}: unknown argument 'x'; it takes no arguments"):
        do(name, x=1)


def test_a_measurement_is_of_what_runs(reporter: FakeReporter, pristine_bundle: Path) -> None:
    """The second artefact with two threads runs here, as a saved selection or the configuration may want it."""
    names = [artefact.name for artefact in Bundle.open(pristine_bundle).manifest.artefacts]
    with Classifier.open(pristine_bundle, "litert", "litert-fp32", threads=2) as classifier:
        assert classifier.artefact.name == "litert-fp32" != names[0] or len(names) > 1
        loop = Loop(classifier, LiveCamera(iter(())))
        table = handlers(Config, loop, cast(Reporter, reporter), Overrides(loop))
        data = table["bench"](Command(name="bench"))
    (profile,) = reporter.profiles
    (result,) = profile.results
    assert (result["runtime"], result["artefact"]) == ("litert", "litert-fp32")
    (measured,) = data["measured"]
    assert data["results"] == 1 and (measured["artefact"], measured["threads"]) == ("litert-fp32", 2)
    assert 0 < measured["p50_ms"] <= measured["p99_ms"] and measured["frames_per_second"] > 1
    assert result["settings"]["threads"] == 2 and result["settings"]["bundle_version"] == "1.2.3"
    assert "numpy" in profile.versions


def test_a_measurement_that_takes_too_long_leaves_no_process(
    loop: Loop, reporter: FakeReporter, overrides: Overrides, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}; wait"
    monkeypatch.setattr("eyas_device.agent.handlers.module_command", lambda *_: ["sh", "-c", script])
    table = handlers(Config, loop, cast(Reporter, reporter), overrides, bench_timeout_s=1.0)
    with pytest.raises(CommandRefused, match="no result within 1 s"):
        table["bench"](Command(name="bench"))
    grandchild, child = map(int, pids.read_text().split())
    assert not reporter.profiles
    for pid in (child, grandchild):
        deadline = time.monotonic() + 5
        while _runs(pid):
            assert time.monotonic() < deadline, f"{pid} was left behind"
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_doctor_leaves_camera_and_broker_alone(do: Callable[..., Mapping[str, Any]]) -> None:
    checks = {row["check"]: row["status"] for row in do("doctor")["checks"]}
    assert {"libraries", "litert", "disk"} <= set(checks)
    assert not {"camera", "view", "broker"} & set(checks)
