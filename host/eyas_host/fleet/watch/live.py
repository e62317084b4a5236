"""The live view of a fleet: needs read access to the broker, no store."""

from __future__ import annotations

import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import msgspec
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from eyas_device.support.streams import escape_json
from eyas_device.telemetry.messages import UNKNOWN, Event, Window
from eyas_device.telemetry.mqtt_client import LinkStatus
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.store.validate import InvalidMessage, cleared_status, validate
from eyas_host.fleet.watch.fleet_state import Condition, DeviceState, FleetState
from eyas_host.fleet.watch.subscriber import Subscriber
from eyas_host.support.errors import BrokerUnreachable

_REFRESH_S = 0.5
_COLOURS: dict[Condition, str] = {
    "lost": "bold red",
    "silent": "red",
    "no model": "bold red",
    "camera": "red",
    "offline": "yellow",
    "degraded": "yellow",
    "unknown": "yellow",
    "ood": "yellow",
    "refused": "yellow",
}
_TITLES = [
    "device", "state", "fps", "frames", "model", "conf.", "uncertain", "seen",
    "unreadable", "p50 ms", "p99 ms", "°C", "dropped", "camera", "agent",
]  # fmt: skip
"""Columns, the most important first."""
_LEFT = frozenset(_TITLES.index(title) for title in ("device", "state", "model", "camera", "agent"))
_GAP, _INDENT = "  ", "    "
_MAX_NAME = 28
_MAX_MODEL, _MAX_MODEL_NARROW, _WIDE = 32, 25, 100
"""Longest model on screens that are wider than the last one, and on others."""


def watch(access: BrokerAccess, *, seconds: float | None = None, console: Console | None = None) -> None:
    """Show the fleet until q or Ctrl-C, or for `seconds`; without a terminal, print one table at the end.

    Raises `LinkError` for an invalid address or invalid credentials, and without a terminal for a broker that was never
    reached.
    """
    console = console or Console()
    fleet, end = FleetState(), None if seconds is None else time.monotonic() + seconds
    with Subscriber(access) as subscriber, _quit_key() as quit_pressed, suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while end is None or time.monotonic() < end:
                _update(fleet, subscriber)
            console.print(render(fleet, time.monotonic(), str(subscriber.status), width=console.width))
            _check_connected(subscriber, access)
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while (end is None or time.monotonic() < end) and not quit_pressed():
                _update(fleet, subscriber)
                screen = render(
                    fleet, time.monotonic(), str(subscriber.status), width=console.width, height=console.height
                )
                live.update(screen, refresh=True)


def stream(access: BrokerAccess, out: TextIO, *, seconds: float | None = None, log: TextIO = sys.stderr) -> None:
    """Write each valid message to `out` as one line of JSON, until Ctrl-C or for `seconds`.

    Changes of the connection's state go to `log`. Raises `LinkError` for an invalid address or invalid credentials, and
    for a broker that was never reached; `BrokenPipeError` if the reader of `out` goes away.
    """
    end = None if seconds is None else time.monotonic() + seconds
    status: LinkStatus | None = None
    with Subscriber(access) as subscriber, suppress(KeyboardInterrupt):
        while end is None or time.monotonic() < end:
            for received in subscriber.take(_REFRESH_S):
                message = validate(received.topic, received.payload)
                if not isinstance(message, InvalidMessage):
                    head = {"topic": received.topic, "kind": message.kind, "site": message.id.site}
                    if message.problem:
                        head["problem"] = message.problem
                    line = {**head, "retained": received.retained, "message": msgspec.Raw(message.payload.encode())}
                    # Compact the payload: JSON that was sent over several lines has to fit one.
                    text = msgspec.json.format(msgspec.json.encode(line), indent=-1).decode()
                    out.write(escape_json(text, out) + "\n")
            out.flush()
            if subscriber.status != status:
                status = subscriber.status
                print(f"eyas watch: {status}", file=log)
        _check_connected(subscriber, access)


