"""Times of a table's column: ISO 8601, the forms of spreadsheets and cameras, and numbers in whatever unit.

A column is read as a whole: it has one unit, one order of day and month, and either zones or none. What could be read
in two ways is refused.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal, NamedTuple

FORMS = "2026-11-30T14:05:00+01:00, or seconds since 1970"
"""What a time may look like, for messages."""

Axis = Literal["", "instants", "local", "order"]
"""What the times of a column lie on: instants (numbers and times with a zone), local time, an order alone (small
numbers); empty without times."""

EARLIEST = datetime(1980, 1, 1, tzinfo=UTC).timestamp()
"""Digital images are not older; also what cameras without a battery say."""
LATEST = datetime(2100, 1, 1, tzinfo=UTC).timestamp()
_DAY = 86_400.0
_EXCEL_EPOCH = 25_569.0
"""Serial number of 1970-01-01 in spreadsheets: days since 1899-12-30."""
_UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
_SPREADSHEET = "days since 1900 (a spreadsheet's date)"
_MISSING = frozenset({"", "nat", "nan", "na", "n/a", "#n/a", "none", "null", "<na>"})
_COARSE = 60.0
"""Seconds of resolution from which a rounded number is reported."""

_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d*)?(?:[eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:[.' \u00a0\u202f]\d{3}){2,}|\d{1,3}(?:['\u00a0\u202f ]\d{3})+")
_COMPACT = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAY = re.compile(r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,? +", re.IGNORECASE)
_CTIME = re.compile(r"([a-z]{3,9} +\d{1,2}) +([\d:.,]+) +(\d{4})", re.IGNORECASE)
_ZONE = re.compile(r"(?<=[\dmM.]) *(?:UTC|GMT|Z)?(?: *(?P<offset>[+-]\d\d(?::?\d\d)?))?(?: *[\[(][^\])]*[\])])?$")
_ZONE_NAME = re.compile(r":\d\d(?:[.,]\d+)? *(?:[ap]\.?m\.? +)?(?![ap]\.?m\.?$)[a-z]+(?:/[a-z_]+)*$", re.IGNORECASE)
_DATE = re.compile(
    r"(?:(?P<one>\d{1,4})(?P<mark>[-/.: ])(?P<two>\d{1,2})(?P=mark)(?P<three>\d{1,4})"
    r"|(?P<day>\d{1,2})(?:st|nd|rd|th)?[-/. ]+(?P<month>[a-z]{3,9})[-/.,]* *(?P<year>\d{4})"
    r"|(?P<month2>[a-z]{3,9})\.? +(?P<day2>\d{1,2})(?:st|nd|rd|th)?,? +(?P<year2>\d{4}))"
    r"(?:(?:T|,? +)(?P<clock>\S.*))?",
    re.IGNORECASE,
)
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)? *"
    r"(?:(?P<half>[ap])\.?m\.?)?",
    re.IGNORECASE,
)


class Times(NamedTuple):
    """A column of times."""

    seconds: list[float | None]
    """Since 1970 UTC, None for an empty cell; of no use where there are errors."""
    axis: Axis
    errors: Mapping[str, Sequence[int]]
    """What is wrong -> indices of the cells."""
    remarks: tuple[str, ...]
    """How the times were read, and what looks odd about them."""


class _Number(NamedTuple):
    value: float
    resolution: float
    """What its last digit counts."""


class _Date(NamedTuple):
    day_first: datetime | None
    month_first: datetime | None
    """The two readings, equal for most; None if there is no such date."""
    has_clock: bool

    @property
    def zoned(self) -> bool:
        """Whether it says its zone."""
        either = self.day_first or self.month_first
        return either is not None and either.tzinfo is not None


class _Column(NamedTuple):
    seconds: dict[int, float]
    """Index of a cell -> seconds since 1970 UTC."""
    how: str
    """In which form they were read."""
    axis: Axis


def read_times(cells: Sequence[str], *, now: float | None = None) -> Times:
    """Read a column; `now` (default: the clock's) is what later times are called the future of."""
    numbers: dict[int, _Number] = {}
    dates: dict[int, _Date] = {}
    errors: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        if cell.lower() in _MISSING:
            continue
        read = _read(cell)
        if isinstance(read, _Number):
            numbers[index] = read
        elif isinstance(read, _Date):
            dates[index] = read
        else:
            errors.setdefault(read, []).append(index)
    remarks: list[str] = []
    columns = [_read_numbers(numbers, errors, remarks)] if numbers else []
    columns += [_read_dates(dates, errors, remarks)] if dates else []
    found = {index: moment for column in columns for index, moment in column.seconds.items()}
    if numbers and dates and any(column.axis != "instants" for column in columns):
        few, one, others = min(
            (list(numbers), "number", "date"), (list(dates), "date", "number"), key=lambda k: len(k[0])
        )
        errors.setdefault(f"a {one} where others have a {others}; write all times in one form", []).extend(few)
    how, axis = " and ".join(column.how for column in columns), columns[0].axis if columns else ""
    if found and not errors:
        span = f"{_shown(min(found.values()))} to {_shown(max(found.values()))}"
        remarks = [f"times are read as {how}: {span}", *remarks, *_oddities(cells, found, now or time.time())]
    return Times([found.get(index) for index in range(len(cells))], axis, errors, tuple(remarks))


def _read(text: str) -> _Number | _Date | str:
    """A cell, or what is wrong with it."""
    text = " ".join(text.split())
    if _NUMBER.fullmatch(text) and not _THOUSANDS.fullmatch(text):
        return _compact(text) or _number(text)
    if _THOUSANDS.fullmatch(text):
        return "a number with thousands separators; write it without them"
    return _date(text)


def _number(text: str) -> _Number | str:
    exact = Decimal(text.replace(",", "."))
    exponent = exact.as_tuple().exponent
    value = float(exact)
    if not isinstance(exponent, int) or abs(value) > 1e30:
        return "no plausible time in any unit"
    return _Number(value, 10.0**exponent if "e" in text.lower() else 0.0)


def _compact(text: str) -> _Date | None:
    """A date in digits alone: 20261130, 202611301405, 20261130140500. No number of any unit looks like one."""
    form = _COMPACT.get(len(text)) if text.isdecimal() else None
    try:
        moment = datetime.strptime(text, form) if form else None
    except ValueError:
        return None
    if moment is None or not 1980 <= moment.year < 2100:
        return None
    return _Date(moment, moment, len(text) > 8)


def _date(text: str) -> _Date | str:
    text = re.sub(r"^(\d{4}):(\d\d):(\d\d)(?!\d)", r"\1-\2-\3", _WEEKDAY.sub("", text, count=1))  # EXIF
    zone = _ZONE.search(text) if ":" in text else None
    offset = ""
    if zone and zone[0]:
        text, offset = text[: zone.start()], zone["offset"] or "+00:00"
    if re.match(r"\d{4}-?\d\d-?\d\d(?!\d)", text):
        try:
            moment = datetime.fromisoformat(text + offset)
        except ValueError:
            pass
        else:
            return _Date(moment, moment, len(text) > 10)
    text = _CTIME.sub(r"\1 \3 \2", text)
    match = _DATE.fullmatch(text)
    if _ZONE_NAME.search(text):
        return f"a zone's name, which may mean several; write the offset, e.g. {FORMS.partition(',')[0]}"
    if match is None:
        if _CLOCK.fullmatch(text):
            return "a time of day without its date"
        return f"no time; write {FORMS}"
    return _build(match, offset)


def _build(match: re.Match[str], offset: str) -> _Date | str:
    """The two readings of a date that is not ISO 8601."""
    clock = _CLOCK.fullmatch(match["clock"] or "0:00")
    if clock is None:
        return f"no time; write {FORMS}"
    hour = int(clock["hour"])
    if clock["half"]:
        if not 1 <= hour <= 12:
            return "no such time of day"
        hour = hour % 12 + 12 * (clock["half"].lower() == "p")
    fraction = (clock["fraction"] or "0")[:6].ljust(6, "0")
    clock_text = f"{hour:02d}:{clock['minute']}:{clock['second'] or '00'}.{fraction}"

    def moment(year: str, month: int, day: str) -> datetime | None:
        try:
            return datetime.fromisoformat(f"{year}-{month:02d}-{int(day):02d}T{clock_text}{offset}")
        except ValueError:
            return None

    if match["one"] is None:
        name = (match["month"] or match["month2"]).lower()
        number = _MONTHS.index(name[:3]) + 1 if name[:3] in _MONTHS else 0
        found = moment(match["year"] or match["year2"], number, match["day"] or match["day2"])
        readings = found, found
    elif len(match["one"]) == 4:
        found = moment(match["one"], int(match["two"]), match["three"]) if len(match["three"]) <= 2 else None
        readings = found, found
    elif len(match["three"]) != 4:
        return "a year of two digits; write four"
    else:
        day_first = moment(match["three"], int(match["two"]), match["one"])
        month_first = moment(match["three"], int(match["one"]), match["two"])
        readings = day_first, None if match["mark"] == "." and day_first else month_first  # nobody writes 11.30.2026
    if readings == (None, None):
        return "no such date or time of day"
    return _Date(*readings, match["clock"] is not None)


def _read_numbers(numbers: Mapping[int, _Number], errors: dict[str, list[int]], remarks: list[str]) -> _Column:
    """The numbers, in the unit that most of them have; adds to `errors` and `remarks`."""
    units = {index: _unit(number.value) for index, number in numbers.items()}
    counts = Counter(units.values())
    unit = max(counts, key=lambda name: (counts[name], bool(name)))
    values = [number.value for number in numbers.values()]
    if len(counts) > 1:
        for index, other in units.items():
            if other != unit:
                what = f"{other} since 1970" if other in _UNITS else other or "no plausible time"
                why = f"read as {what}, while others are {unit if unit not in _UNITS else f'{unit} since 1970'}"
                errors.setdefault(why + "; write all in one unit", []).append(index)
    elif not unit:
        if all(1900 <= value <= 2100 and value == int(value) for value in values):
            errors.setdefault("a year alone; write the date", []).extend(numbers)
        elif min(values) < 0 or max(values) >= EARLIEST:
            errors.setdefault("no plausible time in any unit", []).extend(numbers)
        else:
            remarks.append(
                "these numbers are no dates of an image; they are good for an order, and gap_days counts 86,400 a day"
            )
    scale = _UNITS.get(unit, 1.0)
    seconds = {
        index: round((value - _EXCEL_EPOCH) * _DAY, 3) if unit == _SPREADSHEET else value / scale
        for index, (value, _) in numbers.items()
    }
    step = _DAY if unit == _SPREADSHEET else 1 / scale
    coarse = [number.resolution * step for number in numbers.values() if number.resolution * step > _COARSE]
    if coarse:
        remarks.append(
            f"{len(coarse)} times are rounded to {max(coarse) / _DAY:.3g} days (1.7E+12): a spreadsheet cut their "
            "digits; format the column as text or number before it is saved"
        )
    how = unit if unit == _SPREADSHEET else f"{unit or 'seconds'} since 1970 UTC"
    return _Column(seconds, how, "local" if unit == _SPREADSHEET else "instants" if unit else "order")


def _unit(value: float) -> str:
    """The only unit in which a number is a time between 1980 and 2100; empty if there is none."""
    for name, scale in _UNITS.items():
        if EARLIEST <= value / scale < LATEST:
            return name
    return _SPREADSHEET if EARLIEST <= (value - _EXCEL_EPOCH) * _DAY < LATEST else ""


def _read_dates(dates: Mapping[int, _Date], errors: dict[str, list[int]], remarks: list[str]) -> _Column:
    """The dates, with the day or the month first as the column tells; adds to `errors` and `remarks`."""
    zoned = [index for index, date in dates.items() if date.zoned]
    local = [index for index, date in dates.items() if not date.zoned]
    if zoned and local:
        few, many = sorted(((zoned, "a zone"), (local, "no zone")), key=lambda pair: len(pair[0]))
        errors.setdefault(f"{few[1]} where others have {many[1]}; write the zone of all, or of none", []).extend(few[0])
    day = [index for index, date in dates.items() if date.month_first is None]
    month = [index for index, date in dates.items() if date.day_first is None]
    either = [index for index, date in dates.items() if None not in date[:2] and date.day_first != date.month_first]
    if day and month:
        few_, order, rest = min((day, "the day", "the month"), (month, "the month", "the day"), key=lambda x: len(x[0]))
        errors.setdefault(f"{order} first where others have {rest} first; write 2026-11-30", []).extend(few_)
    elif either and not (day or month):
        errors.setdefault("the day or the month first? nothing tells; write 2026-11-30", []).extend(either)
    picked = {index: date.month_first if month else date.day_first for index, date in dates.items()}
    seconds = {
        index: (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        for index, moment in picked.items()
        if moment is not None
    }
    bare = sum(not date.has_clock for date in dates.values())
    if 0 < bare < len(dates):
        remarks.append(f"{bare} of {len(dates)} dates have no time of day: taken as midnight")
    order = f", {'month' if month else 'day'} first" if either or day or month else ""
    if zoned:
        return _Column(seconds, f"dates with their zone{order}", "instants")
    how = "dates" if bare == len(dates) else "dates without a zone, as if UTC (an hour off where clocks change)"
    return _Column(seconds, how + order, "local")


def _oddities(cells: Sequence[str], found: Mapping[int, float], now: float) -> list[str]:
    """Remarks about times at which no image was taken."""
    remarks = []
    for words, odd in (
        ("before 1980", [i for i, moment in found.items() if moment < EARLIEST]),
        ("in the future", [i for i, moment in found.items() if moment > now + _DAY]),
    ):
        if odd and (words != "before 1980" or max(found.values()) >= EARLIEST):
            remarks.append(f"{len(odd)} time{'s' * (len(odd) > 1)} {words}, e.g. {cells[odd[0]]}: was the clock set?")
    return remarks


def _shown(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError):
        return f"{moment:g}"
