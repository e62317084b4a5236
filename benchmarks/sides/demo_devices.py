"""Simulated cameras: real compiled models on real images, real updates and messages, and a day that takes a second."""

from __future__ import annotations

import base64
import itertools
import random
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.config import Config, DeviceSection, ModelSection, PrivacySection, UpdateSection
from eyas_device.telemetry.aggregate import WindowAggregator, uncertainty
from eyas_device.telemetry.messages import Event, Health, Status, Update, Why, encode
from eyas_device.telemetry.privacy import Policy, encode_jpeg
from eyas_device.updates.machine import Updater
from eyas_device.updates.probation import assess, begin, ended, write_verdict
from eyas_device.updates.progress import UpdateRecord
from eyas_device.updates.records import Tally
from eyas_device.updates.slots import Slots, SlotState, other_slot
from sides.demo_scenes import Condition, Seen, Version, patches, show

FRAMES = 12
"""Predictions of a window."""
WINDOW_S = 300.0
PRIVACY = PrivacySection(
    images=True, sample_rate=0.003, band=(0.0, 0.6), disagreements=True, min_interval_s=1800.0, max_images_per_day=40
)
_HOUR_S = 3600.0
_PROBATION_WINDOWS = 72
"""Windows that a release is compared on before its probation is judged: six hours."""
Send = Callable[[str, str, bytes], None]
"""Takes the device's name, the kind of the message and the message."""


class Versions:
    """The versions that devices have, each loaded once for all of them."""

    def __init__(self) -> None:
        self._loaded: dict[str, Version] = {}

    def of(self, slots: Slots, state: SlotState) -> Version:
        """The version in a slot."""
        if state.manifest_sha256 not in self._loaded:
            self._loaded[state.manifest_sha256] = Version(slots.folder / state.slot)
        return self._loaded[state.manifest_sha256]


class Counted(msgspec.Struct):
    """What is known of the cameras and never of the host: which answers were right."""

    frames: int = 0
    right: int = 0
    right_without: int = 0
    """By the first version, on the same frames."""


