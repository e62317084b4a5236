"""A live view of a fleet, from the broker alone: whoever may read there may watch, and no store is needed."""

from __future__ import annotations

import queue
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO
from uuid import uuid4

import msgspec
from paho.mqtt.client import Client
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import KINDS, Event, Window
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session
from eyas_host.fleet.broker.client import Access, why
from eyas_host.fleet.store.checked import Poison, check
from eyas_host.fleet.watch.seen import Line, Seen, joined, plain

_CONNACK_S = 5.0
_RECONNECT_S = (1, 15)
_WAITING = 20_000
"""Messages that wait to be shown at most; more are counted and passed over: a view loses nothing that matters."""
_REFRESH_S = 0.5
_COLOURS = {"lost": "bold red", "silent": "red", "camera": "red", "offline": "yellow", "ood": "yellow"}


class Arrived(msgspec.Struct, frozen=True):
    """One message as it came."""

    topic: str
    payload: bytes
    kept: bool
    """Whether the broker had kept it from before."""


class Tap(Closing):
    """Everything that a fleet says. Never stops trying to connect; `status` is the state of the connection.

    Raises `LinkError` for mistaken credentials or addresses.
    """

    def __init__(self, access: Access) -> None:
        self.status = LinkStatus()
        self.missed = 0
        self._access = access
        self._queue: queue.Queue[Arrived] = queue.Queue(_WAITING)
        self._connector = Connector(access.address, Session(client_id=f"eyas-watch-{uuid4().hex[:12]}"))
        self._restart = False
        self._client = self._start()

    def take(self, timeout: float) -> Iterator[Arrived]:
        """What arrived, after waiting at most `timeout` seconds for the first."""
        connecting = self.status.state is LinkState.CONNECTING
        if connecting and time.monotonic() - self._started > _CONNACK_S:
            self._connector.switch_version()
            self._restart = True
        if self._restart:
            self._restart, self.status = False, LinkStatus()
            self._stop()
            self._client = self._start()
        with suppress(queue.Empty):
            yield self._queue.get(timeout=timeout)
            for _ in range(_WAITING):
                yield self._queue.get_nowait()

    def close(self) -> None:
        """Disconnect."""
        self._stop()

    def _start(self) -> Client:
        self._started = time.monotonic()
        client = self._connector.make_client()
        self._access.apply(client)
        client.reconnect_delay_set(*_RECONNECT_S)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        self._connector.connect_async(client)
        client.loop_start()
        return client

    def _stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.status = LinkStatus(LinkState.REFUSED, str(reason))
            self._restart = self._connector.switch_if_unsupported(reason)
            return
        client.subscribe([(f"eyas/+/+/{kind}", 0) for kind in KINDS])

    def _on_connect_fail(self, client: Client, userdata: object) -> None:
        error = sys.exc_info()[1]
        reason = why(error) if error else "the broker cannot be reached"
        self.status = LinkStatus(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if self.status.state is not LinkState.REFUSED:
            self.status = LinkStatus(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        self.status = (
            LinkStatus(LinkState.SUBSCRIPTION_REFUSED, refused[0]) if refused else LinkStatus(LinkState.CONNECTED)
        )

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        try:
            self._queue.put_nowait(Arrived(message.topic, message.payload, bool(message.retain)))
        except queue.Full:
            self.missed += 1


def watch(access: Access, *, seconds: float | None = None, console: Console | None = None) -> None:
    """Show the fleet until q or Ctrl-C is pressed, or for so many seconds; without a terminal, a table at the end.

    Raises `LinkError`.
    """
    console = console or Console()
    seen, end = Seen(), None if seconds is None else time.monotonic() + seconds
    with Tap(access) as tap, _keys() as pressed, suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while end is None or time.monotonic() < end:
                _absorb(tap, seen)
            console.print(view(seen, time.monotonic(), str(tap.status)))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while (end is None or time.monotonic() < end) and not pressed():
                _absorb(tap, seen)
                live.update(view(seen, time.monotonic(), str(tap.status), height=console.height), refresh=True)


def stream(access: Access, out: TextIO, *, seconds: float | None = None, people: TextIO = sys.stderr) -> None:
    """Write one JSON object a message to `out` until Ctrl-C, or for so many seconds. What is no message is left out.

    Raises `LinkError`; a reader that goes away ends it with `BrokenPipeError`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    status: LinkStatus | None = None
    with Tap(access) as tap, suppress(KeyboardInterrupt):
        while end is None or time.monotonic() < end:
            for arrived in tap.take(_REFRESH_S):
                verdict = check(arrived.topic, arrived.payload)
                if not isinstance(verdict, Poison):
                    head = {"topic": arrived.topic, "kind": verdict.kind, "site": verdict.address.site}
                    line = {**head, "retained": arrived.kept, "message": msgspec.Raw(verdict.payload.encode())}
                    # JSON text that was sent over several lines is still one line here.
                    out.write(msgspec.json.format(msgspec.json.encode(line), indent=-1).decode() + "\n")
            out.flush()
            if tap.status != status:
                status = tap.status
                print(f"eyas watch: {status}", file=people)


def view(seen: Seen, now: float, state: str, *, height: int = 200) -> Group:
    """The screen: a summary, the devices, the last hard samples. Nothing from the network is read as markup."""
    counted = ", ".join(f"{number} {name}" for name, number in seen.summary(now).items()) or "no devices yet"
    rest = f"   {seen.poison} unreadable messages" if seen.poison else ""
    head = Text(f"{plain(state, 100)}   {counted}{rest}", "bold")
    table = Table(expand=True)
    names = (
        "device",
        "state",
        "model",
        "camera",
        "fps",
        "p50 ms",
        "p99 ms",
        "confidence",
        "uncertain",
        "dropped",
        "°C",
    )
    for name in (*names, "heard"):
        table.add_column(name, justify="left" if name in names[:4] else "right", no_wrap=True)
    lines = seen.lines(now)
    room = max(3, height - 8 - len(seen.samples))
    for line in lines[:room]:
        table.add_row(*(Text(cell, _COLOURS.get(line.condition(now), "")) for cell in _cells(line, now)))
    parts: list[Any] = [head, table]
    if len(lines) > room:
        parts.append(Text(f"and {len(lines) - room} more", "dim"))
    parts += [Text(_sample(sample), "dim") for sample in seen.samples]
    return Group(*parts)


def _absorb(tap: Tap, seen: Seen) -> None:
    for arrived in tap.take(_REFRESH_S):
        verdict = check(arrived.topic, arrived.payload)
        if isinstance(verdict, Poison):
            seen.poison += 1
        else:
            seen.take(verdict, time.monotonic(), kept=arrived.kept)


def _cells(line: Line, now: float) -> tuple[str, ...]:
    window = line.window or Window()
    warm = "" if window.temperature_c is None else f"{window.temperature_c:.0f}"
    return (
        f"{plain(line.site, 16)}/{plain(line.device, 24)}",
        line.condition(now),
        plain(line.model, 24),
        plain(line.camera, 12),
        _number(line.fps, ".1f"),
        _number(window.latency_ms.get("p50"), ".1f"),
        _number(window.latency_ms.get("p99"), ".1f"),
        _number(line.confidence, ".2f"),
        _number(line.uncertain, ".0%"),
        str(window.dropped) if line.window else "",
        warm + ("!" if window.throttled else ""),
        f"{now - line.heard:.0f} s" if line.heard else "",
    )


def _sample(sample: Event) -> str:
    best = joined(f"{label} {share:.2f}" for label, share in list(sample.top.items())[:3])
    image = ", with image" if sample.image else ""
    return f"{plain(sample.device, 24)}: {sample.why}: {best or plain(sample.label)}{image}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that says whether q was pressed; the terminal is as it was afterwards."""
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
