"""From predictions to answers, with a real broker: safe states, changes, connections and the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from paho.mqtt.client import CallbackAPIVersion, Client

from eyas_device.agent.app import Agent
from eyas_device.agent.loop import FramePrediction
from eyas_device.agent.outputs import Outputs
from eyas_device.bundle import MANIFEST, sha256
from eyas_device.camera.reconnecting import CameraState
from eyas_device.config import CameraSection, Config, DeviceSection, ModelSection, OutputSection, TelemetrySection
from eyas_device.errors import ConfigError
from eyas_device.outputs.answer import Answer
from eyas_device.predict import Classifier
from tests.support.brokers import Broker


class Sink:
    max_attempts: int | None = None

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def deliver(self, answer: Answer) -> None:
        self.answers.append(answer)

    def close(self) -> None:
        pass


class Bench:
    """Outputs with one rule, a clock of its own, and predictions on demand."""

    def __init__(self, classifier: Classifier | None = None, **rule: Any) -> None:
        self.now, self.paused, self.ood, self.changes = 100.0, False, False, 0
        self.sink = Sink()
        output = OutputSection(kind="mqtt", **({"hits": 2, "of": 3} | rule))
        self.outputs = Outputs(
            [("mqtt 1", output, self.sink)],
            site="hall",
            device="cam",
            is_paused=lambda: self.paused,
            is_ood=lambda: self.ood,
            on_change=self._count,
            clock=lambda: self.now,
        )
        self.outputs.start()
        self.state()

    def _count(self) -> None:
        self.changes += 1

    def predict(self, label: str = "disc", *, count: int = 1, confidence: float = 0.95, finite: bool = True) -> Answer:
        for _ in range(count):
            self.now += 0.1
            prediction = SimpleNamespace(label=label, confidence=confidence, uncertain=False, finite=finite)
            self.outputs.on_prediction(cast(FramePrediction, SimpleNamespace(prediction=prediction)))
        return self.state()

    def tick(self, seconds: float = 0.1) -> Answer:
        self.now += seconds
        self.outputs.on_tick()
        return self.state()

    def state(self) -> Answer:
        """The last answer that was delivered, which is the one that is shown."""
        wanted = self.outputs._outputs[0]._answer
        deadline = time.monotonic() + 10
        while not self.sink.answers or self.sink.answers[-1] != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self.sink.answers[-1]


def test_on_and_off_with_the_time_of_the_change() -> None:
    bench = Bench(labels=("disc",))
    assert (bench.state().state, bench.state().reason) == ("safe", "starting")
    assert bench.predict().state == "safe"
    on = bench.predict()
    assert (on.state, on.label, on.active, on.site, on.device) == ("on", "disc", True, "hall", "cam")
    delivered = len(bench.sink.answers)
    assert bench.predict(count=20) == on and len(bench.sink.answers) == delivered, "an answer without a change"
    off = bench.predict("cross", count=2)
    assert (off.state, off.active, off.reason) == ("off", False, "") and off.since >= on.since
    bench.outputs.close()
    assert bench.state().state == "offline"


@pytest.mark.parametrize("safe", ["off", "on"])
@pytest.mark.parametrize("cause", ["lost", "frozen", "black", "opening", "paused", "ood", "stale", "not finite"])
def test_safe_while_it_cannot_say(cause: str, safe: str) -> None:
    """And only frames after the cause lead back."""
    bench = Bench(labels=("disc",), safe=safe, stale_s=5.0)
    before = bench.predict("disc" if safe == "off" else "cross", count=3)
    assert before.active == (safe == "off")
    if cause == "paused":
        bench.paused = True
        answer = bench.tick()
    elif cause == "ood":
        bench.ood = True
        answer = bench.tick(1.0)
    elif cause == "stale":
        assert bench.tick(4.9) == before
        answer = bench.tick(0.2)
    elif cause == "not finite":
        answer = bench.predict(finite=False)
    else:
        bench.outputs.on_camera_state(CameraState(condition=cause))  # type: ignore[arg-type]
        answer = bench.state()
    assert (answer.state, answer.active, answer.label) == ("safe", safe == "on", "")
    reasons = {"paused": "paused", "ood": "out of distribution", "stale": "no prediction for 5 s"}
    assert reasons.get(cause, "not finite" if cause == "not finite" else f"camera {cause}") in answer.reason
    if cause not in ("stale", "not finite"):
        assert bench.predict("disc", count=5).state == "safe", "predictions in between do not count"
    bench.paused = bench.ood = False
    bench.outputs.on_camera_state(CameraState(condition="delivering"))
    bench.tick(1.0)
    assert bench.predict("disc").state == "safe", "one frame decides nothing"
    assert bench.predict("disc", count=2).state == "on"


def test_an_output_may_ignore_the_distribution() -> None:
    bench = Bench(labels=("disc",), ood="ignore")
    bench.ood = True
    assert bench.predict(count=3).state == "on"
    assert bench.tick(2.0).state == "on"


def test_labels_that_the_model_does_not_have(pristine_bundle: Path) -> None:
    with Classifier.open(pristine_bundle) as classifier:
        bench = Bench(labels=("disc", "dent"))
        bench.outputs.on_model(classifier)
    assert "tiny-shapes 1.2.3 has no label dent; it has: cross, disc, stripes" in bench.outputs.faults[0]
    assert bench.changes == 1
    answer = bench.predict(count=5)
    assert answer.state == "safe" and "has no label dent" in answer.reason
    assert answer.model == "tiny-shapes 1.2.3" and answer.digest == sha256(pristine_bundle / MANIFEST)[:12]


# --- the whole agent, with a broker -----------------------------------------------------------------------------------


class Subscriber:
    """What a line's controller sees."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[bool, dict[str, Any]]] = []
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda client, *_: client.subscribe("eyas/+/+/answer", 1)
        self.client.on_message = lambda client, data, message: self.messages.append(
            (message.retain, json.loads(message.payload))
        )
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for _, message in list(self.messages):
                if condition(message):
                    return message
            time.sleep(0.01)
        raise AssertionError(self.messages)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path).start()
    yield broker
    broker.stop()


