"""The telemetry link: a listener that turns answers into windows and events, which reach the broker by way of a spool.

It never makes the frame loop wait: the loop counts an answer, and what needs a disk or a network is done in threads.
"""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np

from eyas_device import __version__
from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.bundle import Floats, Reference
from eyas_device.camera import Frame
from eyas_device.camera.reconnecting import CameraState
from eyas_device.config import PrivacySection
from eyas_device.errors import ImageError, LinkError
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing
from eyas_device.support.names import check_address, check_name
from eyas_device.telemetry.aggregate import WindowAggregator, place, uncertainty
from eyas_device.telemetry.messages import Event, Health, Profile, Status
from eyas_device.telemetry.mqtt import Delivery, Uplink
from eyas_device.telemetry.privacy import Policy, Why
from eyas_device.telemetry.remote import CommandExecutor, Handler
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.telemetry.tls import Security

_TOP = 5
_WAITING_EVENTS = 2
_LONGEST_SOURCE = 200


class Reporter(Closing, Listener):
    """Sends one `Status` for each connection and change, one `Window` every few seconds whatever the frame rate, an
    `Event` for each image that the privacy rules choose, and the `Result` of each command.

    The status is retained: `online` at each connection, `offline` when the link is closed, and, as the will, `lost`.
    """

    def __init__(
        self,
        host: str,
        port: int = 1883,
        *,
        site: str,
        device: str,
        classifier: Classifier,
        window_s: float = 10.0,
        vitals: Callable[[], Health] = Health,
        spool: Spool | None = None,
        delivery: Delivery = "collector",
        security: Security | None = None,
        privacy: PrivacySection | None = None,
        handlers: Mapping[str, Handler] | None = None,
        commands: Collection[str] = (),
        arm: str = "",
    ) -> None:
        """Start connecting, in a thread; `vitals` is asked for each message.

        `spool` is closed with the link; without one, messages wait in memory. `handlers` are what commands do, of which
        only those named by `commands` are obeyed. Raises `LinkError` for an impossible host, port, site, device or
        window, and for credentials that cannot be read.
        """
        _check(host, port, site, device, window_s)
        self._lock = threading.Lock()
        self._counting = WindowAggregator()
        self._model = self._artefact = ""
        self._finished: deque[tuple[WindowAggregator, str, str]] = deque()
        """What other models answered since the last window, each with model and artefact."""
        self._closed, self._wake = threading.Event(), threading.Event()
        self._vitals, self._window_s, self._arm = vitals, window_s, arm
        self._dropped = 0
        self._policy = Policy(privacy or PrivacySection())
        self._reference: Reference | None = None
        self.swapped(classifier)
        self._events: queue.Queue[tuple[Event, Frame]] = queue.Queue(_WAITING_EVENTS)
        self._news = False
        """Whether the status changed since it was told."""
        self.spool = spool or Spool(None, device=device)
        self._orders = CommandExecutor(handlers or {}, allowed=commands, spool=self.spool)
        will = Status(device=device, state="lost", agent=__version__, model=self._model, artefact=self._artefact)
        try:
            self._uplink = Uplink(
                host,
                port,
                site=site,
                device=device,
                spool=self.spool,
                will=will,
                born=lambda: self._status("online"),
                commanded=self._orders.take,
                delivery=delivery,
                security=security,
            )
        except LinkError:
            self._orders.close()
            self.spool.close()
            raise
        self._clock = threading.Thread(target=self._tell_all, name="telemetry-window", daemon=True)
        self._clock.start()

    @property
    def state(self) -> str:
        """For people: `connected`, or why not, and whether the disk takes the messages."""
        fault = self.spool.fault if self.spool.fault.startswith("/") else ""
        return f"{self._uplink.state}; {fault}" if fault else self._uplink.state

    @property
    def refused(self) -> int:
        """Messages that the broker refused; they are sent again."""
        return self._uplink.refused

    def answered(self, answer: FramePrediction) -> None:
        """Count an answer in the current window, and choose whether it becomes an event."""
        with self._lock:
            self._counting.add(answer.prediction, answer.latency_ms, answer.age_ms)
        why = self._policy.choose(answer.prediction)
        if why is not None and not self._events.full():
            image = answer.frame.image
            kept = image if isinstance(image, bytes) else np.array(image)  # a camera may use its memory again
            self._events.put_nowait((self._event(answer, why), replace(answer.frame, image=kept)))
            self._wake.set()

    def look(self, described: Floats) -> None:
        """Count where a frame's descriptor (`eyas_device.ood.describe`) lies, for the window's sketch."""
        if self._reference is not None:
            with self._lock:
                self._counting.look(place(described, self._reference))

    def unreadable(self, reason: ImageError) -> None:
        """Count it in the current window."""
        with self._lock:
            self._counting.unreadable += 1

    def changed(self, camera: CameraState) -> None:
        """Let the telemetry's thread tell the camera's new state at once."""
        self._news = True
        self._wake.set()

    def swapped(self, classifier: Classifier) -> None:
        """Name the new model from now on; what another one answered becomes a window of its own."""
        manifest = classifier.bundle.manifest
        model, artefact = f"{manifest.name} {manifest.version}", classifier.artefact.name
        with self._lock:
            if self._counting.frames and (model, artefact) != (self._model, self._artefact):
                self._finished.append((self._counting, self._model, self._artefact))
                self._counting = WindowAggregator()
            self._model, self._artefact = model, artefact
        self._labels = manifest.labels
        self._reference = classifier.bundle.reference()
        self._policy.swapped(manifest)

    def ask_event(self) -> None:
        """Send the next answer as an event, with its image if the privacy rules allow that; for commands."""
        self._policy.ask()

    def tell_status(self) -> None:
        """Say soon how the device is: something changed."""
        self._news = True
        self._wake.set()

    def tell_profile(self, profile: Profile) -> None:
        """Send what a benchmark measured."""
        self.spool.append(profile)

    def close(self) -> None:
        """Send the last window and the farewell, waiting for the broker at most a few seconds, and disconnect."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.set()
        self._clock.join(10.0)
        self._orders.close()
        self._tell_window()
        self.spool.append(self._status("offline"))
        self._uplink.close()
        self.spool.close()

    def _status(self, state: Literal["online", "offline", "lost"]) -> Status:
        vitals = self._vitals()
        return Status(
            state=state,
            agent=__version__,
            model=self._model,
            artefact=self._artefact,
            camera=vitals.camera,
            reason=vitals.reason,
            paused=vitals.paused,
            ood=vitals.ood,
        )

    def _tell_all(self) -> None:
        due = time.monotonic() + self._window_s
        while not self._closed.is_set():
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            if self._news and self._uplink.connected and not self._closed.is_set():
                self._news = False
                self.spool.append(self._status("online"))
            while not self._events.empty():
                self._tell_event(*self._events.get_nowait())
            if time.monotonic() >= due and not self._closed.is_set():
                due = max(due + self._window_s, time.monotonic() + 0.5 * self._window_s)
                self._tell_window()

    def _tell_window(self) -> None:
        vitals = self._vitals()
        self._policy.ood = bool(vitals.ood)
        with self._lock:
            told = [*self._finished, (self._counting, self._model, self._artefact)]
            self._finished.clear()
            self._counting = WindowAggregator()
        dropped, self._dropped = vitals.dropped - self._dropped, vitals.dropped
        for counting, model, artefact in told:
            self.spool.append(counting.window(model, artefact, arm=self._arm, dropped=dropped, vitals=vitals))
            dropped = 0

    def _event(self, answer: FramePrediction, why: Why) -> Event:
        """An event that has no image yet."""
        prediction = answer.prediction
        margin, entropy = uncertainty(prediction.probabilities)
        best = np.argsort(prediction.probabilities)[::-1][:_TOP]
        return Event(
            model=self._model,
            artefact=self._artefact,
            arm=self._arm,
            label=prediction.label,
            confidence=round(prediction.confidence, 4),
            margin=round(margin, 4),
            entropy=round(entropy, 4),
            top={self._labels[i]: round(float(prediction.probabilities[i]), 4) for i in best},
            why=why,
            source=re.sub(r"//[^/@\s]*@", "//***@", answer.source)[:_LONGEST_SOURCE],
        )

    def _tell_event(self, event: Event, frame: Frame) -> None:
        try:
            pixels = frame.pixels()
        except ImageError:
            pixels = None
        image, policy = self._policy.image(pixels, self.spool)
        self.spool.append(msgspec.structs.replace(event, image=image, image_policy=policy))


def _check(host: str, port: int, site: str, device: str, window_s: float) -> None:
    try:
        check_address(host, port)
        check_name(site)
        check_name(device)
    except ValueError as error:
        raise LinkError(f"telemetry: {error}") from None
    if not (window_s >= 0.1 and math.isfinite(window_s)):
        raise LinkError(f"window of {window_s} s; 0.1 s or more is allowed")
