"""Cameras of a rollout: a real trusted repository over HTTP, real messages over MQTT; only the model is simulated."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.telemetry.messages import Status, Update, Window, encode, hint_topic, topic
from eyas_device.updates.release import Release, takes_target
from tests.support.repositories import Camera

MODEL, SITE = "tiny-shapes", "hall"
Behaviour = Callable[[Release], tuple[str, str, float]]
"""What becomes of a release: final state of the update, reason, and mean confidence while it runs."""


class RolloutCamera:
    """A camera that looks at the repository when a hint comes, and sends statuses and windows."""

    def __init__(self, folder: Path, name: str, root: bytes, url: str, port: int, behaviour: Behaviour) -> None:
        self.name, self._behaviour = name, behaviour
        self._camera = Camera(folder / name, root, url, SITE)
        self._spool, self._sequence = str(uuid.uuid4()), 0
        self.running: Release | None = None
        self.installed: list[str] = []
        """Versions that were ever installed."""
        self._update = Update(channel="stable", group="default")
        self._confidence = 0.9 + random.Random(name).uniform(-0.03, 0.03)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._random = random.Random(name)
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(hint_topic(SITE, "default"), qos=1)
        self._client.on_message = lambda *_: self._wake.set()
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Look at the repository once, then at each hint."""
        self._wake.set()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(20)
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def version(self) -> str:
        return self.running.version if self.running is not None else ""

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._wake.wait(0.4):
                self._wake.clear()
                self._look()
            self._send_window()

    def _look(self) -> None:
        with self._camera.open() as repository:
            repository.refresh()
            channel = repository.channel(MODEL)
            if channel is None:
                return
            wanted = channel.target if takes_target(channel, "default", self.name) else channel.previous
            release = repository.release(wanted)[0] if wanted else None
        if release is None or (self.running is not None and release.identity == self.running.identity):
            self._report()
            return
        newer = self.running is None or release.version > self.running.version
        if newer or channel.rolled_back:
            self._install(release, channel.rollout)

    def _install(self, release: Release, rollout: str) -> None:
        if self._update.state == "rolled back" and self._update.digest == release.identity[:12]:
            return
        before, confidence = self.running, self._confidence
        self.installed.append(release.version)
        self._report_state("probation", release, rollout)
        self.running = release
        state, reason, self._confidence = self._behaviour(release)
        if state == "rolled back":
            self.running, self._confidence = before, confidence
        self._report_state(state, release, rollout, reason)

    def _report_state(self, state: str, release: Release, rollout: str, reason: str = "") -> None:
        self._update = Update(
            state=state,
            model=f"{MODEL} {release.version}",
            digest=release.identity[:12],
            rollout=rollout,
            reason=reason,
            since=time.time(),
            attempts=1,
            channel="stable",
            group="default",
        )
        self._report()

    def _report(self) -> None:
        release = self.running
        status = Status(
            **self._header(),  # type: ignore[arg-type]
            state="online",
            model=f"{MODEL} {release.version}" if release else "",
            digest=release.identity[:12] if release else "",
            update=self._update,
        )
        self._client.publish(topic(SITE, self.name, "status"), encode(status), qos=1, retain=True)

    def _send_window(self) -> None:
        if self.running is None:
            return
        confidence = min(1.0, self._confidence + self._random.gauss(0, 0.01))
        window = Window(
            **self._header(),  # type: ignore[arg-type]
            seconds=0.4,
            model=f"{MODEL} {self.version}",
            digest=self.running.identity[:12],
            frames=200,
            counts={"disc": 200},
            confidence_sum={"disc": round(200 * confidence, 2)},
            latency_bins={140: 200},
        )
        self._client.publish(topic(SITE, self.name, "window"), encode(window), qos=1)

    def _header(self) -> dict[str, object]:
        self._sequence += 1
        return {"device": self.name, "spool": self._spool, "sequence": self._sequence, "time": time.time()}
