"""Progress bars with the time left, on standard error; a line now and then where there is no terminal."""

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

_NARROWEST = 120

console = Console(stderr=True, highlight=False)

_LINE_SECONDS = 20.0
_Item = TypeVar("_Item")


class Meter:
    """One running bar: `advance` after each step, with a few words about how it goes."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.words = ""
        self._started = time.monotonic()
        self._first = done
        self._said = self._started

    def advance(self, words: str | None = None) -> None:
        """One more step is done."""
        self.done += 1
        if words is not None:
            self.words = words
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._said >= _LINE_SECONDS and self.done < self.total:
            self._said = now
            left = (now - self._started) / (self.done - self._first) * (self.total - self.done)
            line = f"  {self.title}: {self.done}/{self.total}, {_clock(left)} left  {self.words}"
            console.print(line.rstrip(), soft_wrap=True)


class _BarMeter(Meter):
    def __init__(self, title: str, total: int, done: int, progress: Progress) -> None:
        super().__init__(title, total, done)
        self._progress = progress
        self._task = progress.add_task(title, total=total, completed=done, words="")

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, words=self.words)


@contextmanager
def meter(title: str, total: int, *, done: int = 0) -> Iterator[Meter]:
    """A bar for `total` steps, of which `done` were made before (a resumed stage)."""
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
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _BarMeter(title, total, done, progress)


def track(items: Sequence[_Item], title: str) -> Iterable[_Item]:
    """Iterate with a bar."""
    with meter(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def warn(line: str) -> None:
    """Print a line that deserves a look, as it is."""
    say(f"  [yellow]{escape(line)}[/yellow]")


def say(text: str) -> None:
    """One line for the user, beside the bars."""
    console.print(text, soft_wrap=True)
    sys.stderr.flush()


def show(table: Table) -> None:
    """A table on standard output, wide enough to be read where there is no terminal."""
    out = Console(highlight=False)
    out.print(table) if out.is_terminal else Console(highlight=False, width=_NARROWEST).print(table)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