class Camera:
    """One device.

    Args:
        folder: Where its state goes.
        name: Its name.
        site: Its site.
        url: The repository.
        root: The root of trust.
        first: State folder with the first version.
        versions: Those of all devices.
        scenes: Label and number of what it may see.
        clock: Seconds since 1970, of the demonstration.
        send: Sends a message.

    """

    def __init__(
        self,
        folder: Path,
        name: str,
        site: str,
        url: str,
        root: Path,
        first: Path,
        versions: Versions,
        scenes: Sequence[tuple[str, int]],
        clock: Callable[[], float],
        send: Send,
    ) -> None:
        self.name, self.site = name, site
        state = Path(shutil.copytree(first, folder / name, symlinks=True))
        self._config = Config(
            device=DeviceSection(name=name, site=site, state=str(state)),
            model=ModelSection(runtime="litert"),
            update=UpdateSection(url=url, root=str(root)),
        )
        self._slots, self._versions, self._clock, self._send = Slots(state), versions, clock, send
        self._scenes = scenes
        self._random = random.Random(name)
        self._sequence = itertools.count(1)
        self._spool = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        self._policy = Policy(PRIVACY, clock=clock, chance=self._random.random)
        self._record = UpdateRecord()
        self._tally, self._compared = Tally(), 0
        self._previous: Version | None = None
        """Predicts the same frames while the running version is on probation."""
        self._read_slots()
        self._first = self._running
        self.season = self.dirt = 0
        self.counted = Counted()
        self.truth: dict[tuple[str, str, int], str] = {}
        """Identity of each event -> what it shows; only whoever labels may look."""
        self.report()

    @property
    def runs(self) -> str:
        """The version that runs."""
        return self._state.version

    def look(self) -> None:
        """Look at the repository, as its updater does."""
        before = self._record.state
        self._record = Updater(self._config).run_once()
        if self._record.state == "probation" and before != "probation":
            self._tally, self._compared = Tally(), 0
        self._read_slots()
        self.report()

    def window(self) -> None:
        """Predict what the camera sees for five minutes, and send what the host may know of it."""
        now, aggregator = self._clock(), WindowAggregator()
        running, previous = self._running, self._previous
        arm = "candidate" if previous is not None else ""
        condition = Condition(_light(now), self.season, self.dirt)
        for _ in range(FRAMES):
            label, number = self._random.choice(self._scenes)
            seen = running.see(label, number, condition)
            self.counted.frames += 1
            self.counted.right += seen.prediction.label == label
            self.counted.right_without += self._first.see(label, number, condition).prediction.label == label
            aggregator.add(seen.prediction, seen.prediction.latency_ms, seen.prediction.latency_ms)
            if seen.projection is not None:
                aggregator.add_projection(seen.projection)
            if previous is not None:
                self._compare(seen, previous.see(label, number, condition), running, label, number, condition)
            elif (why := self._policy.choose(seen.prediction)) is not None:
                self._event(seen, running, why, label, number, condition)
        found = aggregator.window(running.name, running.artefact, arm=arm, dropped=0, health=Health())
        self._publish(
            "window", msgspec.structs.replace(found, seconds=WINDOW_S, digest=running.digest, camera="delivering")
        )
        if previous is not None:
            self._compared += 1
            if self._compared >= _PROBATION_WINDOWS:
                self._judge()

    def report(self) -> None:
        """Send the status."""
        update = Update(**{field: getattr(self._record, field) for field in Update.__struct_fields__})
        status = Status(
            state="online",
            model=self._running.name,
            digest=self._running.digest,
            artefact=self._running.artefact,
            update=update,
        )
        self._publish("status", status)

    def _compare(
        self, seen: Seen, before: Seen, running: Version, label: str, number: int, condition: Condition
    ) -> None:
        """Both versions predicted the frame: count, and send what they disagree on."""
        self._tally.shadowed += 1
        self._tally.frames += 1
        if seen.prediction.label == before.prediction.label:
            return
        self._tally.different += 1
        if self._policy.choose_disagreement():
            self._event(seen, running, "disagreement", label, number, condition, before)

    def _judge(self) -> None:
        """End the probation by the bounds that were signed with the release, as the agent does."""
        slots, name = self._slots, self._state.slot
        found = begin(slots, name, now=self._clock())
        if found is None:
            return
        release, verdict = found
        self._tally.frames = max(self._tally.frames, release.probation.frames)
        self._tally.seconds = release.probation.seconds
        assessment = assess(self._tally, release.probation)
        write_verdict(slots, name, ended(verdict, assessment, self._tally, now=self._clock()))
        if assessment.state == "failed":
            slots.refuse(name, assessment.reason)
            slots.roll_back()
        self._record = Updater(self._config).run_once()
        self._read_slots()
        self.report()

    def _event(
        self,
        seen: Seen,
        running: Version,
        why: Why,
        label: str,
        number: int,
        condition: Condition,
        before: Seen | None = None,
    ) -> None:
        prediction = seen.prediction
        margin, entropy = uncertainty(prediction.probabilities)
        noise = self._random.randrange(1 << 30)  # of another moment: no two images of a camera are the same
        image, quality = encode_jpeg(show(patches(label)[number], condition, seed=noise))
        labels = running.bundle.manifest.labels
        event = Event(
            model=running.name,
            digest=running.digest,
            artefact=running.artefact,
            arm="candidate" if before is not None else "",
            label=prediction.label,
            confidence=round(prediction.confidence, 4),
            margin=round(margin, 4),
            entropy=round(entropy, 4),
            top={name: round(float(p), 4) for name, p in zip(labels, prediction.probabilities, strict=True)},
            why=why,
            previous_label=before.prediction.label if before is not None else "",
            previous_confidence=round(before.prediction.confidence, 4) if before is not None else 0.0,
            source="camera",
            image=base64.b64encode(image).decode(),
            image_policy={"quality": quality, "retention_days": PRIVACY.retention_days},
        )
        self.truth[self.name, self._spool, self._publish("event", event)] = label

    def _publish(self, kind: str, message: Any) -> int:
        """Send a message; its sequence."""
        sequence = next(self._sequence)
        whole = msgspec.structs.replace(
            message, device=self.name, spool=self._spool, sequence=sequence, time=self._clock()
        )
        self._send(f"eyas/{self.site}/{self.name}/{kind}", kind, encode(whole))
        return sequence

    def _read_slots(self) -> None:
        """What runs now, and what it is compared with."""
        states = {state.slot: state for state in self._slots.states()}
        self._state = next(state for state in states.values() if state.current)
        self._running = self._versions.of(self._slots, self._state)
        on_probation = self._record.state == "probation"
        other = states[other_slot(self._state.slot)] if on_probation else None
        self._previous = self._versions.of(self._slots, other) if other is not None else None


def _light(now: float) -> int:
    """Index of the light at an hour: night, morning or evening, day, noon."""
    hour = now % 86_400 / _HOUR_S
    if hour < 6 or hour >= 20:
        return 0
    if hour < 9 or hour >= 17:
        return 1
    return 3 if 11 <= hour < 14 else 2
