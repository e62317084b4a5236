"""The outputs in the frame loop: each prediction goes through every rule, and each change to its delivery."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from msgspec.structs import replace

from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.camera.reconnecting import CameraState
from eyas_device.config import Config, OutputSection
from eyas_device.errors import ConfigError
from eyas_device.outputs.answer import Answer
from eyas_device.outputs.delivery import Delivery, Sink
from eyas_device.outputs.mqtt import Publish, Topic
from eyas_device.outputs.rule import Debouncer
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing
from eyas_device.support.supervised import OnError

_DELIVERING = ("", "delivering", "degraded", "resized")
"""Conditions of a camera whose predictions count."""
_DIGEST = 12
_UNDECIDED = "too few frames yet"


class Outputs(Closing, Listener):
    """Every configured output: what it shows follows the predictions, and is safe while there are none that count."""

    def __init__(
        self,
        outputs: Sequence[tuple[str, OutputSection, Sink]],
        *,
        site: str = "",
        device: str = "",
        is_paused: Callable[[], bool] = lambda: False,
        is_ood: Callable[[], bool] = lambda: False,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create them; `start` starts their threads.

        Args:
            outputs: Name, rule and sink of each.
            site: Second level of the telemetry topic.
            device: Third level.
            is_paused: Whether the loop is paused.
            is_ood: Whether the camera is out of distribution.
            on_change: Called when an output's fault begins or ends, by any thread; must not block.
            clock: Monotonic seconds.

        """
        self._is_paused, self._is_ood, self._on_change, self._clock = is_paused, is_ood, on_change, clock
        base = Answer(site=site, device=device)
        self._outputs = [
            _Output(name, rule, Delivery(name, sink, on_change=on_change), base, clock())
            for name, rule, sink in outputs
        ]
        self._camera = ""
        self._ood, self._ood_due = False, 0.0

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with outputs, for people."""
        texts = []
        for output in self._outputs:
            texts += [f"output {output.name}: {text}" for text in (output.delivery.fault, output.label_problem) if text]
        return tuple(texts)

    def watch(self, on_error: OnError) -> None:
        """Call `on_error` with the name of a thread and the error after which it starts again."""
        for output in self._outputs:
            output.delivery.thread.on_error = on_error

    def start(self) -> None:
        """Start the threads; the first answers are the safe ones."""
        for output in self._outputs:
            output.delivery.start()
            output.show()

    def on_model(self, classifier: Classifier) -> None:
        """Name the model in answers, forget what the previous one saw, and look for labels that it does not have."""
        manifest = classifier.bundle.manifest
        digest = classifier.bundle.identity[:_DIGEST]
        for output in self._outputs:
            output.use_model(f"{manifest.name} {manifest.version}", digest, manifest.labels)
        if any(output.label_problem for output in self._outputs):
            self._on_change()

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Take a prediction; one while the output is safe for another reason than time is not counted."""
        now = self._clock()
        prediction = predicted.prediction
        reason = self._safe_reason(now)
        for output in self._outputs:
            output.last = now
            if (why := output.applies(reason)) or not prediction.finite:
                output.make_safe(why or "the model's output is not finite")
            else:
                output.add(prediction.label, prediction.confidence, uncertain=prediction.uncertain, now=now)

    def on_camera_state(self, state: CameraState) -> None:
        """Make the outputs safe while the camera does not deliver."""
        self._camera = "" if state.condition in _DELIVERING else f"camera {state.condition}"
        self.on_tick()

    def on_tick(self) -> None:
        """Make outputs safe without a frame: paused, camera lost, no prediction in time."""
        now = self._clock()
        reason = self._safe_reason(now)
        for output in self._outputs:
            why = output.applies(reason)
            if not why and now - output.last > output.rule.stale_s:
                why = f"no prediction for {output.rule.stale_s:g} s"
            if why:
                output.make_safe(why)

    def close(self) -> None:
        """Deliver `offline` with the safe level, and end the threads."""
        for output in self._outputs:
            output.end()
            output.delivery.end()
        with ExitStack() as stack:
            for output in self._outputs:
                stack.callback(output.delivery.close)

    def _safe_reason(self, now: float) -> tuple[str, bool]:
        """Why outputs are safe now, empty if they need not be, and whether that is only for the distribution."""
        if self._is_paused():
            return "paused", False
        if self._camera:
            return self._camera, False
        if now >= self._ood_due:  # judging costs more than a turn of a fast loop
            self._ood, self._ood_due = self._is_ood(), now + 0.5
        return ("out of distribution", True) if self._ood else ("", False)


