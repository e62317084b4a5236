"""State of a fleet as its messages show it: one entry for each device, worst condition first."""

from __future__ import annotations

from collections import deque
from typing import Literal, get_args

import msgspec

from eyas_device.support.redact import redact
from eyas_device.telemetry.messages import STATES, TENTHS, UNKNOWN, Event, Status, Update, Window, known
from eyas_host.fleet.status import is_connected, since
from eyas_host.fleet.store.validate import ValidMessage

MAX_DEVICES = 20_000
"""Max. devices, so that invented names do not fill the memory."""
_SAMPLES = 8
_SILENT_WINDOWS = 3.0
_SILENT_S = 30.0
_DEGRADED = 0.05
"""Fraction of unreadable frames above which a camera is degraded."""
_EXPIRES_DAYS = 30.0
"""A certificate that expires sooner is a problem."""

Condition = Literal[
    "lost",
    "silent",
    "no model",
    "camera",
    "offline",
    "degraded",
    "unknown",
    "ood",
    "rolled back",
    "refused",
    "paused",
    "probation",
    "online",
]
"""Condition of a device, the worst first. `degraded`: many frames cannot be read; `rolled back`: its last update failed
on probation; `refused`: another model runs than the one that should, or a release was refused; `probation`: a new model
has not proved itself yet; `unknown`: a state that this version does not know."""
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


class DeviceState(msgspec.Struct, kw_only=True):
    """Last messages of a device."""

    site: str
    device: str
    status: Status | None = None
    window: Window | None = None
    last_seen: float = 0.0
    """Arrival of its last message, seconds; 0 if there were only retained ones."""
    unread: str = ""
    """What of its last message this version cannot read, because its schema is newer."""

    def condition(self, now: float) -> Condition:
        """Condition at `now`, seconds."""
        status = self.status or Status(state="online")
        if status.state in ("lost", "offline"):
            return "lost" if status.state == "lost" else "offline"
        if self.last_seen and now - self.last_seen > self.silent_s:
            return "silent"
        if not status.model and status.refused_reason:
            return "no model"
        if self.camera not in ("", "delivering", "degraded"):
            return "camera"
        if self.camera == "degraded" or self.unreadable > _DEGRADED:
            return "degraded"
        if known(status.state, STATES) == UNKNOWN:
            return "unknown"
        if status.ood:
            return "ood"
        update = status.update.state if status.update is not None else ""
        if update == "rolled back":
            return "rolled back"
        if status.refused_model or update == "refused":
            return "refused"
        if status.paused:
            return "paused"
        return "probation" if update == "probation" else "online"

    def problems(self, now: float) -> list[str]:
        """What people should know at `now`, seconds, worst first; as the device says it."""
        status, window = self.status or Status(state="online"), self.window or Window()
        found = []
        condition = self.condition(now)
        if not is_connected(status):
            found.append(since(status))
        elif condition == "silent":
            found.append(f"connected, but nothing came for {now - self.last_seen:.0f} s")
        if not status.model and status.refused_reason:
            found.append(f"no model runs: {status.refused_reason}")
        elif status.refused_model and not (status.update is not None and status.update.state == "rolled back"):
            found.append(f"{status.refused_model} was refused: {status.refused_reason}")
        if status.update is not None:
            found += _of_update(status.update)
        if status.agent_update is not None:
            found += _of_update(status.agent_update)
        if self.camera not in ("", "delivering"):
            found.append(f"camera {self.camera}" + (f": {status.reason}" if status.reason else ""))
        if self.unreadable > _DEGRADED:
            found.append(f"{self.unreadable:.0%} of the frames cannot be read")
        if known(status.state, STATES) == UNKNOWN:
            found.append(f"its state is {status.state!r}, which this version does not know")
        if status.ood:
            found.append(
                f"out of distribution: {status.ood_reason or window.ood_reason or 'check view, light and focus'}"
            )
        if window.nonfinite:
            found.append(f"{window.nonfinite} predictions were not finite")
        if status.restarts:
            counts = ", ".join(f"{name} {count}" for name, count in status.restarts.items())
            found.append(f"started again after errors: {counts}")
        if status.certificate_days is not None and status.certificate_days < _EXPIRES_DAYS:
            found.append(f"its certificate expires in {max(status.certificate_days, 0):.0f} days")
        newest = self._newest
        if newest is not None and newest.synchronised is False:
            found.append("its clock is not synchronised")
        found += [*status.faults, *([self.unread] if self.unread else [])]
        return [redact(text) for text in found]  # older devices send their camera's credentials

    @property
    def unreadable(self) -> float:
        """Fraction of the frames of the last window that could not be read or were black, 0..1."""
        frames = self.window.frames + self.window.unreadable if self.window else 0
        return self.window.unreadable / frames if self.window and frames else 0.0

    @property
    def _newest(self) -> Status | Window | None:
        messages = [message for message in (self.status, self.window) if message is not None]
        return max(messages, key=lambda message: message.sequence, default=None)

    @property
    def silent_s(self) -> float:
        """Time without a message after which the device counts as silent, seconds."""
        return max(_SILENT_S, _SILENT_WINDOWS * self.window.seconds) if self.window else _SILENT_S * _SILENT_WINDOWS

    @property
    def camera(self) -> str:
        """Camera state in the newer of status and window."""
        newest = self._newest
        return newest.camera if newest is not None else ""

    @property
    def model(self) -> str:
        """Model in use, with the first digits of its digest: name and version may be the same."""
        for message in (self.window, self.status):
            if message is not None and message.model:
                return f"{message.model} {message.digest[:7]}".rstrip()
        return ""

    @property
    def fps(self) -> float | None:
        """Predictions a second in the last window."""
        return self.window.frames / self.window.seconds if self.window and self.window.seconds > 0 else None

    @property
    def confidence(self) -> float | None:
        """Mean confidence in the last window; of an agent 0.1.0 within 0.05, from tenths."""
        if self.window is None:
            return None
        if self.window.confidence_sum and self.window.frames:
            return sum(self.window.confidence_sum.values()) / self.window.frames
        tenths = [sum(column) for column in zip(*self.window.confidence.values(), strict=False)]
        total = sum(tenths)
        return sum((n + 0.5) / TENTHS * count for n, count in enumerate(tenths)) / total if total else None

    @property
    def uncertain(self) -> float | None:
        """Fraction of predictions below the confidence threshold in the last window."""
        return self.window.uncertain / self.window.frames if self.window and self.window.frames else None


