"""What became of a command, for people: a line for each device, and the doctor's table below it.

Everything that a device wrote is cleaned and cut: it may be wrong, large or hostile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import msgspec

from eyas_device.doctor import CheckResult
from eyas_device.support.logs import clean
from eyas_host.fleet.commands.send import Outcome
from eyas_host.fleet.status import utc

_MAX_DETAIL = 500
_MAX_ROWS = 100
_LABELS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "not checked"}
_Word = Annotated[str, msgspec.Meta(max_length=64)]
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Number = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class _Pause(msgspec.Struct):
    until: _Time


class _Thresholds(msgspec.Struct):
    before: _Number
    threshold: _Number
    until: _Time


class _Measured(msgspec.Struct):
    runtime: _Word
    artefact: _Word
    threads: _Number
    p50_ms: _Number | None = None
    p99_ms: _Number | None = None
    frames_per_second: _Number | None = None


class _Bench(msgspec.Struct):
    measured: Annotated[list[_Measured], msgspec.Meta(max_length=_MAX_ROWS)] = []


class _Row(msgspec.Struct):
    check: _Word
    status: str
    finding: str = ""
    fix: str = ""


class _Doctor(msgspec.Struct):
    checks: Annotated[list[_Row], msgspec.Meta(min_length=1, max_length=_MAX_ROWS)]


def summary(outcome: Outcome) -> str:
    """What became of it, in one line without the device's name."""
    if outcome.state != "executed":
        return clean(outcome.detail, _MAX_DETAIL)
    describe = _SUMMARIES.get(outcome.command)
    try:
        text = describe(outcome) if describe is not None else ""
    except msgspec.ValidationError:
        text = "its answer is of another version; --json shows it"
    return clean(text, _MAX_DETAIL)


def findings(outcome: Outcome) -> Iterator[CheckResult]:
    """Rows of the doctor's table."""
    if outcome.command != "doctor" or outcome.state != "executed":
        return
    try:
        rows = _read(outcome.data, _Doctor).checks
    except msgspec.ValidationError:
        return
    for row in rows:
        yield CheckResult(
            clean(row.check), _status(row.status), clean(row.finding, _MAX_DETAIL), clean(row.fix, _MAX_DETAIL), 0.0
        )


def _read(data: Mapping[str, Any], kind: type[Any]) -> Any:
    return msgspec.convert(dict(data), kind)


def _status(word: str) -> Any:
    return word if word in _LABELS else "grey"


def _pause(outcome: Outcome) -> str:
    return f"paused until {utc(_read(outcome.data, _Pause).until)}"


def _thresholds(outcome: Outcome) -> str:
    data = _read(outcome.data, _Thresholds)
    return f"threshold {data.threshold:g} instead of {data.before:g}, until {utc(data.until)}"


def _snapshot(outcome: Outcome) -> str:
    event = outcome.event
    if event is None:
        return ""
    return f"{event.label} {event.confidence:.2f}"


def _bench(outcome: Outcome) -> str:
    rows = _read(outcome.data, _Bench).measured
    return "; ".join(_measured(row) for row in rows) or "its profile was sent to the collector"


def _measured(row: _Measured) -> str:
    name = f"{row.runtime} {row.artefact}, {row.threads:g} thread{'' if row.threads == 1 else 's'}"
    figures = [
        f"{label} {value:.1f} {unit}"
        for label, value, unit in (("p50", row.p50_ms, "ms"), ("p99", row.p99_ms, "ms"))
        if value is not None
    ]
    if row.frames_per_second is not None:
        figures.append(f"{row.frames_per_second:.1f} frames/s")
    return ", ".join([name, *figures])


def _doctor(outcome: Outcome) -> str:
    counts = Counter(_status(row.status) for row in _read(outcome.data, _Doctor).checks)
    return ", ".join(f"{counts[status]} {label}" for status, label in _LABELS.items())


_SUMMARIES: Mapping[str, Callable[[Outcome], str]] = {
    "pause": _pause,
    "resume": lambda outcome: "runs",
    "set-thresholds": _thresholds,
    "snapshot": _snapshot,
    "bench": _bench,
    "doctor": _doctor,
}
