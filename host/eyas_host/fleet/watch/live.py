"""The live view of a fleet: needs read access to the broker, no store."""

from __future__ import annotations

import os
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
from rich.padding import Padding
from rich.text import Text

from eyas_device.support.logs import show
from eyas_device.support.streams import escape_json
from eyas_device.telemetry.messages import Event
from eyas_device.telemetry.mqtt_client import LinkStatus
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.store.validate import InvalidMessage, cleared_status, validate
from eyas_host.fleet.watch.fleet_state import Condition, DeviceState, FleetState
from eyas_host.fleet.watch.subscriber import Subscriber
from eyas_host.fleet.watch.table import layout, printable
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
    "rolled back": "yellow",
    "refused": "yellow",
}
_INDENT = "    "
_EVERYTHING = 1_000_000
"""Height where nothing scrolls away."""


def watch(access: BrokerAccess, *, seconds: float | None = None, console: Console | None = None) -> None:
    """Show the fleet until q or Ctrl-C, or for `seconds`; without a terminal, print one table at the end.

    Raises `LinkError` for an invalid address or invalid credentials, and `BrokerUnreachable` for a broker that was not
    reached within `seconds`.
    """
    console = console or _own_console()
    fleet, end = FleetState(), None if seconds is None else time.monotonic() + seconds
    with Subscriber(access) as subscriber, _quit_key() as quit_pressed:

        def screen(height: int) -> Group:
            return render(fleet, time.monotonic(), str(subscriber.status), width=console.width, height=height)

        ended = False
        with suppress(KeyboardInterrupt):
            if console.is_terminal:
                with Live(console=console, screen=True, auto_refresh=False) as live:
                    while not (ended := end is not None and time.monotonic() >= end) and not quit_pressed():
                        _update(fleet, subscriber)
                        live.update(screen(console.height), refresh=True)
            else:
                while not (ended := end is not None and time.monotonic() >= end):
                    _update(fleet, subscriber)
        if not console.is_terminal:
            console.print(screen(_EVERYTHING))
        if ended:
            _check_connected(subscriber, access)


def _own_console() -> Console:
    """A console that follows the size of its terminal; COLUMNS and LINES, which stay as they were, are for pipes."""
    if not sys.stdout.isatty():
        return Console()
    return Console(_environ={key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")})


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
                    out.write(escape_json(text.replace("\n", " "), out) + "\n")
            out.flush()
            if subscriber.status != status:
                status = subscriber.status
                show(f"eyas watch: {status}", log)
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
    blocks: list[tuple[DeviceState, str, str]] = []
    for device in devices:
        problems = printable("; ".join(device.problems(now)), 400)
        left -= 1 + _lines(len(problems), width - len(_INDENT))
        if left < 0:
            break
        blocks.append((device, problems, _COLOURS.get(device.condition(now), "")))
    heading, *lines = layout([device for device, _, _ in blocks], now, width)
    parts.append(Text(heading, "bold underline", no_wrap=True))
    for line, (_, problems, colour) in zip(lines, blocks, strict=True):
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


def _sample_line(sample: Event) -> str:
    top = ", ".join(printable(f"{label} {p:.2f}") for label, p in list(sample.top.items())[:3])
    image = ", with image" if sample.image else ""
    return f"{printable(sample.device, 24)}: {sample.why}: {top or printable(sample.label)}{image}"


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