def render(fleet: FleetState, now: float, connection: str, *, width: int = 80, height: int = 200) -> Group:
    """Draw the screen: a summary, the devices with their problems, the latest hard samples.

    The columns are chosen to fit `width`; what does not fit is left out, problems never are. Text from the network is
    never markup.
    """
    summary = ", ".join(f"{count} {name}" for name, count in fleet.summary(now).items()) or "no devices yet"
    invalid = f"   {fleet.invalid} invalid messages" if fleet.invalid else ""
    headline = Text(f"{printable(connection, 100)}   {summary}{invalid}", "bold")
    parts: list[RenderableType] = [headline]
    devices = fleet.devices(now)
    left = max(3, height - 3 - _lines(len(headline), width) - len(fleet.samples))
    blocks: list[tuple[list[str], str, str]] = []
    for device in devices:
        problems = printable("; ".join(device.problems), 400)
        left -= 1 + _lines(len(problems), width - len(_INDENT))
        if left < 0:
            break
        blocks.append((_cells(device, now, width), problems, _COLOURS.get(device.condition(now), "")))
    table = _fit([_TITLES, *(cells for cells, _, _ in blocks)], width)
    parts.append(Text(table[0], "bold underline", no_wrap=True))
    for line, (_, problems, colour) in zip(table[1:], blocks, strict=True):
        parts.append(Text(line, colour, no_wrap=True))
        if problems:
            parts.append(Padding(Text(problems, colour), (0, 0, 0, len(_INDENT))))
    if len(devices) > len(blocks):
        parts.append(Text(f"and {len(devices) - len(blocks)} more", "dim"))
    parts += [Text(_sample_line(sample), "dim") for sample in fleet.samples]
    return Group(*parts)


def _lines(length: int, width: int) -> int:
    """Lines that a text takes when it is wrapped at words, or one more."""
    return -(-length // max(10, width - 10))


def _fit(rows: list[list[str]], width: int) -> list[str]:
    """Lay out the first row's columns in order of importance, as many as fit; texts left, figures right."""
    columns: list[int] = []
    used = 0
    for column in range(len(_TITLES)):
        own = max(cell_len(row[column]) for row in rows)
        empty = own == cell_len(_TITLES[column]) and not any(row[column] for row in rows[1:])
        if used + own > width or (empty and len(rows) > 1):
            continue
        used += own + len(_GAP)
        columns.append(column)
    widths = {column: max(cell_len(row[column]) for row in rows) for column in columns}
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            space = " " * (widths[column] - cell_len(row[column]))
            cells.append(row[column] + space if column in _LEFT else space + row[column])
        lines.append(_GAP.join(cells).rstrip())
    return lines


def printable(text: str, max_length: int = 40) -> str:
    """Make text from the network safe to print: one line, printable characters, bounded length."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 1] + "…"


def _check_connected(subscriber: Subscriber, access: BrokerAccess) -> None:
    """Raise `BrokerUnreachable` if the broker was never reached: an empty table would look like an empty fleet."""
    if not subscriber.was_connected:
        raise BrokerUnreachable(f"broker {access.broker}: {subscriber.status}")


def _update(fleet: FleetState, subscriber: Subscriber) -> None:
    for received in subscriber.take(_REFRESH_S):
        if device := cleared_status(received.topic, received.payload):
            fleet.remove(*device)
            continue
        message = validate(received.topic, received.payload)
        if isinstance(message, InvalidMessage):
            fleet.invalid += 1
        else:
            fleet.add(message, time.monotonic(), retained=received.retained)


def _cells(device: DeviceState, now: float, width: int) -> list[str]:
    window = device.window or Window()
    condition = device.condition(now)
    state = printable(device.status.state, 12) if condition == UNKNOWN and device.status else condition
    return [
        _name(device),
        state,
        _number(device.fps, ".1f"),
        str(window.frames) if device.window else "",
        printable(device.model, _MAX_MODEL if width > _WIDE else _MAX_MODEL_NARROW),
        _number(device.confidence, ".2f"),
        _number(device.uncertain, ".0%"),
        f"{now - device.last_seen:.0f} s" if device.last_seen else "",
        f"{device.unreadable:.0%}" if device.window else "",
        _number(window.latency_ms.get("p50"), ".1f"),
        _number(window.latency_ms.get("p99"), ".1f"),
        _number(window.temperature_c, ".0f") + ("!" if window.throttled else ""),
        str(window.dropped) if device.window else "",
        printable(device.camera, 12),
        printable(device.status.agent, 12) if device.status else "",
    ]


def _name(device: DeviceState) -> str:
    """Site and device, at most `_MAX_NAME` long: the site is cut first."""
    name = printable(device.device, _MAX_NAME - 4)
    return f"{printable(device.site, _MAX_NAME - 1 - len(name))}/{name}"


def _sample_line(sample: Event) -> str:
    top = ", ".join(printable(f"{label} {p:.2f}") for label, p in list(sample.top.items())[:3])
    image = ", with image" if sample.image else ""
    return f"{printable(sample.device, 24)}: {sample.why}: {top or printable(sample.label)}{image}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@contextmanager
def _quit_key() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether q was pressed; restores the terminal afterwards."""
    if not sys.stdin.isatty():
        yield lambda: False
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)

    def pressed() -> bool:
        return bool(select.select([number], [], [], 0)[0]) and sys.stdin.read(1) in ("q", "Q")

    try:
        yield pressed
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
