"""On a terminal the doctor shows which check it waits for."""

from __future__ import annotations

import io

from eyas_device.doctor import Context, Finding, examine, running_check
from eyas_device.doctor.finding import green
from tests.support.doctor_parts import context


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def slow(context: Context) -> Finding:
    return green("done")


def shown(stream: io.StringIO) -> str:
    with running_check(stream) as running:
        for _ in examine(context(), (slow,), on_start=running):
            running("")
    return stream.getvalue()


def test_the_running_check_is_shown_and_removed() -> None:
    clear = "\r\x1b[K"
    assert shown(Terminal()) == f"{clear}checking slow ...{clear}{clear}"


def test_a_pipe_gets_nothing() -> None:
    assert shown(io.StringIO()) == ""
