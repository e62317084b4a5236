"""The table of devices: the columns that everybody needs in 80 characters, further ones where there is room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from eyas_device.telemetry.messages import UNKNOWN, Window
from eyas_host.fleet.watch.fleet_state import DeviceState

_GAP = "  "
_MIN_NAME, _MAX_NAME = 12, 28
_MIN_LABELS, _GOOD_LABELS, _WIDE_LABELS, _MAX_LABELS = 12, 18, 30, 60
_MAX_LABEL, _MAX_TEXT = 20, 64
_MAX_MODEL, _MAX_SITE = 28, 20


class Column(NamedTuple):
    """A column of figures or words."""

    title: str
    cell: Callable[[DeviceState, float], str]
    """Text for a device at a time, seconds."""
    left: bool = False
    """Whether it is aligned to the left, as words are."""


def printable(text: str, max_length: int = 40) -> str:
    """Make text from the network safe to print: one line, printable characters, bounded length."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 1] + "…"


def shorten(text: str, width: int) -> str:
    """Cut a name in its middle: names of one fleet differ at their ends."""
    if cell_len(text) <= width:
        return text
    end = min(7, (width - 1) // 2)
    return f"{text[: max(1, width - 1 - end)]}…{text[len(text) - end :]}"


def age(seconds: float) -> str:
    """A short duration: seconds up to 99, then minutes, hours and days."""
    for unit, size in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def shares(counts: dict[str, int], width: int) -> str:
    """The labels of a window with their shares, the most frequent first, as many as fit; then how many more."""
    total = sum(counts.values())
    found = sorted(((n, label) for label, n in counts.items() if n > 0), key=lambda item: (-item[0], item[1]))
    shown = ""
    for number, (count, label) in enumerate(found):
        share = f" {count / total:.0%}"
        more = f" +{len(found) - number - 1}" if number < len(found) - 1 else ""
        room = width - cell_len(shown) - bool(shown)
        name = shorten(printable(label, _MAX_TEXT), _MAX_LABEL)
        if cell_len(name + share + more) > room:
            if shown:
                return f"{shown} +{len(found) - number}"
            name = shorten(name.replace("…", ""), max(3, room - len(share) - len(more)))
        text = name + share
        shown = f"{shown} {text}" if shown else text
    return shown


def _window(device: DeviceState) -> Window:
    return device.window or Window()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _state(device: DeviceState, now: float) -> str:
    condition = device.condition(now)
    return printable(device.status.state, 12) if condition == UNKNOWN and device.status else condition


def _temperature(device: DeviceState, now: float) -> str:
    window = _window(device)
    return _number(window.temperature_c, ".0f") + ("!" if window.throttled else "")


_DEVICE, _LABELS = "device", "labels"
BASIC = (
    Column(_DEVICE, lambda device, now: "", left=True),
    Column("state", _state, left=True),
    Column(_LABELS, lambda device, now: "", left=True),
    Column("conf.", lambda device, now: _number(device.confidence, ".2f")),
    Column("fps", lambda device, now: _number(device.fps, ".1f")),
    Column("p50 ms", lambda device, now: _number(_window(device).latency_ms.get("p50"), ".1f")),
    Column("drop", lambda device, now: str(_window(device).dropped) if device.window else ""),
    Column("unread", lambda device, now: f"{device.unreadable:.0%}" if device.window else ""),
    Column("age", lambda device, now: age(now - device.last_seen) if device.last_seen else ""),
)
"""Columns of a terminal of 80 characters, in the order in which they are shown."""
FURTHER = (
    Column("site", lambda device, now: printable(device.site, _MAX_SITE), left=True),
    Column("model", lambda device, now: shorten(printable(device.model, _MAX_TEXT), _MAX_MODEL), left=True),
    Column("agent", lambda device, now: printable(device.status.agent, 12) if device.status else "", left=True),
    Column("ood", lambda device, now: _number(_window(device).ood_quantile, ".0%")),
    Column("°C", _temperature),
    Column("uncertain", lambda device, now: _number(device.uncertain, ".0%")),
    Column("p99 ms", lambda device, now: _number(_window(device).latency_ms.get("p99"), ".1f")),
    Column("frames", lambda device, now: str(_window(device).frames) if device.window else ""),
    Column("camera", lambda device, now: printable(device.camera, 12), left=True),
)
"""Further columns, the most important first; those in which nobody has a value are left out."""
_LESS_THAN_LABELS = "uncertain"
"""The first of the further columns that matter less than more labels."""
_IMPORTANCE = (_DEVICE, "state", "conf.", "fps", _LABELS, "age", "p50 ms", "unread", "drop")
"""Basic columns, the most important first, for terminals below 80 characters."""


def layout(devices: Sequence[DeviceState], now: float, width: int) -> list[str]:
    """Lay out the heading and a line for each device in at most `width` characters."""
    names = _names(devices)
    counts = [_window(device).counts for device in devices]
    texts = {
        column.title: [column.title, *(column.cell(device, now) for device in devices)] for column in (*BASIC, *FURTHER)
    }
    needed = {title: max(map(cell_len, cells)) for title, cells in texts.items()}
    long_name = min(_MAX_NAME, max([needed[_DEVICE], *map(cell_len, names)]))
    long_labels = min(_MAX_LABELS, max([needed[_LABELS], *(cell_len(shares(c, _MAX_LABELS)) for c in counts)]))
    needed[_DEVICE], needed[_LABELS] = min(_MIN_NAME, long_name), min(_MIN_LABELS, long_labels)
    chosen: set[str] = set()
    left = width + len(_GAP)

    def add(title: str) -> None:
        nonlocal left
        if left >= needed[title] + len(_GAP):
            chosen.add(title)
            left -= needed[title] + len(_GAP)

    def widen(title: str, size: int) -> None:
        nonlocal left
        if title in chosen:
            more = max(0, min(size - needed[title], left))
            needed[title] += more
            left -= more

    for title in _IMPORTANCE:
        add(title)
    widen(_DEVICE, long_name)
    widen(_LABELS, min(long_labels, _GOOD_LABELS))
    for column in FURTHER:
        if column.title == _LESS_THAN_LABELS:
            widen(_LABELS, min(long_labels, _WIDE_LABELS))
        if any(texts[column.title][1:]):
            add(column.title)
    widen(_LABELS, long_labels)
    texts[_DEVICE][1:] = [shorten(name, needed[_DEVICE]) for name in names]
    texts[_LABELS][1:] = [shares(count, needed[_LABELS]) for count in counts]
    columns = [column for column in (*BASIC, *FURTHER) if column.title in chosen]
    return [
        _GAP.join(_aligned(texts[c.title][row], needed[c.title], left=c.left) for c in columns).rstrip()
        for row in range(1 + len(devices))
    ]


def _names(devices: Sequence[DeviceState]) -> list[str]:
    """Names of devices, with the site where two have one name."""
    known = Counter(device.device for device in devices)
    names = []
    for device in devices:
        name = printable(device.device, _MAX_TEXT)
        names.append(name if known[device.device] == 1 else f"{printable(device.site, _MAX_SITE)}/{name}")
    return names


def _aligned(text: str, width: int, *, left: bool) -> str:
    return set_cell_size(text, width) if left else " " * (width - cell_len(text)) + text
