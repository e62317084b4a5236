"""State of a fleet as its messages show it: one entry for each device, worst condition first."""

from __future__ import annotations

from collections import deque
from typing import Literal, get_args

import msgspec

from eyas_device.telemetry.messages import TENTHS, Event, Status, Window
from eyas_host.fleet.store.validate import ValidMessage

MAX_DEVICES = 20_000
"""Max. devices, so that invented names do not fill the memory."""
_SAMPLES = 8
_SILENT_WINDOWS = 3.0
_SILENT_S = 30.0

Condition = Literal["lost", "silent", "camera", "offline", "ood", "paused", "online"]
"""Condition of a device, the worst first."""
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


class DeviceState(msgspec.Struct, kw_only=True):
    """Last messages of a device."""

    site: str
    device: str
    status: Status | None = None
    window: Window | None = None
    last_seen: float = 0.0
    """Arrival of its last message, seconds; 0 if there were only retained ones."""

    def condition(self, now: float) -> Condition:
        """Condition at `now`, seconds."""
        if self.status is not None and self.status.state == "lost":
            return "lost"
        if self.status is not None and self.status.state != "online":
            return "offline"
        if self.last_seen and now - self.last_seen > self.silent_s:
            return "silent"
        if self.camera not in ("", "delivering"):
            return "camera"
        if self.status is not None and self.status.ood:
            return "ood"
        return "paused" if self.status is not None and self.status.paused else "online"

    @property
    def silent_s(self) -> float:
        """Time without a message after which the device counts as silent, seconds."""
        return max(_SILENT_S, _SILENT_WINDOWS * self.window.seconds) if self.window else _SILENT_S * _SILENT_WINDOWS

    @property
    def camera(self) -> str:
        """Camera state in the newer of status and window."""
        messages = [m for m in (self.status, self.window) if m is not None]
        newest = max(messages, key=lambda m: m.sequence, default=None)
        return newest.camera if newest is not None else ""

    @property
    def model(self) -> str:
        """Model in use."""
        return (self.window.model if self.window else "") or (self.status.model if self.status else "")

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


def _newer(previous: Window | None, window: Window) -> Window:
    """The newer of two windows: a device that was offline sends old windows after new ones."""
    if previous is None or previous.spool != window.spool:
        return window
    return max(previous, window, key=lambda w: w.sequence)
