"""The collector's log: a line for each change and one a minute, with time stamps."""

from __future__ import annotations

import io
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from eyas_host.fleet.collect.log import CollectorLog
from eyas_host.fleet.collect.settings import CollectorReport
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, Sender, wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A log that gets a report every five seconds."""

    def __init__(self) -> None:
        self.clock, self._stream = Clock(), io.StringIO()
        self.log = CollectorLog(self._stream, clock=self.clock)

    def report(self, **fields: Any) -> None:
        self.clock.now += 5
        usual: dict[str, Any] = {"time": 0.0, "state": "connected", "messages": 0, "duplicates": 0, "quarantined": 0}
        usual |= {"detail": "", "store_error": "", "warning": "", "per_second": 0.0, "waiting": 0, "lag_s": 0.0}
        self.log.report(CollectorReport(**usual | fields))

    def lines(self) -> list[str]:
        lines = self._stream.getvalue().splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines), "each has its time"
        return [line[20:] for line in lines]


def test_a_line_a_minute_while_nothing_changes() -> None:
    log = Log()
    for number in range(1, 61):  # five minutes
        log.report(messages=100 * number, lag_s=0.3 if number == 20 else 0.01)
    lines = log.lines()
    assert len(lines) == 5
    assert lines[0] == "connected; 100 stored, 20/s, 0 duplicates, 0 quarantined, 0 waiting, lag 0.01 s"
    assert lines[2].startswith("connected; 2500 stored, 20/s, ") and lines[2].endswith("lag 0.30 s"), "the largest"


def test_what_changed_is_written_at_once_and_a_storm_is_not() -> None:
    log = Log()
    log.report()
    log.report(messages=9)
    log.report(messages=9, store_error="database is locked")
    log.report(messages=9)
    log.report(messages=9, quarantined=1)
    assert [line.split("; ")[-1] for line in log.lines()[1:2]] == ["nothing is acknowledged until it can"]
    assert len(log.lines()) == 4
    for number in range(720):  # an hour in which the connection comes and goes
        log.report(**({"state": "disconnected", "detail": f"attempt {number}"} if number % 2 else {"quarantined": 1}))
    lines = log.lines()
    assert 60 <= len(lines) - 4 <= 6 * 60
    per_minute = (len(lines) - 4) / 60
    assert per_minute <= 6, "at most five changes and the line of the minute"
    assert any("more changes before it" in line for line in lines)


def test_the_last_report_is_not_lost() -> None:
    log = Log()
    log.report()
    log.report(messages=7)
    log.log.close()
    log.log.close()
    assert [line.split("; ")[1].split(",")[0] for line in log.lines()] == ["0 stored", "7 stored"]


def test_what_comes_from_outside_stays_in_its_line() -> None:
    log = Log()
    log.report(detail="\x1b[2J\nx", state="disconnected")
    assert log.lines()[0].startswith("disconnected: \\x1b[2J x; ")


def test_the_command_line(tmp_path: Path) -> None:
    """Where it collects from and into what, that it is connected, and the last figures: nothing every five seconds."""
    processes, port = Processes(tmp_path), free_port()
    try:
        processes.broker(port)
        command = ["collect", "--broker", f"127.0.0.1:{port}", "--name", "a", "--store", f"sqlite:///{tmp_path}/f.db"]
        collector = processes.eyas(*command)
        log = tmp_path / "eyas.log"
        wait_until(lambda: "connected; 0 stored" in log.read_text(), 60, "the first line")
        sender = Sender(port)
        sender.windows(range(30))
        sender.acked(set(range(30)))
        with pytest.raises(AssertionError, match="in time"):
            wait_until(lambda: log.read_text().count("\n") > 2, 11, "a line")
        sender.close()
        collector.send_signal(signal.SIGTERM)
        assert collector.wait(30) == 0
        first, second, last = log.read_text().splitlines()
        start = f"collecting from 127.0.0.1:{port} into sqlite:///{tmp_path}/f.db, as a of the group eyas"
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", first) and first[20:] == start
        assert "connected; 0 stored" in second and "connected; 30 stored, " in last
    finally:
        processes.close()
