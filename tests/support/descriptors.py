"""Real standard streams in the test's own process: full, closed, or in another encoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

FULL = Path("/dev/full")


@contextmanager
def descriptors(out: Path | None, err: Path | None, *, encoding: str = "utf-8") -> Iterator[None]:
    """Open the process's descriptors 1 and 2 on files, or close them (None), as Python finds them at its start."""
    places = (out, err)
    saved = {number: os.dup(number) for number in (0, 1, 2)}
    try:
        with ExitStack() as stack:
            for number, place, name in zip((1, 2), places, ("stdout", "stderr"), strict=True):
                if place is None:
                    os.close(number)
                    stream = None
                else:
                    opened = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(opened, number)
                    os.close(opened)
                    stream = stack.enter_context(open(number, "w", encoding=encoding, closefd=False))
                stack.enter_context(mock.patch.object(sys, name, stream))
            yield
    finally:
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)


def eyas(*arguments: object, out: Path | None, err: Path | None, encoding: str = "utf-8") -> int:
    """Run `eyas ARGUMENTS` on such streams and return its exit code."""
    from eyas_host.cli import app  # not for the device's tests

    with (
        descriptors(out, err, encoding=encoding),
        mock.patch.object(sys, "argv", ["eyas", *map(str, arguments)]),
        mock.patch.object(sys, "excepthook", sys.excepthook),  # typer sets its own
    ):
        try:
            app.main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
    return 0
