"""Progress: one line for a chain, and what is ours is printed while libraries are silent."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.table import Table

from eyas_host.pipeline.clock import ChainClock, Step
from eyas_host.support import progress
from eyas_host.support.progress import meter, say, show, show_clock
from eyas_host.support.quiet import quiet_libraries, quiet_tools


@pytest.fixture
def clock() -> ChainClock:
    clock = ChainClock({"teach": (Step(600.0, "blocks"),)})
    clock.enter("teach")
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Standard error as a terminal of 60 columns."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=60, highlight=False))
    return stream


def test_without_a_terminal_a_line_comes_now_and_then(
    clock: ChainClock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.01)
    text, deadline = "", time.monotonic() + 30
    with show_clock(clock), meter("blocks", 40) as bar:
        bar.advance("loss [0.5]")
        while text.count("left in all") < 2:
            assert time.monotonic() < deadline
            text += capsys.readouterr().err
    assert "left in all; teach: blocks 1/40  loss [0.5]\n" in text
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "the chain has ended"


def test_a_child_process_writes_down_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [0, 0]
    monkeypatch.setattr(progress, "_relays", [])
    progress.relay(shared)
    with meter("blocks", 40, done=7) as bar:
        assert shared == [7, 40]
        bar.advance("loss 0.5")
        assert shared == [8, 40]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_status_line_and_lines_above_it(clock: ChainClock, terminal: io.StringIO) -> None:
    with show_clock(clock), meter("blocks", 40) as bar:
        bar.advance("a note that is much longer than the line of a terminal, and of no great importance")
        say("split   done")
    shown = terminal.getvalue()
    assert "teach: blocks" in shown and "left in all" in shown and "split   done\n" in shown
    assert "importance" not in shown, "one line, cut at the terminal's width"
    assert shown.endswith(("\x1b[2K", "\x1b[?25h", "\r")), "the status line is gone at the end"


def test_a_table_goes_to_standard_output_whatever_the_status_line(
    clock: ChainClock, terminal: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("figure")
    table.add_row("0.871")
    with show_clock(clock):
        show(table)
    assert "0.871" in capsys.readouterr().out and "0.871" not in terminal.getvalue()


def test_libraries_are_silent_and_our_lines_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_tools():
        print("a pass of a converter")
        print("a deprecation", file=sys.stderr)
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        warnings.warn("old", FutureWarning, stacklevel=1)
        say("ours")
    os.write(2, b"after\n")
    say("ours again")
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.split("\n")) == ["", "after", "ours", "ours again"]


def test_nncf_says_nothing_below_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    quiet_libraries()
    from nncf.common.logging import nncf_logger  # sets its own level

    nncf_logger.info("Compiling and loading torch extension")
    nncf_logger.error("broken")
    assert "Compiling" not in "".join(capfd.readouterr())
