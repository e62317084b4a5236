"""Logging: redacted single lines with journal priorities or time stamps, and repetitions that become counts."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eyas_device.cli import main
from eyas_device.support import logs
from eyas_device.support.logs import KEEP, LogHandler, clean, normalise

DAY_S = 86400


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> tuple[logging.Logger, io.StringIO, LogHandler]:
    """A logger, where it writes, and its handler."""
    stream = io.StringIO()
    logger, handler = logging.Logger("alone"), LogHandler(stream, clock=clock)
    logger.addHandler(handler)
    return logger, stream, handler


def texts(stream: io.StringIO) -> list[str]:
    """The lines without their time stamps and levels."""
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+ +", "", line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("first\nsecond", "first second"),
        ("\x1b[2J\x07 red \x1b[31m", r"\x1b[2J\x07 red \x1b[31m"),
        ("name \u202egnp.exe", r"name \u202egnp.exe"),  # turns the direction of what follows
        ("file \udcfc.png", r"file \udcfc.png"),
        ("line\u2028separator \x85", r"line\u2028separator \x85"),
        ("猫 Ä", "猫 Ä"),
        ("rtsp://admin:S3cret@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("x" * 5000, "x" * 1999 + "…"),
    ],
)
def test_foreign_text_is_one_visible_line(text: str, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("frame 7: black", "frame 1000123: black"),
        ("read 8,193 bytes at 0x7f3a", "read 12 bytes at 0xdeadbeef"),
        ("no answer from 10.0.0.7:554 in 3.5 s", "no answer from 192.168.178.21:8554 in 12 s"),
        ("packet 9f86d081884c7d65 lost", "packet 2c26b46b68ffc68f lost"),
        ("spool 3f2504e0-4f89-11d3-9a0c-0305e82c3301", "spool 00000000-0000-0000-0000-000000000000"),
    ],
)
def test_texts_that_differ_in_numbers_are_the_same(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"), [("face lost", "bad lost"), ("added", "dead"), ("no route", "no answer"), ("", "1")]
)
def test_texts_that_differ_in_words_do_not(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_an_error_every_few_seconds_is_written_at_once_and_then_counted(
    log: tuple[logging.Logger, io.StringIO, LogHandler], clock: Clock
) -> None:
    logger, stream, handler = log
    for number in range(DAY_S // 5):
        logger.error("frame %d: no answer within %.3f s", number, number / 7)
        clock.now += 5
    handler.close()
    lines = texts(stream)
    assert lines[0] == "frame 0: no answer within 0.000 s"
    assert 20 <= len(lines) <= 40
    counted = [int(m[1].replace(",", "")) for line in lines if (m := re.search(r"\(([\d,]+) more in the last", line))]
    assert len(counted) == len(lines) - 1
    assert 1 + sum(counted) == DAY_S // 5, "each occurrence is counted once"
    assert sorted(counted[:-1]) == counted[:-1], "the intervals grow"
    assert max(counted) <= 3605 / 5


def test_an_error_every_other_minute_is_no_news_either(
    log: tuple[logging.Logger, io.StringIO, LogHandler], clock: Clock
) -> None:
    logger, stream, _ = log
    for _ in range(DAY_S // 70):
        logger.warning("camera lost")
        clock.now += 70  # longer than the first quiet time
    assert len(texts(stream)) <= 40


def test_what_did_not_occur_for_hours_is_news_again(
    log: tuple[logging.Logger, io.StringIO, LogHandler], clock: Clock
) -> None:
    logger, stream, _ = log
    logger.warning("camera lost")
    clock.now += 3 * 3600
    logger.warning("camera lost")
    clock.now += 1
    logger.warning("camera lost")
    assert texts(stream) == ["camera lost", "camera lost"]


def test_a_storm_that_ends_is_counted_by_the_next_tick(
    log: tuple[logging.Logger, io.StringIO, LogHandler], clock: Clock
) -> None:
    logger, stream, handler = log
    for number in range(10):
        logger.warning("skipped frame %d", number)
    clock.now += 30
    handler.tick()
    assert texts(stream) == ["skipped frame 0"]
    clock.now += 31
    handler.tick()
    handler.tick()
    assert texts(stream)[1:] == ["skipped frame 9 (9 more in the last 61 s)"]


def test_what_people_caused_is_never_folded(log: tuple[logging.Logger, io.StringIO, LogHandler]) -> None:
    logger, stream, _ = log
    for version in ("1.2.3", "2.0.0", "2.0.0"):
        logger.info("model %s", version, extra=KEEP)
    for attempts in range(3):
        logger.info("the output delivers again after %d attempts", attempts)
    assert texts(stream) == ["model 1.2.3", "model 2.0.0", "model 2.0.0", "the output delivers again after 0 attempts"]


def test_ever_new_texts_have_a_budget(log: tuple[logging.Logger, io.StringIO, LogHandler], clock: Clock) -> None:
    logger, stream, handler = log
    letters = "ghijklmnop"
    for number in range(DAY_S // 10):  # a camera's server that sends another reason each time
        logger.warning("refused: %s", "".join(letters[int(digit)] for digit in f"{number:06}"))
        clock.now += 10
    handler.close()
    lines = texts(stream)
    assert 100 <= len(lines) <= 400
    assert any("further log messages were left out" in line for line in lines)
    assert len(handler.warnings()) == 10


def test_debugging_shows_everything() -> None:
    stream = io.StringIO()
    logger, handler = logging.Logger("alone"), LogHandler(stream, folds=False)
    logger.addHandler(handler)
    for number in range(300):
        logger.debug("frames 1")
        logger.warning("camera lost %d", number)
        logger.info("camera delivering")
    handler.close()
    assert len(texts(stream)) == 900 and "more in the last" not in stream.getvalue()
    assert [(w.text, w.count) for w in handler.warnings()] == [("camera lost 299", 300)]


def test_the_last_warnings_are_known_with_their_counts(log: tuple[logging.Logger, io.StringIO, LogHandler]) -> None:
    logger, _, handler = log
    for number in range(5):
        logger.warning("camera lost %d", number)
    logger.info("camera delivering")
    logger.error("disk full")
    assert [(w.level_name, w.text, w.count) for w in handler.warnings()] == [
        ("error", "disk full", 1),
        ("warning", "camera lost 4", 5),
    ]


def test_no_log_message_can_end_the_program_or_forge_a_line(
    log: tuple[logging.Logger, io.StringIO, LogHandler],
) -> None:
    logger, stream, _ = log
    logger.warning("reason: %s", "gone\n<2>forged\r2026-01-01 00:00:00 error forged")
    logger.warning("wrong %d", "arguments")
    try:
        raise ValueError("rtsp://me:S3cret@h/\nlast line")
    except ValueError:
        logger.exception("it failed")
    lines = texts(stream)
    assert lines[0] == r"reason: gone <2>forged\r2026-01-01 00:00:00 error forged"
    assert lines[1] == "wrong %d"
    assert lines[2] == "it failed" and all(line.startswith("| ") for line in lines[3:])
    assert "S3cret" not in stream.getvalue() and "| ValueError: rtsp://***@h/" in lines


class Broken(io.StringIO):
    """A stream that fails as a full disk, a closed terminal and a poor character set do, in turn."""

    errors = (OSError(28, "No space left on device"), OSError(5, "Input/output error"), ValueError("closed"))

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise self.errors[self.calls % 3]


def test_a_stream_that_fails_costs_lines_only(clock: Clock) -> None:
    handler = LogHandler(Broken(), clock=clock)
    for number in range(4):
        handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, "abcd"[number], (), None))
    assert (handler.lines, handler.failed) == (0, 4)


_PROGRAM = """
import logging, threading
from eyas_device.cli import main
from eyas_device.support import logs
logs.set_up("info")
logger = logging.getLogger("eyas_device.x")
logger.debug("hidden"); logger.info("a change"); logger.warning("degraded"); logger.error("people")
logging.getLogger("some.library").info("hidden"); logging.getLogger("some.library").warning("a library")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
raise RuntimeError("http://me:S3cret@h/")
"""


def run_program(stderr: int, **environ: str) -> None:
    subprocess.run(
        [sys.executable, "-c", _PROGRAM], stderr=stderr, env={**os.environ, **environ}, timeout=60, check=False
    )


def test_the_journal_gets_priorities_and_uncaught_errors_too(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as stream:  # what systemd connects looks like this to a program
        status = os.fstat(stream.fileno())
        run_program(stream.fileno(), JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[:4] == ["<6>a change", "<4>degraded", "<3>people", "<4>a library"]
    assert lines[4] == "<2>uncaught error" and "<2>| ZeroDivisionError: division by zero" in lines
    assert lines[-1] == "<2>| RuntimeError: http://***@h/"


def test_a_file_gets_time_stamps_although_another_stream_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as stream:
        run_program(stream.fileno(), JOURNAL_STREAM="1:1")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info    a change", lines[0])
    assert "S3cret" not in " ".join(lines)


def test_the_level_of_the_command_line_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.ENVIRONMENT, "ERROR")
    assert logs.choose_level("debug", "info") == "debug"
    assert logs.choose_level(None, "info") == "error"
    monkeypatch.setenv(logs.ENVIRONMENT, "loud")
    assert logs.choose_level(None, "warning") == "warning"


def test_closing_gives_back_what_was_taken() -> None:
    before = sys.excepthook, threading.excepthook
    handler = logs.set_up("info", io.StringIO())
    assert sys.excepthook is not before[0]
    handler.close()
    assert (sys.excepthook, threading.excepthook) == (sys.__excepthook__, threading.__excepthook__)
    assert handler not in logging.getLogger().handlers


def test_a_verb_that_is_refused_gives_back_what_it_took() -> None:
    assert main(["run", "--bundle", "nowhere", "--camera", "v4l2:front"]) == 2
    assert sys.excepthook is sys.__excepthook__
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler, logs.LogHandler)]
