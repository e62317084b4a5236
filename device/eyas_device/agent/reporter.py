"""Telemetry reporter: a loop listener that turns predictions into windows and events and spools them for the broker.

It never blocks the frame loop: the loop only counts a prediction; threads do the work that needs a disk or a network.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np

from eyas_device import __version__
from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.camera import Frame
from eyas_device.camera.reconnecting import CameraState
from eyas_device.config import PrivacySection
from eyas_device.errors import ImageError, LinkError
from eyas_device.predict import Classifier, Prediction
from eyas_device.preprocess import Preprocessing
from eyas_device.reference import Floats, Reference
from eyas_device.support.closing import Closing
from eyas_device.support.names import check_address, check_name, check_site
from eyas_device.support.redact import redact
from eyas_device.support.supervised import OnError, SupervisedThread
from eyas_device.telemetry.aggregate import WindowAggregator, project, uncertainty
from eyas_device.telemetry.messages import Event, Health, Profile, Status, Why
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.mqtt_client import LinkStatus
from eyas_device.telemetry.privacy import Policy
from eyas_device.telemetry.remote import CommandExecutor, Handler
from eyas_device.telemetry.spool.spool import Spool

_TOP = 5
_DIGEST = 12
"""Hex digits of the manifest's sha256 in the messages."""
_MAX_WAITING_EVENTS = 2
_MAX_SOURCE = 200
_TURN_S = 5.0
"""Longest wait of the window thread, which then shows progress."""


class ReporterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a device reports, and to which broker."""

    uplink: UplinkSettings
    window_s: float = 10.0
    """Length of a window."""
    privacy: PrivacySection = PrivacySection()
    commands: tuple[str, ...] = ()
    """Commands that the device executes."""


class _Model(msgspec.Struct, frozen=True):
    """Identity of what predicts, as the messages name it."""

    model: str = ""
    digest: str = ""
    artefact: str = ""
    arm: str = ""


class Reporter(Closing, Listener):
    """Reports one `Status` for each connection and change, one `Window` every few seconds whatever the frame rate, an
    `Event` for each image that the privacy rules choose, and the `Result` of each command.

    The status is retained: `online` at each connection, `offline` when the reporter is closed, `lost` as the last will.
    """

    def __init__(
        self,
        settings: ReporterSettings,
        classifier: Classifier | None = None,
        *,
        health: Callable[[], Health] = Health,
        arm: Callable[[], str] = str,
        on_hint: Callable[[], None] = lambda: None,
        spool: Spool | None = None,
    ) -> None:
        """Check the settings; `start` connects.

        Args:
            settings: What to report, and to which broker.
            classifier: The active model; without one, `on_model` names it later.
            health: Called for each status and window.
            arm: Returns the arm of the active model: `candidate` on probation, else empty.
            on_hint: Called when the broker hints that another release is wanted; any thread, must not block.
            spool: Keeps the messages and is closed with the reporter; without one they wait in memory.

        Raises:
            LinkError: Impossible host, port, site, device or window.

        """
        _check(settings)
        self._settings, self._health, self._arm = settings, health, arm
        self._lock = threading.Lock()
        self._aggregator = WindowAggregator()
        self._model = _Model()
        self._finished: deque[tuple[WindowAggregator, _Model]] = deque()
        """Aggregators of previous models since the last window, each with its model."""
        self._closed, self._wake = threading.Event(), threading.Event()
        self._dropped = 0
        self._policy = Policy(settings.privacy)
        self._reference: Reference | None = None
        self._labels: tuple[str, ...] = ()
        self._decoding: Preprocessing | None = None
        """How the images of events are decoded."""
        self._events: queue.Queue[tuple[Event, Frame]] = queue.Queue(_MAX_WAITING_EVENTS)
        self._status_changed = False
        self._faults: tuple[str, ...] = ()
        """Faults of the link when the last window was made."""
        device = settings.uplink.device
        self.spool = spool or Spool(None, device=device)
        self._commands = CommandExecutor(allowed=settings.commands, spool=self.spool)
        self._uplink = Uplink(
            settings.uplink,
            self.spool,
            will=self._will(),
            make_status=lambda: self._status("online"),
            on_command=self._commands.take,
            on_hint=on_hint,
        )
        self._thread = SupervisedThread("window", self._run)
        self._spool_thread = SupervisedThread("spool", self._maintain_spool)
        self._threads = (self._thread, self._uplink.thread, self._spool_thread, *self._commands.threads)
        if classifier is not None:
            self.on_model(classifier)

    def watch(self, on_error: OnError) -> None:
        """Call `on_error` with the name of a thread and the error after which it starts again."""
        for thread in self._threads:
            thread.on_error = on_error

    @property
    def stalled(self) -> str:
        """The thread that makes no progress, `window` or `uplink`; empty if both do."""
        return next((thread.name for thread in (self._thread, self._uplink.thread) if thread.stalled()), "")

    def register(self, handlers: Mapping[str, Handler]) -> None:
        """Let `handlers` execute the allowed commands."""
        self._commands.register(handlers)

    def start(self, handlers: Mapping[str, Handler] | None = None) -> None:
        """Connect and report, in threads, until `close`; `handlers` execute the allowed commands."""
        self.register(handlers or {})
        self._spool_thread.start()
        self._uplink.start()
        self._thread.start()

    @property
    def link(self) -> LinkStatus:
        """State of the connection to the broker."""
        return self._uplink.status

    @property
    def description(self) -> str:
        """State of the connection and, if it fails, of the spool's disk, for people."""
        return f"{self.link}; {self.spool.detail}" if self.spool.state.is_fault else str(self.link)

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Count the prediction in the current window, and choose whether it becomes an event."""
        with self._lock:
            self._aggregator.add(predicted.prediction, predicted.latency_ms, predicted.age_ms)
        if self._events.full():
            return  # a requested event waits for a later prediction
        command = self._policy.take_request()
        why: Why | None = "command" if command else self._policy.choose(predicted.prediction)
        if why is not None:
            self._put_event(predicted, self._event(predicted, why, command))

    def on_disagreement(self, predicted: FramePrediction, previous: Prediction) -> None:
        """Report a prediction whose label the previous model does not give, if the privacy rules choose it."""
        if not self._events.full() and self._policy.choose_disagreement():
            event = msgspec.structs.replace(
                self._event(predicted, "disagreement"),
                previous_label=previous.label,
                previous_confidence=round(previous.confidence, 4),
            )
            self._put_event(predicted, event)

    def add_descriptor(self, descriptor: Floats) -> None:
        """Add a frame's descriptor (`eyas_device.ood.describe`) to the window's sketch."""
        if self._reference is not None:
            with self._lock:
                self._aggregator.add_projection(project(descriptor, self._reference))

    def on_unreadable(self, error: ImageError) -> None:
        """Count the frame in the current window."""
        with self._lock:
            self._aggregator.stats.unreadable += 1

    def on_camera_state(self, state: CameraState) -> None:
        """Report the camera's new state at once."""
        self.report_status()

    def on_error(self, error: Exception) -> None:
        """Report the loop's count of errors."""
        self.report_status()

    def on_model(self, classifier: Classifier) -> None:
        """Name the new model from now on; the predictions of the previous one become a window of their own."""
        manifest = classifier.bundle.manifest
        digest = classifier.bundle.identity[:_DIGEST]
        model = _Model(f"{manifest.name} {manifest.version}", digest, classifier.artefact.name, self._arm())
        with self._lock:
            changed = self._use(model)
        self._labels = manifest.labels
        self._reference = classifier.bundle.reference()
        self._decoding = manifest.preprocessing.at_full_scale()
        self._policy.use_model(manifest)
        self._uplink.will = self._will()
        if changed and self._thread.started:
            self.report_status()

    def refresh_arm(self) -> None:
        """Use the arm of now; what was counted under another one becomes a window of its own. Any thread."""
        with self._lock:
            self._use(msgspec.structs.replace(self._model, arm=self._arm()))

    @property
    def certificate_days(self) -> float | None:
        """Days until the device's certificate expires; None without one."""
        return self._settings.uplink.security.certificate_days(time.time())

    @property
    def link_faults(self) -> tuple[str, ...]:
        """Problems of the connection and its certificates, for people."""
        return tuple(redact(fault) for fault in self._uplink.faults())

    def request_event(self, command: str, seconds: float) -> str:
        """Report the next prediction, if one comes within `seconds`, as the event of the command with this id.

        Returns: `included` if its image goes along, else why not.

        Raises `PrivacyError` if the privacy rules allow no event.
        """
        return self._policy.request_event(command, seconds)

    def report_status(self) -> None:
        """Report the device's status soon."""
        self._status_changed = True
        self._wake.set()

    def publish_answer(self, payload: bytes, *, expires: bool = True) -> None:
        """Publish the answer of an output, retained, in place of the one before; never blocks."""
        self._uplink.publish_answer(payload, expires=expires)

    def report_profile(self, profile: Profile) -> None:
        """Report the result of a benchmark."""
        self.spool.append(profile)

    def close(self) -> None:
        """Send the final window and status, waiting for the broker at most a few seconds, and disconnect."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.set()
        started = self._thread.started
        self._thread.join(10.0)
        self._commands.close()
        if started:
            self._append_window()
            self.spool.append(self._status("offline"))
        self._uplink.close()
        self._spool_thread.join(1.0)
        self.spool.close()

    def _use(self, model: _Model) -> bool:
        """Name `model` from now on, with the lock held; whether it is another one."""
        changed = model != self._model
        if self._aggregator.stats.frames and changed:
            self._finished.append((self._aggregator, self._model))
            self._aggregator = WindowAggregator()
        self._model = model
        return changed

    def _will(self) -> Status:
        device = self._settings.uplink.device
        model = self._model
        return Status(
            device=device,
            state="lost",
            agent=__version__,
            model=model.model,
            digest=model.digest,
            artefact=model.artefact,
            machine=self._settings.uplink.machine,
        )

    def _status(self, state: Literal["online", "offline"]) -> Status:
        health = self._health()
        return Status(
            state=state,
            agent=__version__,
            model=self._model.model,
            digest=self._model.digest,
            artefact=self._model.artefact,
            selection=health.selection,
            refused_model=health.refused_model,
            refused_reason=redact(health.refused_reason),
            restarts=health.restarts,
            camera=health.camera,
            reason=redact(health.reason),
            paused=health.paused,
            ood=health.ood,
            ood_reason=health.ood_reason,
            machine=self._settings.uplink.machine,
            certificate_days=self.certificate_days,
            paused_until=health.paused_until,
            faults=tuple(dict.fromkeys((*map(redact, health.faults), *self.link_faults))),
            update=health.update,
            agent_update=health.agent_update,
        )

    def _run(self) -> None:
        window_s = self._settings.window_s
        due = time.monotonic() + window_s
        while not self._closed.is_set():
            self._thread.progress()
            self._wake.wait(min(_TURN_S, max(0.0, due - time.monotonic())))
            self._wake.clear()
            if self._status_changed and self._uplink.connected and not self._closed.is_set():
                self._status_changed = False
                self.spool.append(self._status("online"))
            while not self._events.empty():
                self._append_event(*self._events.get_nowait())
            if time.monotonic() >= due and not self._closed.is_set():
                due = max(due + window_s, time.monotonic() + 0.5 * window_s)
                self._append_window()

    def _maintain_spool(self) -> None:
        """Sync the spool when that is due, whatever the network, the camera and the board's sensors do."""
        while not self._closed.wait(self.spool.due_in()):
            self._spool_thread.progress()
            self.spool.maintain()

    def _append_window(self) -> None:
        health = self._health()
        if (faults := self.link_faults) != self._faults:
            self._faults = faults
            self.report_status()
        self._policy.ood = bool(health.ood)
        with self._lock:
            finished = [*self._finished, (self._aggregator, self._model)]
            self._finished.clear()
            self._aggregator = WindowAggregator()
        dropped, self._dropped = health.dropped - self._dropped, health.dropped
        for aggregator, model in finished:
            window = aggregator.window(
                model.model,
                model.artefact,
                digest=model.digest,
                arm=model.arm,
                dropped=dropped,
                health=health,
            )
            self.spool.append(window)
            dropped = 0

    def _put_event(self, predicted: FramePrediction, event: Event) -> None:
        """Let the window thread add the image, and send the event; the queue must not be full."""
        image = predicted.frame.image
        copied = image if isinstance(image, bytes) else np.array(image)  # a camera may reuse its memory
        self._events.put_nowait((event, replace(predicted.frame, image=copied)))
        self._wake.set()

    def _event(self, predicted: FramePrediction, why: Why, command: str = "") -> Event:
        """An event without its image."""
        prediction = predicted.prediction
        margin, entropy = uncertainty(prediction.probabilities)
        best = np.argsort(prediction.probabilities)[::-1][:_TOP]
        return Event(
            model=self._model.model,
            digest=self._model.digest,
            artefact=self._model.artefact,
            arm=self._model.arm,
            label=prediction.label,
            confidence=round(prediction.confidence, 4),
            margin=round(margin, 4),
            entropy=round(entropy, 4),
            top={self._labels[i]: round(float(prediction.probabilities[i]), 4) for i in best},
            why=why,
            command=command,
            source=redact(predicted.source)[:_MAX_SOURCE],
        )

    def _append_event(self, event: Event, frame: Frame) -> None:
        try:
            pixels = frame.pixels(self._decoding)
        except ImageError:
            pixels = None
        image, policy = self._policy.image(pixels, self.spool, event.why)
        self.spool.append(msgspec.structs.replace(event, image=image, image_policy=policy))


def _check(settings: ReporterSettings) -> None:
    uplink = settings.uplink
    try:
        check_address(uplink.host, uplink.port)
        check_site(uplink.site)
        check_name(uplink.device)
    except ValueError as error:
        raise LinkError(f"telemetry: {error}") from None
    if not (settings.window_s >= 0.1 and math.isfinite(settings.window_s)):
        raise LinkError(f"window of {settings.window_s} s; 0.1 s or more is allowed")
