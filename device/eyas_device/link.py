"""The telemetry link: plain MQTT 5 at QoS 1. It never makes the frame loop wait and never stops trying to connect.

While the broker cannot be reached, messages wait in memory, up to a bound; a killed process loses them.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTErrorCode, MQTTProtocolVersion

from eyas_device import __version__
from eyas_device.camera.steady import CameraState
from eyas_device.closing import Closing
from eyas_device.errors import LinkError, PictureError
from eyas_device.names import NAME
from eyas_device.pipeline import Answer, Listener
from eyas_device.predict import Classifier
from eyas_device.tally import Tally
from eyas_device.telemetry import Header, Status, Vitals, Window, encode, topic

WAITING_MESSAGES = 1000
"""How many messages wait in memory for a broker; newer ones are refused and counted."""
_KEEPALIVE_S = 30
_RECONNECT_S = (1, 60)
_FAREWELL_S = 2.0


class Link(Closing, Listener):
    """Publishes one `Status` when it connects and one `Window` every few seconds, whatever the frame rate.

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
        vitals: Callable[[], Vitals] = Vitals,
    ) -> None:
        """Start connecting, in a thread; `vitals` is asked for each message.

        Raises `LinkError` for an impossible host, port, site, device or window.
        """
        _check(host, port, site, device, window_s)
        self.state = "connecting"
        """For people: `connected`, or why not."""
        self.refused = 0
        """Messages that the broker refused, or that came when the memory was full."""
        self._vitals = vitals
        self._dropped = 0
        self.swapped(classifier)
        self._site, self._device, self._window_s = site, device, window_s
        self._spool, self._sequence = str(uuid.uuid4()), 0
        self._lock = threading.Lock()
        self._tally = Tally()
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._news = False
        """Whether the status changed since it was told."""
        self._client = self._make_client()
        self._client.connect_async(host, port, keepalive=_KEEPALIVE_S)
        self._client.loop_start()
        self._clock = threading.Thread(target=self._tell_windows, name="telemetry-window", daemon=True)
        self._clock.start()

    def answered(self, answer: Answer) -> None:
        """Count an answer in the current window."""
        with self._lock:
            self._tally.add(answer.prediction, answer.latency_ms, answer.age_ms)

    def unreadable(self, reason: PictureError) -> None:
        """Count it in the current window."""
        with self._lock:
            self._tally.unreadable += 1

    def changed(self, camera: CameraState) -> None:
        """Let the telemetry's thread tell the camera's new state at once."""
        self._news = True
        self._wake.set()

    def swapped(self, classifier: Classifier) -> None:
        """Name the new model from now on."""
        manifest = classifier.bundle.manifest
        self._model, self._artefact = f"{manifest.name} {manifest.version}", classifier.artefact.name

    def close(self) -> None:
        """Send the last window and the farewell, waiting for the broker at most two seconds, and disconnect."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.set()
        self._clock.join()
        self._tell_window()
        farewell = self._publish("status", self._status("offline"), retain=True)
        deadline = time.monotonic() + _FAREWELL_S
        while self._client.is_connected() and not farewell.is_published() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._client.disconnect()
        self._client.loop_stop()

    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"eyas-{self._site}-{self._device}",
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        client.max_queued_messages_set(WAITING_MESSAGES)
        client.reconnect_delay_set(*_RECONNECT_S)
        will = Status(device=self._device, state="lost", agent=__version__, model=self._model, artefact=self._artefact)
        client.will_set(topic(self._site, self._device, "status"), encode(will), qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

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
            unfamiliar=vitals.unfamiliar,
        )

    def _tell_windows(self) -> None:
        due = time.monotonic() + self._window_s
        while not self._closed.is_set():
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            if self._news and self._client.is_connected() and not self._closed.is_set():
                self._news = False
                self._publish("status", self._status("online"), retain=True)
            if time.monotonic() >= due and not self._closed.is_set():
                due += self._window_s
                self._tell_window()

    def _tell_window(self) -> None:
        with self._lock:
            tally, self._tally = self._tally, Tally()
        vitals = self._vitals()
        dropped, self._dropped = vitals.dropped - self._dropped, vitals.dropped
        window = Window(
            seconds=round(tally.seconds(), 3),
            model=self._model,
            artefact=self._artefact,
            frames=tally.frames,
            dropped=dropped,
            unreadable=tally.unreadable,
            unsure=tally.unsure,
            counts=dict(tally.counts),
            confidence={label: tuple(tenths) for label, tenths in tally.confidence.items()},
            latency_ms=tally.latencies.summary(),
            age_ms=tally.ages.summary(),
            camera=vitals.camera,
            losses=vitals.losses,
            beyond=vitals.beyond,
            temperature_c=vitals.temperature_c,
            throttled=vitals.throttled,
        )
        self._publish("window", window)

    def _publish(self, kind: str, message: Header, *, retain: bool = False) -> Any:
        """Hand a message to the client's thread: it is sent at once, or when there is a connection."""
        with self._lock:
            sequence, self._sequence = self._sequence, self._sequence + 1
        stamped = msgspec.structs.replace(
            message, device=self._device, spool=self._spool, sequence=sequence, time=time.time()
        )
        info = self._client.publish(topic(self._site, self._device, kind), encode(stamped), qos=1, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            self.refused += 1
        return info

    def _on_connect(self, client: Client, userdata: object, flags: object, reason: Any, properties: object) -> None:
        if reason.is_failure:
            self.state = f"refused by the broker: {reason}"
            return
        self.state = "connected"
        self._publish("status", self._status("online"), retain=True)

    def _on_connect_fail(self, client: Client, userdata: object) -> None:
        self.state = "not connected: the broker cannot be reached; trying again"

    def _on_disconnect(self, client: Client, userdata: object, flags: object, reason: Any, properties: object) -> None:
        if not self.state.startswith("refused"):
            self.state = f"not connected: {reason}"

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: object) -> None:
        if reason.is_failure:
            self.refused += 1
            self.state = f"connected, but a message was refused: {reason}"


def _check(host: str, port: int, site: str, device: str, window_s: float) -> None:
    try:
        host.encode("idna")
    except UnicodeError:
        host = ""
    if not host or not 1 <= port <= 65535:
        raise LinkError(f"mqtt {host!r}:{port}: a host name or address and a port of 1 to 65535 are needed")
    for what, name in (("site", site), ("device", device)):
        if not re.fullmatch(NAME, name):
            raise LinkError(f"{what} {name!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed in a topic")
    if not window_s >= 0.1:
        raise LinkError(f"window of {window_s} s; 0.1 s or more is allowed")
