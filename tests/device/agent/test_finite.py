"""A model whose arithmetic is broken: NaN and infinity are no answers, end nothing, and are reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_device.agent.app import Agent, load_config
from eyas_device.agent.finite import MAX_NONFINITE
from eyas_device.agent.output import JsonLines
from eyas_device.bundle import Bundle
from eyas_device.decision import Decision
from eyas_device.predict import Classifier
from eyas_device.runtimes import Runtime
from eyas_device.telemetry.messages import Event, Header, Status, Window, decode, encode
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.updates.golden import compare_to_golden
from tests.support import tiny
from tests.support.brokers import free_port

BROKEN = {
    "nan": (math.nan, math.nan, math.nan),
    "one nan": (1.0, math.nan, 2.0),
    "inf": (math.inf, 1.0, 2.0),
    "all inf": (math.inf, math.inf, math.inf),
    "minus inf": (-math.inf, 1.0, 2.0),
    "both": (math.inf, -math.inf, math.nan),
}


class Broken(Runtime):
    """A real runtime whose answers are replaced."""

    def __init__(self, runtime: Runtime, logits: Callable[[int], tuple[float, ...] | None]) -> None:
        self._runtime, self._logits, self._calls = runtime, logits, 0
        self.name, self.version = runtime.name, runtime.version

    def infer_in_place(self, write: Callable[[Any], None]) -> Any:
        answer = self._runtime.infer_in_place(write)
        given = self._logits(self._calls)
        self._calls += 1
        return answer if given is None else np.asarray(given, dtype=np.float32)

    def infer(self, pixels: Any) -> Any:
        return self._runtime.infer(pixels)

    def close(self) -> None:
        self._runtime.close()


@pytest.fixture
def broken(pristine_bundle: Path) -> Iterator[Callable[..., Classifier]]:
    opened: list[Classifier] = []

    def make(*logits: float) -> Classifier:
        classifier = Classifier.open(pristine_bundle)
        classifier.runtime = Broken(classifier.runtime, lambda _: logits)
        opened.append(classifier)
        return classifier

    yield make
    for classifier in opened:
        classifier.close()


@pytest.mark.parametrize("logits", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.filterwarnings("error")
def test_an_answer_that_is_not_finite_is_uncertain(
    broken: Callable[..., Classifier], logits: tuple[float, ...], threshold: float
) -> None:
    classifier = broken(*logits)
    classifier.threshold = threshold
    prediction = classifier.predict(tiny.draw_shape("disc", 1))
    assert (prediction.finite, prediction.uncertain, prediction.confidence) == (False, True, 0.0)
    assert np.isfinite(prediction.probabilities).all()
    assert prediction.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("logits", [(3e38, -3e38, 0.0), (0.0, 0.0, 0.0), (88.0, 89.0, 1e-40)])
def test_large_and_equal_logits_are_answers(broken: Callable[..., Classifier], logits: tuple[float, ...]) -> None:
    prediction = broken(*logits).predict(tiny.draw_shape("disc", 1))
    assert prediction.finite
    assert prediction.confidence == pytest.approx(float(prediction.probabilities.max()))


def test_with_costs_the_cautious_label_is_answered(broken: Callable[..., Classifier]) -> None:
    classifier = broken(math.nan, 0.0, 0.0)
    costs = ((0.0, 5.0, 5.0), (1.0, 0.0, 9.0), (1.0, 9.0, 0.0))  # "cross" costs least if nothing is known
    classifier._decision = Decision(costs=costs)
    assert classifier.predict(tiny.draw_shape("disc", 1)).label == "cross"


def test_a_golden_check_refuses_it(broken: Callable[..., Classifier]) -> None:
    classifier = broken(math.nan, 1.0, 2.0)
    result = compare_to_golden(classifier, classifier.bundle.golden())
    assert result.status == "failed" and "not finite" in result.note


@pytest.mark.parametrize("logits", BROKEN.values(), ids=BROKEN)
def test_through_the_agent(
    logits: tuple[float, ...],
    pristine_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Loop, status line, JSON lines, windows, events and status, with ten good answers after fifteen broken ones."""
    spooled: list[Header] = []
    append = Spool.append

    def record(spool: Spool, message: Header) -> None:
        spooled.append(decode(encode(message), type(message)))
        append(spool, message)

    monkeypatch.setattr(Spool, "append", record)
    config = load_config(
        None,
        device={"name": "cam", "state": str(tmp_path)},
        camera={"source": "fake:?frames=25&size=64x48"},
        model={"bundle": str(pristine_bundle)},
        telemetry={"broker": f"127.0.0.1:{free_port()}", "window_s": 60.0},
        privacy={"events": True, "band": (0.0, 1.0), "min_interval_s": 0.0},
    )
    faults: list[tuple[str, ...]] = []
    with Agent(config, listeners=lambda agent: [JsonLines(agent.loop.stop)]) as agent:
        classifier = agent.loop.classifier
        assert classifier is not None
        classifier.runtime = Broken(classifier.runtime, lambda call: logits if call < 15 else None)
        monkeypatch.setattr(agent.monitor.finite, "on_change", lambda: faults.append(agent.monitor.health().faults))
        agent.run()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["finite"] for row in rows] == [False] * 15 + [True] * 10
    assert all(row["uncertain"] and row["confidence"] == 0 for row in rows[:15])
    window = next(message for message in spooled if isinstance(message, Window))
    assert (window.frames, window.nonfinite) == (25, 15)
    assert window.uncertain >= 15
    assert sum(sum(bins) for bins in window.confidence_bins.values()) == 25
    events = [message for message in spooled if isinstance(message, Event)]
    assert events and all(math.isfinite(event.confidence + event.margin + event.entropy) for event in events)
    assert [len(reported) for reported in faults] == [1, 0], "reported once, and withdrawn"
    assert "not finite numbers" in faults[0][0] and "litert" in faults[0][0]
    assert [r.levelname for r in caplog.records if "finite" in r.message].count("ERROR") == 1
    final = [message for message in spooled if isinstance(message, Status)][-1]
    assert (final.state, final.faults) == ("offline", ())


def test_a_few_broken_answers_are_no_fault(pristine_bundle: Path) -> None:
    config = load_config(None, camera={"source": "fake:?frames=60&size=64x48"}, model={"bundle": str(pristine_bundle)})
    nan = BROKEN["nan"]
    with Agent(config) as agent:
        classifier = agent.loop.classifier
        assert classifier is not None and isinstance(classifier.bundle, Bundle)
        classifier.runtime = Broken(classifier.runtime, lambda call: nan if call % MAX_NONFINITE else None)
        agent.run()
        assert agent.monitor.health().faults == ()
