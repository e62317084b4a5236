"""Progress bars with the remaining time, on standard error; occasional lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_MIN_WIDTH = 120

console = Console(stderr=True, highlight=False)

_LINE_SECONDS = 20.0
_Item = TypeVar("_Item")


class Meter:
    """A progress bar: `advance` after each step, with a short note."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.note = ""
        self._started = time.monotonic()
        self._first = done
        self._printed = self._started

    def advance(self, note: str | None = None) -> None:
        """Count one more step."""
        self.done += 1
        if note is not None:
            self.note = note
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS and self.done < self.total:
            self._printed = now
            left = (now - self._started) / (self.done - self._first) * (self.total - self.done)
            line = f"  {self.title}: {self.done}/{self.total}, {_clock(left)} left  {self.note}"
            console.print(line.rstrip(), soft_wrap=True)


class _BarMeter(Meter):
    def __init__(self, title: str, total: int, done: int, progress: Progress) -> None:
        super().__init__(title, total, done)
        self._progress = progress
        self._task = progress.add_task(title, total=total, completed=done, note="")

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, note=self.note)


@contextmanager
def meter(title: str, total: int, *, done: int = 0) -> Iterator[Meter]:
    """Show a bar for `total` steps, `done` of them before (of a resumed stage)."""
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
    """Print one line on standard error, above the bars."""
    console.print(text, soft_wrap=True)
    sys.stderr.flush()


def show(table: Table) -> None:
    """Print a table on standard output, at least 120 columns wide without a terminal."""
    out = Console(highlight=False)
    out.print(table) if out.is_terminal else Console(highlight=False, width=_MIN_WIDTH).print(table)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
