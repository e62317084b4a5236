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
from eyas_device.agent.reporter import Reporter
from eyas_device.camera import Frame
from eyas_device.config import COMMANDS, Config
from eyas_device.predict import Classifier
from eyas_device.telemetry.messages import Profile
from eyas_device.telemetry.remote import CommandRefused, Handler
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

    def request_event(self) -> None:
        self.events += 1

    def report_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)


@pytest.fixture
def reporter() -> FakeReporter:
    return FakeReporter()


@pytest.fixture
def loop(pristine_bundle: Path) -> Iterator[Loop]:
    frames = (Frame(image=tiny.draw_shape("disc", 1), time=time.time(), source=str(n)) for n in itertools.count())
    with Classifier.open(pristine_bundle) as classifier:
        yield Loop(classifier, LiveCamera(frames))


@pytest.fixture
def do(loop: Loop, reporter: FakeReporter) -> Callable[..., Mapping[str, Any]]:
    table: Mapping[str, Handler] = handlers(Config(), loop, cast(Reporter, reporter))
    assert set(table) == set(COMMANDS), "every command of the contract has a handler"
    return lambda name, **arguments: table[name](arguments)


def test_pause_and_resume_are_reported(
    do: Callable[..., Mapping[str, Any]], loop: Loop, reporter: FakeReporter
) -> None:
    do("pause")
    assert loop.paused and reporter.statuses == 1
    do("resume")
    assert not loop.paused and reporter.statuses == 2


def test_a_threshold_counts_from_the_next_answer(do: Callable[..., Mapping[str, Any]], loop: Loop) -> None:
    image = tiny.draw_shape("disc", 1)
    assert not loop.classifier.predict(image).uncertain
    assert do("set-thresholds", threshold=1.0) == {"before": 0.9, "threshold": 1.0}
    assert loop.classifier.predict(image).uncertain


@pytest.mark.parametrize(
    "arguments",
    [{}, {"threshold": "0.5"}, {"threshold": True}, {"threshold": float("nan")}, {"threshold": 1.5}, {"other": 0.5}],
)
def test_odd_thresholds_change_nothing(
    arguments: dict[str, Any], do: Callable[..., Mapping[str, Any]], loop: Loop
) -> None:
    with pytest.raises(CommandRefused, match="threshold"):
        do("set-thresholds", **arguments)
    assert loop.classifier.threshold == 0.9


def test_a_snapshot_asks_for_an_event(do: Callable[..., Mapping[str, Any]], reporter: FakeReporter) -> None:
    do("snapshot")
    assert reporter.events == 1


def test_a_measurement_goes_out_as_a_profile(do: Callable[..., Mapping[str, Any]], reporter: FakeReporter) -> None:
    assert do("bench")["results"] == 1
    (profile,) = reporter.profiles
    assert profile.results[0]["artefact"] == "litert-int8"
    assert "numpy" in profile.versions


def test_the_doctor_leaves_camera_and_broker_alone(do: Callable[..., Mapping[str, Any]]) -> None:
    checks = {row["check"]: row["status"] for row in do("doctor")["checks"]}
    assert {"libraries", "litert", "disk"} <= set(checks)
    assert not {"camera", "view", "broker"} & set(checks)


def test_there_is_no_updater_yet(do: Callable[..., Mapping[str, Any]]) -> None:
    with pytest.raises(CommandRefused, match="eyas flash"):
        do("check-update")
