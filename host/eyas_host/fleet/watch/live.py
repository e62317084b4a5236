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
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eyas_device.telemetry.messages import Event, Window
from eyas_device.telemetry.mqtt_client import LinkStatus
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.store.validate import InvalidMessage, cleared_status, validate
from eyas_host.fleet.watch.fleet_state import Condition, DeviceState, FleetState
from eyas_host.fleet.watch.subscriber import Subscriber

_REFRESH_S = 0.5
_COLOURS: dict[Condition, str] = {
    "lost": "bold red",
    "silent": "red",
    "camera": "red",
    "offline": "yellow",
    "ood": "yellow",
}
_TEXT_COLUMNS = ("device", "state", "model", "camera")
_NUMBER_COLUMNS = ("fps", "p50 ms", "p99 ms", "confidence", "uncertain", "dropped", "°C", "last seen")


def watch(access: BrokerAccess, *, seconds: float | None = None, console: Console | None = None) -> None:
    """Show the fleet until q or Ctrl-C, or for `seconds`; without a terminal, print one table at the end.

    Raises `LinkError` for an invalid address or invalid credentials.
    """
    console = console or Console()
    fleet, end = FleetState(), None if seconds is None else time.monotonic() + seconds
    with Subscriber(access) as subscriber, _quit_key() as quit_pressed, suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while end is None or time.monotonic() < end:
                _update(fleet, subscriber)
            console.print(render(fleet, time.monotonic(), str(subscriber.status)))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while (end is None or time.monotonic() < end) and not quit_pressed():
                _update(fleet, subscriber)
                screen = render(fleet, time.monotonic(), str(subscriber.status), height=console.height)
                live.update(screen, refresh=True)


def stream(access: BrokerAccess, out: TextIO, *, seconds: float | None = None, log: TextIO = sys.stderr) -> None:
    """Write each valid message to `out` as one line of JSON, until Ctrl-C or for `seconds`.

    Changes of the connection's state go to `log`. Raises `LinkError` for an invalid address or invalid credentials,
    `BrokenPipeError` if the reader of `out` goes away.
    """
    end = None if seconds is None else time.monotonic() + seconds
    status: LinkStatus | None = None
    with Subscriber(access) as subscriber, suppress(KeyboardInterrupt):
        while end is None or time.monotonic() < end:
            for received in subscriber.take(_REFRESH_S):
                message = validate(received.topic, received.payload)
                if not isinstance(message, InvalidMessage):
                    head = {"topic": received.topic, "kind": message.kind, "site": message.id.site}
                    line = {**head, "retained": received.retained, "message": msgspec.Raw(message.payload.encode())}
                    # Compact the payload: JSON that was sent over several lines has to fit one.
                    out.write(msgspec.json.format(msgspec.json.encode(line), indent=-1).decode() + "\n")
            out.flush()
            if subscriber.status != status:
                status = subscriber.status
                print(f"eyas watch: {status}", file=log)


def render(fleet: FleetState, now: float, connection: str, *, height: int = 200) -> Group:
    """Draw the screen: a summary, the devices, the latest hard samples. Text from the network is never markup."""
    summary = ", ".join(f"{count} {name}" for name, count in fleet.summary(now).items()) or "no devices yet"
    invalid = f"   {fleet.invalid} invalid messages" if fleet.invalid else ""
    parts: list[RenderableType] = [Text(f"{printable(connection, 100)}   {summary}{invalid}", "bold")]
    table = Table(expand=True)
    for name in _TEXT_COLUMNS:
        table.add_column(name, no_wrap=True)
    for name in _NUMBER_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    devices = fleet.devices(now)
    max_rows = max(3, height - 8 - len(fleet.samples))
    for device in devices[:max_rows]:
        table.add_row(*(Text(cell, _COLOURS.get(device.condition(now), "")) for cell in _cells(device, now)))
    parts.append(table)
    if len(devices) > max_rows:
        parts.append(Text(f"and {len(devices) - max_rows} more", "dim"))
    parts += [Text(_sample_line(sample), "dim") for sample in fleet.samples]
    return Group(*parts)


def printable(text: str, max_length: int = 40) -> str:
    """Make text from the network safe to print: one line, printable characters, bounded length."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 1] + "…"


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


def _cells(device: DeviceState, now: float) -> tuple[str, ...]:
    window = device.window or Window()
    temperature = _number(window.temperature_c, ".0f")
    return (
        f"{printable(device.site, 16)}/{printable(device.device, 24)}",
        device.condition(now),
        printable(device.model, 24),
        printable(device.camera, 12),
        _number(device.fps, ".1f"),
        _number(window.latency_ms.get("p50"), ".1f"),
        _number(window.latency_ms.get("p99"), ".1f"),
        _number(device.confidence, ".2f"),
        _number(device.uncertain, ".0%"),
        str(window.dropped) if device.window else "",
        temperature + ("!" if window.throttled else ""),
        f"{now - device.last_seen:.0f} s" if device.last_seen else "",
    )


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