def config(bundle: Path, port: int, tmp_path: Path, *outputs: OutputSection, frames: int = 1_000_000) -> Config:
    return Config(
        device=DeviceSection(site="hall", name="cam", state=str(tmp_path)),
        camera=CameraSection(source=f"fake:?live=1&fps=50&frames={frames}&size=64x48"),
        model=ModelSection(bundle=str(bundle), runtime="litert"),
        telemetry=TelemetrySection(broker=f"127.0.0.1:{port}", delivery="broker"),
        output=outputs,
    )


def test_an_agent_answers_in_its_topic(pristine_bundle: Path, line: Broker, tmp_path: Path) -> None:
    """At connection and at a change, retained; `offline` at the end."""
    anything = OutputSection(kind="mqtt", uncertain=True, hits=2, of=2, ood="ignore")
    subscriber = Subscriber(line.port)
    agent = Agent(config(pristine_bundle, line.port, tmp_path, anything))
    with agent:
        import threading

        thread = threading.Thread(target=agent.run)
        thread.start()
        on = subscriber.wait_for(lambda message: message["state"] == "on")
        assert on["label"] in ("cross", "disc", "stripes") and on["active"] is True
        assert on["model"] == "tiny-shapes 1.2.3" and on["digest"] == sha256(pristine_bundle / MANIFEST)[:12]
        assert on["since"] <= on["time"] <= time.time()
        late = Subscriber(line.port)
        assert late.wait_for(lambda message: True)["state"] == "on"
        assert late.messages[0][0], "not retained"
        line.stop()
        line.start()  # without persistence: it has forgotten everything
        again = Subscriber(line.port)
        assert again.wait_for(lambda message: True)["state"] == "on", "not sent at the connection"
        agent.loop.stop()
        thread.join(30)
    last = Subscriber(line.port)
    message = last.wait_for(lambda message: True)
    assert (message["state"], message["active"], message["label"]) == ("offline", False, "")
    for client in (subscriber, late, again, last):
        client.close()


def test_a_broken_output_stops_nothing_and_is_a_fault(pristine_bundle: Path, line: Broker, tmp_path: Path) -> None:
    """A webhook that nobody answers and a pin that is not there, beside a topic that works."""
    outputs = (
        OutputSection(kind="webhook", url="http://127.0.0.1:9/x", timeout_s=0.5, uncertain=True, ood="ignore"),
        OutputSection(kind="mqtt", uncertain=True, ood="ignore"),
    )
    subscriber = Subscriber(line.port)
    with Agent(config(pristine_bundle, line.port, tmp_path, *outputs)) as agent:
        import threading

        thread = threading.Thread(target=agent.run)
        thread.start()
        subscriber.wait_for(lambda message: message["state"] == "on")
        deadline = time.monotonic() + 20
        while not agent.monitor.faults:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [fault] = agent.monitor.faults
        assert fault.startswith("output webhook 1: http://127.0.0.1:9") and "refused" in fault
        assert agent.monitor.health().faults == (fault,)
        agent.loop.stop()
        thread.join(30)
    subscriber.close()


def test_a_topic_without_a_broker(pristine_bundle: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(
        config(pristine_bundle, 1, tmp_path, OutputSection(kind="mqtt")), telemetry=TelemetrySection()
    )
    with pytest.raises(ConfigError, match=r'\[output 1\] kind = "mqtt": needs a broker'):
        Agent(settings)