class _Output:
    """One output: its rule's state and what it shows."""

    def __init__(self, name: str, rule: OutputSection, delivery: Delivery, base: Answer, now: float) -> None:
        self.name, self.rule, self.delivery = name, rule, delivery
        self.last = now
        """Time of the last prediction, monotonic seconds."""
        self.label_problem = ""
        self._debouncer = Debouncer(rule)
        self._answer = replace(base, reason="starting", active=rule.safe == "on", since=time.time(), time=time.time())

    def applies(self, reason: tuple[str, bool]) -> str:
        """The reason if it makes this output safe, else empty."""
        why, only_ood = reason
        if self.label_problem:
            return self.label_problem
        return "" if only_ood and self.rule.ood == "ignore" else why

    def use_model(self, model: str, digest: str, labels: Sequence[str]) -> None:
        missing = [label for label in self.rule.labels if label not in labels]
        self.label_problem = (
            f"{model} has no label {', '.join(missing)}; it has: {', '.join(labels)}" if missing else ""
        )
        self._answer = replace(self._answer, model=model, digest=digest)
        self.make_safe("another model")

    def add(self, label: str, confidence: float, *, uncertain: bool, now: float) -> None:
        debouncer = self._debouncer
        debouncer.add(label, confidence, uncertain=uncertain, now=now)
        if debouncer.on is None:
            self._change(state="safe", reason=_UNDECIDED, label="", confidence=0.0, active=self.rule.safe == "on")
        else:
            state = "on" if debouncer.on else "off"
            named = debouncer.label if debouncer.on else ""
            self._change(
                state=state, reason="", label=named, confidence=round(debouncer.confidence, 4), active=debouncer.on
            )

    def make_safe(self, reason: str) -> None:
        self._debouncer.reset()
        self._change(state="safe", reason=reason, label="", confidence=0.0, active=self.rule.safe == "on")

    def end(self) -> None:
        self._change(state="offline", reason="", label="", confidence=0.0, active=self.rule.safe == "on")

    def show(self) -> None:
        self.delivery.put(self._answer)

    def _change(self, **fields: object) -> None:
        """Deliver the new answer if state, label, level or the reason of a safe state differ."""
        answer, now = self._answer, time.time()
        compared = ("state", "label", "active", "reason")
        if all(fields[name] == getattr(answer, name) for name in compared):
            return
        same = fields["state"] == answer.state and fields["label"] == answer.label
        self._answer = replace(answer, **fields, time=now, since=answer.since if same else now)
        self.show()


def open_outputs(
    config: Config,
    *,
    publish: Publish | None,
    is_paused: Callable[[], bool],
    is_ood: Callable[[], bool],
    on_change: Callable[[], None],
) -> Outputs | None:
    """Create the configured outputs; None without any. `publish` sends an answer to the broker; None without one.

    Raises `ConfigError` for an output to a broker without a broker.
    """
    if not config.output:
        return None
    outputs = []
    for number, output in enumerate(config.output, 1):
        outputs.append((f"{output.kind} {number}", output, _open_sink(number, output, publish)))
    device = config.device
    return Outputs(
        outputs, site=device.site, device=device.name, is_paused=is_paused, is_ood=is_ood, on_change=on_change
    )


def _open_sink(number: int, output: OutputSection, publish: Publish | None) -> Sink:
    if output.kind == "gpio":
        from eyas_device.outputs.gpio import Gpio

        return Gpio(output)
    if output.kind == "webhook":
        from eyas_device.outputs.webhook import Webhook

        return Webhook(output)
    if publish is None:
        raise ConfigError(
            f'[output {number}] kind = "mqtt": needs a broker: set broker in [telemetry], or use --broker'
        )
    return Topic(publish)
