"""Logging of the agent: journal priorities or time stamps, no secrets, and repetitions folded into counts.

Every module logs with `logging.getLogger(__name__)`. Levels: error needs people, warning is a degraded state, info is a
change of state (rare), debug is everything else.

    logger.warning("camera lost: %s", reason)
    logger.info("%s was selected", model, extra=KEEP)  # its numbers are its point

A camera writes on an SD card and may be broken for months. So a message that says the same as before, whatever numbers
it carries, is written at once the first time and then as a count at growing intervals, up to an hour; and all messages
together have a budget of about 200 lines a day. At the level debug nothing is folded: somebody is looking.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from eyas_device.support.names import LOG_LEVELS
from eyas_device.support.redact import redact

ENVIRONMENT = "EYAS_LOG"
"""Environment variable with a level; the command line overrides it, and it overrides the configuration."""
KEEP: Mapping[str, object] = {"fold": False}
"""`extra` of a message that is written each time it occurs, because people caused it: a command, another model."""
MAX_QUIET_S = 3600.0
"""Longest time between two counts of the same message."""

_FIRST_QUIET_S = 60.0
_LOOK_S = 1.0
_FORGET_S = 2 * MAX_QUIET_S
_MAX_KEYS = 256
_MAX_KEY_CHARS = 200
_MAX_CHARS = 2000
_MAX_SHOWN_CHARS = 1_000_000
_MAX_WARNINGS = 10
_NUMBER = re.compile(r"\b[^\W\d]*\d\w*|\b[a-f]{8,}\b", re.IGNORECASE)
_NUMBERS = re.compile(r"#(?:[-+.,:x/]*#)+")
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def clean(text: str, max_chars: int = _MAX_CHARS) -> str:
    """Return `text` as one line without secrets; control and other invisible characters are escaped.

    >>> clean("camera rtsp://admin:S3cret@10.0.0.7/live:\\x1b[2J no route")
    'camera rtsp://***@10.0.0.7/live:\\\\x1b[2J no route'
    """
    text = redact(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c in "\n\t" else _escape(c) for c in text)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def normalise(text: str) -> str:
    """Return what stays the same when a message occurs again: words with a digit, and hexadecimal ones, become `#`.

    >>> normalise("frame 1042: damaged JPEG of 8,193 bytes at 0x7f3a, 3.5 s")
    'frame #: damaged JPEG of # bytes at #, # s'
    """
    return _NUMBERS.sub("#", _NUMBER.sub("#", text[:_MAX_CHARS]))[:_MAX_KEY_CHARS]


class Repeated:
    """A message that occurred, perhaps again and again."""

    def __init__(self, level: int, text: str, now: float) -> None:
        self.level, self.text = level, text
        self.count = 0
        """Occurrences."""
        self.time = time.time()
        """Last occurrence, seconds since 1970."""
        self.quiet_s = _FIRST_QUIET_S
        self.written = self.seen = now
        self.held_back = 0
        """Occurrences since it was written."""

    @property
    def level_name(self) -> str:
        """Name of its level, e.g. `warning`."""
        return str(logging.getLevelName(self.level)).lower()

    def occurred(self, text: str, now: float, times: int) -> None:
        """Count an occurrence, or several."""
        self.text, self.seen, self.time = text, now, time.time()
        self.count += times

    def write(self, now: float) -> str:
        """Return the line to write now, with the count of what was held back; the next one comes later."""
        span = duration(now - self.written)
        more = f" ({self.held_back:,} more in the last {span})" if self.held_back else ""
        self.held_back, self.written = 0, now
        self.quiet_s = min(2 * self.quiet_s, MAX_QUIET_S)
        return self.text + more


class Fold:
    """Decides which messages are written: each at once, its repetitions as counts at growing intervals."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._messages: OrderedDict[tuple[str, int, str], Repeated] = OrderedDict()
        self._looked = -math.inf

    def add(self, source: str, level: int, text: str, times: int = 1) -> str | None:
        """Count a message that occurred, perhaps several `times`; return the line to write, None for nothing."""
        now = self._clock()
        key = (source, level, normalise(text))
        message = self._messages.get(key)
        if message is None or now - message.seen > _FORGET_S:
            message = self._messages[key] = Repeated(level, text, now)
            message.occurred(text, now, times)
            message.held_back = times - 1
            self._messages.move_to_end(key)
            if len(self._messages) > _MAX_KEYS:
                self._messages.popitem(last=False)
            return text
        message.occurred(text, now, times)
        self._messages.move_to_end(key)
        if now - message.written >= message.quiet_s:
            message.held_back += times - 1
            return message.write(now)
        message.held_back += times
        return None

    def due(self, *, all_of_them: bool = False) -> list[tuple[int, str]]:
        """Level and line of each message whose repetitions were held back for long enough."""
        now = self._clock()
        if now - self._looked < _LOOK_S and not all_of_them:
            return []
        self._looked = now
        return [
            (message.level, message.write(now))
            for message in self._messages.values()
            if message.held_back and (all_of_them or now - message.written >= message.quiet_s)
        ]

    def warnings(self, limit: int = _MAX_WARNINGS) -> list[Repeated]:
        """The latest different messages of level warning and above, newest first."""
        found = [message for message in self._messages.values() if message.level >= logging.WARNING]
        return found[: -limit - 1 : -1]