class FleetState:
    """States of all devices, and the latest hard samples. Not thread-safe."""

    def __init__(self) -> None:
        self.samples: deque[Event] = deque(maxlen=_SAMPLES)
        """Latest hard samples, newest first."""
        self.messages = 0
        self.invalid = 0
        self._devices: dict[tuple[str, str], DeviceState] = {}

    def add(self, message: ValidMessage, now: float, *, retained: bool = False) -> None:
        """Add a message that arrived at `now`, seconds; a retained one is no sign of life."""
        self.messages += 1
        key = (message.id.site, message.id.device)
        state = self._devices.get(key)
        if state is None:
            if len(self._devices) >= MAX_DEVICES:
                return
            state = self._devices[key] = DeviceState(site=key[0], device=key[1])
        content = message.message
        if isinstance(content, Status):
            state.status = content
        elif isinstance(content, Window):
            state.window = _newer(state.window, content)
        elif isinstance(content, Event):
            self.samples.appendleft(content)
        state.unread = message.problem
        if not retained and not message.is_will:
            state.last_seen = now

    def remove(self, site: str, device: str) -> None:
        """Forget a device, which was expelled."""
        self._devices.pop((site, device), None)

    def devices(self, now: float) -> list[DeviceState]:
        """All devices, worst condition first, then by name."""
        return sorted(self._devices.values(), key=lambda d: (CONDITIONS.index(d.condition(now)), d.site, d.device))

    def summary(self, now: float) -> dict[Condition, int]:
        """Count devices by condition."""
        conditions = [state.condition(now) for state in self._devices.values()]
        return {name: conditions.count(name) for name in CONDITIONS if name in conditions}


def _of_update(update: Update) -> list[str]:
    """What people should know of a device's last update."""
    found = []
    model = update.model or "its update"
    if update.state == "rolled back":
        found.append(f"{model} was rolled back: {update.reason}")
    elif update.state in ("refused", "failed"):
        found.append(f"{model} {'was refused' if update.state == 'refused' else 'failed'}: {update.reason}")
    if update.clock:
        found.append(f"updates: {update.clock}")
    return found


def _newer(previous: Window | None, window: Window) -> Window:
    """The newer of two windows: a device that was offline sends old windows after new ones."""
    if previous is None or previous.spool != window.spool:
        return window
    return max(previous, window, key=lambda w: w.sequence)
