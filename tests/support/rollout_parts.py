"""Simulated devices of a rollout, as the engine sees them: they follow the channel as real ones do."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from eyas_device.telemetry.messages import Status, Update, encode
from eyas_device.updates.release import Channel, takes_target
from eyas_host.fleet.rollout.engine import Decision, decide
from eyas_host.fleet.rollout.plan import ControlSection, Plan, QualitySection, Wave
from eyas_host.fleet.rollout.state import Rollout, Seen, channel_of
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import ValidMessage, validate

OLD, NEW = "0" * 12, "1" * 12
QUICK = Plan(
    wave=(Wave(share=0.1, wait_s=0), Wave(share=0.5, wait_s=0), Wave(wait_s=0)),
    control=ControlSection(share=0),
    quality=QualitySection(enabled=False),
)


def rollout(plan: Plan = QUICK, **fields: Any) -> Rollout:
    """A rollout of `shapes 2.0.0` that has not begun."""
    made: dict[str, Any] = {
        "id": "shapes-2.0.0",
        "model": "shapes",
        "version": "2.0.0",
        "target": "releases/shapes/2.0.0/release.json",
        "digest": NEW,
        "previous": "releases/shapes/1.0.0/release.json",
        "previous_version": "1.0.0",
        "plan": plan,
    }
    return Rollout(**(made | fields))


class SimulatedFleet:
    """Devices that take what the channel wants of them; some fail, some are not connected."""

    def __init__(self, names: Iterable[str], *, groups: Sequence[str] = ("default",), seed: int = 0) -> None:
        self.devices = {
            name: Seen(device=name, site="s", group=groups[i % len(groups)], digest=OLD) for i, name in enumerate(names)
        }
        self.failing: set[str] = set()
        self.state = "rolled back"
        """How the update of a failing device ends."""
        self.touched: set[str] = set()
        """Devices that ever began."""
        self._random = random.Random(seed)

    @property
    def seen(self) -> list[Seen]:
        return list(self.devices.values())

    def running(self, digest: str) -> set[str]:
        return {name for name, seen in self.devices.items() if seen.digest == digest}

    def change(self, name: str, **fields: Any) -> None:
        self.devices[name] = msgspec.structs.replace(self.devices[name], **fields)

    def follow(self, channel: Channel, *, share: float = 1.0) -> None:
        """Let each connected device act on the channel, with a probability of `share`."""
        for name, seen in list(self.devices.items()):
            if not seen.connected or self._random.random() > share:
                continue
            if takes_target(channel, seen.group, name):
                if seen.digest != NEW and seen.update_digest != NEW:
                    self._install(name, channel.rollout)
            elif channel.rolled_back and channel.previous and seen.digest == NEW:
                self.change(name, digest=OLD, update="committed", update_digest=OLD)

    def _install(self, name: str, rollout_id: str) -> None:
        self.touched.add(name)
        fields = {"update_digest": NEW, "rollout": rollout_id, "attempts": 1}
        if name in self.failing:
            self.change(name, update=self.state, reason="agreement 12 % is below 70 %", **fields)
        else:
            self.change(name, update="committed", digest=NEW, **fields)


def advance(one: Rollout, fleet: SimulatedFleet, now: float, *, share: float = 1.0) -> tuple[Rollout, Decision]:
    """Let the engine decide, and the devices follow."""
    decision = decide(one, fleet.seen, now)
    one = msgspec.structs.replace(one, state=decision.state)
    fleet.follow(channel_of(one), share=share)
    return one, decision


def status_of(seen: Seen, *, sequence: int, spool: str, channel: str = "stable") -> Status:
    """The status message that a simulated device would send."""
    version = {OLD: "1.0.0", NEW: "2.0.0"}[seen.digest]
    update = Update(
        state=seen.update,
        model="shapes 2.0.0" if seen.update_digest else "",
        digest=seen.update_digest,
        rollout=seen.rollout,
        reason=seen.reason,
        attempts=seen.attempts,
        channel=channel,
        group=seen.group,
    )
    return Status(
        device=seen.device,
        spool=spool,
        sequence=sequence,
        time=time.time(),
        state="online",
        model=f"shapes {version}",
        digest=seen.digest,
        update=update,
    )


class MemoryChannels:
    """A repository that signs nothing; `broken` is raised by the next change, once."""

    def __init__(self) -> None:
        self.channels: dict[tuple[str, str, str], Channel] = {}
        self.broken: BaseException | None = None
        self.changes = 0

    def channel(self, name: str, model: str, site: str = "") -> Channel | None:
        return self.channels.get((name, model, site))

    def set_channel(self, name: str, channel: Channel, site: str = "") -> None:
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        self.changes += 1
        self.channels[name, channel.model, site] = msgspec.structs.replace(channel, issued=1.0)


class StoredFleet:
    """A simulated fleet whose statuses are in a store, as a collector would have put them there."""

    def __init__(self, store: Store, fleet: SimulatedFleet, channels: MemoryChannels) -> None:
        self.store, self.fleet, self.channels = store, fleet, channels
        self._sequence = 0
        self._spool = str(uuid.uuid4())

    def report(self) -> None:
        """Store a status of each device."""
        self._sequence += 1
        messages = []
        for seen in self.fleet.seen:
            status = status_of(seen, sequence=self._sequence, spool=self._spool)
            valid = validate(f"eyas/{seen.site}/{seen.device}/status", encode(status))
            assert isinstance(valid, ValidMessage), valid
            messages.append(valid)
        self.store.add(Batch(time.time(), messages))

    def follow(self, *, share: float = 1.0) -> None:
        """Let devices act on the channel that the repository shows, and report."""
        if (channel := self.channels.channel("stable", "shapes")) is not None:
            self.fleet.follow(channel, share=share)
        self.report()
