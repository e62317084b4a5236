"""What a watcher knows of a fleet from its messages alone: one line a device, trouble first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from eyas_device.telemetry.messages import TENTHS, Event, Status, Window
from eyas_host.fleet.store.checked import Checked

MOST_DEVICES = 20_000
"""Devices that are remembered: whoever invents names does not fill the memory."""
_SAMPLES = 8
_STALE_WINDOWS = 3.0
_STALE_S = 30.0

TROUBLE = ("lost", "silent", "camera", "offline", "ood", "paused", "online")
"""Conditions of a device, the most troubling first."""


class Line(msgspec.Struct, kw_only=True):
    """One device."""

    site: str
    device: str
    status: Status | None = None
    window: Window | None = None
    heard: float = 0.0
    """When anything of it last arrived, seconds; what the broker had kept counts as never."""

    def condition(self, now: float) -> str:
        """One of `TROUBLE`."""
        if self.status is not None and self.status.state != "online":
            return self.status.state
        if self.heard and now - self.heard > self.stale_s:
            return "silent"
        camera = self.camera
        if camera not in ("", "delivering"):
            return "camera"
        if self.status is not None and self.status.ood:
            return "ood"
        return "paused" if self.status is not None and self.status.paused else "online"

    @property
    def stale_s(self) -> float:
        """After so many seconds of silence something is wrong."""
        return max(_STALE_S, _STALE_WINDOWS * self.window.seconds) if self.window else _STALE_S * _STALE_WINDOWS

    @property
    def camera(self) -> str:
        """The camera's state as last told, by whichever message is newer."""
        told = [m for m in (self.status, self.window) if m is not None]
        newest = max(told, key=lambda m: m.sequence, default=None)
        return newest.camera if newest is not None else ""

    @property
    def model(self) -> str:
        """The model that answers, as last told."""
        return (self.window.model if self.window else "") or (self.status.model if self.status else "")

    @property
    def fps(self) -> float | None:
        """Answers a second in the last window."""
        return self.window.frames / self.window.seconds if self.window and self.window.seconds > 0 else None

    @property
    def confidence(self) -> float | None:
        """Mean confidence in the last window, within a twentieth: the histogram has tenths."""
        if self.window is None:
            return None
        tenths = [sum(column) for column in zip(*self.window.confidence.values(), strict=False)]
        total = sum(tenths)
        return sum((n + 0.5) / TENTHS * count for n, count in enumerate(tenths)) / total if total else None

    @property
    def uncertain(self) -> float | None:
        """Part of the answers of the last window that were below the threshold."""
        return self.window.uncertain / self.window.frames if self.window and self.window.frames else None


class Seen:
    """Everything that was seen so far. Not for use by several threads at once."""

    def __init__(self) -> None:
        self.samples: deque[Event] = deque(maxlen=_SAMPLES)
        """The last hard samples, the newest first."""
        self.messages = 0
        self.poison = 0
        self._lines: dict[tuple[str, str], Line] = {}

    def take(self, checked: Checked, now: float, *, kept: bool = False) -> None:
        """A message arrived at `now`; `kept` if the broker had kept it from before."""
        self.messages += 1
        key = (checked.address.site, checked.address.device)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MOST_DEVICES:
                return
            line = self._lines[key] = Line(site=key[0], device=key[1])
        message = checked.message
        if isinstance(message, Status):
            line.status = message
        elif isinstance(message, Window):
            line.window = _newer(line.window, message)
        elif isinstance(message, Event):
            self.samples.appendleft(message)
        if not kept and not checked.is_will:
            line.heard = now

    def lines(self, now: float) -> list[Line]:
        """All devices, trouble first, then by name."""
        return sorted(self._lines.values(), key=lambda d: (TROUBLE.index(d.condition(now)), d.site, d.device))

    def summary(self, now: float) -> dict[str, int]:
        """How many devices are in which condition."""
        conditions = [line.condition(now) for line in self._lines.values()]
        return {name: conditions.count(name) for name in TROUBLE if name in conditions}


def _newer(before: Window | None, now: Window) -> Window:
    """A device that was away sends its old windows after new ones."""
    if before is None or before.spool != now.spool:
        return now
    return max(before, now, key=lambda w: w.sequence)


def as_row(line: Line, now: float) -> dict[str, Any]:
    """A device as plain values, for JSON."""
    window = line.window
    return {
        "site": line.site,
        "device": line.device,
        "condition": line.condition(now),
        "model": line.model,
        "camera": line.camera,
        "fps": line.fps,
        "latency_ms": window.latency_ms if window else {},
        "confidence": line.confidence,
        "uncertain": line.uncertain,
        "dropped": window.dropped if window else None,
        "temperature_c": window.temperature_c if window else None,
    }


def plain(text: str, most: int = 40) -> str:
    """Text from the network that may be shown: one line, printable, not long."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def joined(texts: Iterable[str]) -> str:
    """Several such texts."""
    return ", ".join(plain(text) for text in texts)