class Budget:
    """Token bucket: `burst` lines at once, then one every `interval_s`."""

    def __init__(self, burst: int, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._interval_s, self._clock = float(burst), interval_s, clock
        self._tokens, self._at = self._burst, clock()

    def take(self) -> bool:
        """Whether a line may be written; it is counted then."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) / self._interval_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class LogHandler(logging.Handler):
    """Writes log lines on a stream. It never raises: a full disk or a closed terminal costs the line."""

    def __init__(
        self,
        stream: TextIO,
        *,
        journal: bool = False,
        folds: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write on `stream`, with the priorities of a `journal` or with time stamps; `folds` repeated messages."""
        super().__init__()
        self.start_of_line = ""
        """Written before each line; clears a live status line."""
        self.lines = 0
        """Lines that were written."""
        self.failed = 0
        """Lines that the stream did not take."""
        self._stream, self._journal, self._folds = stream, journal, folds
        self._fold = Fold(clock)
        self._budget, self._reserve = Budget(100, 900.0, clock), Budget(200, 60.0, clock)
        self._over_budget = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless it is folded."""
        try:
            lines = [clean(record.getMessage())]
        except (TypeError, ValueError):  # arguments that do not fit
            lines = [clean(str(record.msg))]
        if record.exc_info and record.exc_info[1] is not None:
            trace = redact(logging.Formatter().formatException(record.exc_info))
            lines += [clean(f"| {line}") for line in trace.splitlines()]
        if record.levelno < logging.INFO:
            self._write(record.levelno, lines)
            return
        self._write_due()
        if not self._folds:
            self._fold.add(record.name, record.levelno, lines[0])
            self._write(record.levelno, lines)
            return
        if getattr(record, "fold", True):
            line = self._fold.add(record.name, record.levelno, lines[0], getattr(record, "times", 1))
            if line is None:
                return
            lines[0] = line
            budget = self._reserve if record.levelno >= logging.ERROR else self._budget
        else:
            budget = self._reserve
        self._write_within(budget, record.levelno, lines)

    def tick(self) -> None:
        """Write the counts that are due; call it now and then."""
        with self.lock or threading.RLock():
            self._write_due()

    def close(self) -> None:
        """Write the counts that were held back, and take no more messages."""
        with self.lock or threading.RLock():
            self._write_due(all_of_them=True)
        root = logging.getLogger()
        if self in root.handlers:
            root.removeHandler(self)
            logging.getLogger("eyas_device").setLevel(logging.NOTSET)
            sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
            logging.captureWarnings(False)
        super().close()

    def warnings(self) -> list[Repeated]:
        """The latest different warnings and errors, newest first."""
        with self.lock or threading.RLock():
            return self._fold.warnings()

    def _write_due(self, *, all_of_them: bool = False) -> None:
        if not self._folds:
            return
        for level, line in self._fold.due(all_of_them=all_of_them):
            self._write_within(self._budget, level, [line])

    def _write_within(self, budget: Budget, level: int, lines: list[str]) -> None:
        if not budget.take():
            self._over_budget += 1
            return
        if self._over_budget:
            lines = [*lines, f"{self._over_budget:,} further log messages were left out: too many in a short time"]
            self._over_budget = 0
        self._write(level, lines)

    def _write(self, level: int, lines: list[str]) -> None:
        if self._journal:
            start = priority(level)
        else:
            start = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {logging.getLevelName(level).lower():7} "
        try:
            self._stream.write(self.start_of_line + "".join(f"{start}{line}\n" for line in lines))
            self._stream.flush()
            self.lines += len(lines)
        except (OSError, ValueError):  # ValueError: closed, or a character that the encoding lacks
            self.failed += len(lines)


def set_up(level: str = "info", stream: TextIO | None = None) -> LogHandler:
    """Send all log messages to `stream` (default: standard error), those of libraries from warning on.

    Uncaught errors and Python's warnings become log messages too, so that nothing is written unredacted.
    """
    stream = sys.stderr if stream is None else stream
    close()
    root = logging.getLogger()
    handler = LogHandler(stream, journal=is_journal(stream), folds=level != "debug")
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("eyas_device").setLevel(level.upper())
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    return handler


def close() -> None:
    """Close the log that is set up, if there is one: `set_up` may have been called again since it was first."""
    for handler in [handler for handler in logging.getLogger().handlers if isinstance(handler, LogHandler)]:
        handler.close()


def log_defect() -> None:
    """Log the exception that is being handled, with its traceback, although a verb may have closed its log already."""
    handler = set_up("warning")
    logging.getLogger("eyas_device").critical("unexpected error", exc_info=True, extra=KEEP)
    handler.close()


def choose_level(argument: str | None, configured: str) -> str:
    """The level of the command line, else of `$EYAS_LOG`, else of the configuration."""
    environment = os.environ.get(ENVIRONMENT, "").lower()
    return argument or (environment if environment in LOG_LEVELS else "") or configured


def priority(level: int) -> str:
    """Prefix by which the journal knows the priority of a line: see sd-daemon(3)."""
    return f"<{_PRIORITIES.get(level, 5)}>"


def print_error(text: str) -> None:
    """Print an error that ends the program on standard error, like a log message but without a time stamp."""
    start = priority(logging.ERROR) if is_journal(sys.stderr) else ""
    for line in redact(text).splitlines():
        print(start + clean(line), file=sys.stderr)


def show(line: str, stream: TextIO | None = None) -> None:
    """Print a line of a verb's result, cleaned like a log message: names, labels and paths may come from anywhere."""
    print(clean(line, _MAX_SHOWN_CHARS), file=stream or sys.stdout, flush=True)


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the stream is connected to systemd's journal, as systemd.exec(5) tells to find out."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: Any) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger("eyas_device").critical("uncaught error", exc_info=(kind, error, traceback), extra=KEEP)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def duration(seconds: float) -> str:
    """A duration for people, rounded to the unit that reads best."""
    if not math.isfinite(seconds) or seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
