"""Progress on standard error: one status line on a terminal, an occasional line without one.

A chain of stages sets a `Clock`, which knows the time left for all of it; a meter outside a chain shows its own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol, TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eyas_device.support.logs import clean

_MIN_WIDTH = 120
_UNLIMITED = 10_000
_MAX_LINE = 20_000

console = Console(stderr=True, highlight=False)

_LINE_SECONDS = 30.0
_Item = TypeVar("_Item")


class Meter:
    """The progress of one loop: `advance` after each step, with a short note."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.note = ""
        self.first = done
        self.started = time.monotonic()
        self._printed = self.started

    def advance(self, note: str | None = None) -> None:
        """Count one more step."""
        self.reach(self.done + 1, note)

    def reach(self, done: int, note: str | None = None) -> None:
        """Show that so many steps are done."""
        self.done = done
        if note is not None:
            self.note = note
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS and self.done < self.total:
            self._printed = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            console.print(f"  {self.title}: {self.done}/{self.total}, {clock(left)} left  {self.note}".rstrip())


class Clock(Protocol):
    """What a chain of stages knows about its time."""

    def follow(self, meter: Meter | None) -> None:
        """A loop begins; None: the last one has ended."""

    def line(self) -> str:
        """The time left for the whole chain, the stage and its loop."""


class _ClockMeter(Meter):
    def _show(self) -> None:
        """The chain's clock shows it."""


class _RelayedMeter(Meter):
    def _show(self) -> None:
        _relays[-1][:] = [self.done, self.total]


class _BarMeter(Meter):
    def __init__(self, title: str, total: int, done: int, progress: Progress) -> None:
        super().__init__(title, total, done)
        self._progress = progress
        self._task = progress.add_task(title, total=total, completed=done, note="")

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, note=self.note)


_clocks: list[Clock] = []
"""The clock of the chain that runs in this process, if any."""
_relays: list[MutableSequence[int]] = []
"""Where this process, a child, writes what is done and the total, for its parent to show."""
_lives: list[Live] = []
"""Its status line, on a terminal."""


@contextmanager
def show_clock(chain: Clock) -> Iterator[None]:
    """Show a chain's time while the block runs: a status line on a terminal, else a line every half minute."""
    _clocks.append(chain)
    try:
        with _status_line(chain) if console.is_terminal else _regular_lines(chain):
            yield
    finally:
        _clocks.pop()


@contextmanager
def _status_line(chain: Clock) -> Iterator[None]:
    class _Line:
        spinner = Spinner("dots")

        def __rich__(self) -> Spinner:
            text = Text(chain.line())
            text.truncate(console.width - 3, overflow="ellipsis")
            self.spinner.update(text=text)
            return self.spinner

    with Live(
        _Line(), console=console, transient=True, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
    ) as live:
        _lives.append(live)
        try:
            yield
        finally:
            _lives.pop()


@contextmanager
def _regular_lines(chain: Clock) -> Iterator[None]:
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(_LINE_SECONDS):
            say(f"  {escape(chain.line())}")

    thread = threading.Thread(target=report, name="time-left", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def relay(done_and_total: MutableSequence[int]) -> None:
    """From now on meters of this process show nothing, but write what is done and the total into a shared array."""
    _relays.append(done_and_total)


@contextmanager
def meter(title: str, total: int, *, done: int = 0) -> Iterator[Meter]:
    """Show `total` steps, `done` of them before (of a resumed stage): in the chain's status line, else as a bar."""
    if _relays:
        relayed = _RelayedMeter(title, total, done)
        relayed.reach(done)
        yield relayed
        return
    if _clocks:
        chain, followed = _clocks[-1], _ClockMeter(title, total, done)
        chain.follow(followed)
        try:
            yield followed
        finally:
            chain.follow(None)
        return
    if not console.is_terminal:
        yield Meter(title, total, done)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _BarMeter(title, total, done, progress)


def track(items: Sequence[_Item], title: str) -> Iterable[_Item]:
    """Iterate over `items` with a bar."""
    with meter(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def warn(line: str) -> None:
    """Print a warning without interpreting markup."""
    say(f"  [yellow]{escape(line)}[/yellow]")


def say(text: str) -> None:
    """Print one line on standard error, above the status line; control characters in names of files are escaped."""
    if not text.isprintable():
        text = "\n".join(clean(line, _MAX_LINE) for line in text.split("\n"))
    console.print(text, soft_wrap=True)
    sys.stderr.flush()


def show(table: Table) -> None:
    """Print a table on standard output, at least 120 columns wide without a terminal. Cells are never markup.

    A terminal that is too narrow for it gets a line for each cell instead.
    """
    out = Console(highlight=False, markup=False)
    with _without_status_line():
        if not out.is_terminal:
            Console(highlight=False, markup=False, width=_MIN_WIDTH).print(table)
        elif _width(out, table) <= out.width:
            out.print(table)
        else:
            _show_rows(out, table)


def _width(out: Console, table: Table) -> int:
    """The width that a table has where there is room."""
    return Measurement.get(out, out.options.update_width(_UNLIMITED), table).maximum


def _show_rows(out: Console, table: Table) -> None:
    """Print each row of a table as lines of title and value."""
    titles = [str(column.header) for column in table.columns]
    for text in (table.title, table.caption):
        if text:
            out.print(text, soft_wrap=True)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = (f"{title}: {value}" for title, value in zip(titles, row, strict=True) if str(value))
        out.print(f"- {first}", *(f"  {line}" for line in others), sep="\n", soft_wrap=True)


@contextmanager
def _without_status_line() -> Iterator[None]:
    for live in _lives:
        live.stop()
    yield
    for live in _lives:
        live.start()


@contextmanager
def keep_printing() -> Iterator[None]:
    """Print to today's standard error while the block redirects it, in Python or below."""
    stream = sys.stderr
    with ExitStack() as stack:
        with suppress(OSError, ValueError):  # a closed stream, or a test's
            stream = stack.enter_context(os.fdopen(os.dup(stream.fileno()), "w", encoding="utf-8", errors="replace"))
        console.file = stream
        try:
            yield
        finally:
            console._file = None


def clock(seconds: float) -> str:
    """`3:20`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def about(seconds: float) -> str:
    """A duration as an estimate: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 55:
        return f"{max(1, round(seconds, -1 if seconds > 15 else 0)):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
