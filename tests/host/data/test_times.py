"""Times of a column: forms, units, zones, and what is refused because it could be read in two ways."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.data.times import EARLIEST, LATEST, Times, read_times

NOW = datetime(2026, 11, 29, tzinfo=UTC).timestamp()
AT = datetime(2024, 3, 31, 14, 5, tzinfo=UTC)
"""What the forms below mean."""


def read(*cells: str) -> Times:
    return read_times(cells, now=NOW)


@pytest.mark.parametrize(
    "text",
    [
        "2024-03-31T14:05:00Z",
        "2024-03-31 14:05:00+00:00",
        "2024-03-31T16:05+02",
        "2024-03-31 16:05:00.000000000 +0200",
        "2024-03-31 14:05 UTC",
        "2024-03-31T16:05:00+02:00[Europe/Berlin]",
        "20240331T140500Z",
        "Sun, 31 Mar 2024 16:05:00 +0200",
        "Sun Mar 31 2024 16:05:00 GMT+0200 (CEST)",
        "1711893900",
        "1711893900.0",
        "1711893900,000000",
        "1.7118939e9",
        "1711893900000",
        "1.7118939E+12",
        "1711893900000000",
        "1711893900000000000",
    ],
)
def test_instants(text: str) -> None:
    times = read(text)
    assert times.errors == {} and times.axis == "instants"
    assert times.seconds == [pytest.approx(AT.timestamp(), abs=1e-3)]


@pytest.mark.parametrize(
    "text",
    [
        "2024-03-31T14:05",
        "2024-03-31 14:05:00.000",
        "2024/03/31 14:05",
        "2024/3/31 14:05",
        "2024.03.31 14:05",
        "2024:03:31 14:05:00",
        "31.03.2024 14:05",
        "31.3.2024, 14:05",
        "31/03/2024 02:05 PM",
        "03/31/2024 2:05:00 p.m.",
        "31-Mar-2024 14:05",
        "31 March 2024 14:05:00",
        "Mar 31, 2024 2:05 PM",
        "Sun Mar 31 14:05:00 2024",
        "202403311405",
        "20240331140500",
        "45382.586805555556",
        "45382,586805555556",
    ],
)
def test_local_times(text: str) -> None:
    times = read(text)
    assert times.errors == {} and times.axis == "local"
    assert times.seconds == [pytest.approx(AT.timestamp(), abs=1e-3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yesterday", "no time"),
        ("31.12.26", "a year of two digits"),
        ("03/04/26 14:05", "a year of two digits"),
        ("03/04/2024", "the day or the month first?"),
        ("3-4-2024 2:05 PM", "the day or the month first?"),
        ("2026-02-30", "no such date"),
        ("31/31/2024", "no such date"),
        ("2024-03-31 25:00", "no such date or time of day"),
        ("03/31/2024 14:05 PM", "no such time of day"),
        ("14:05", "without its date"),
        ("2024-03-31 14:05 CET", "a zone's name"),
        ("2024-03-31 14:05:00 Europe/Berlin", "a zone's name"),
        ("1,711,893,900", "thousands separators"),
        ("1.711.893.900", "thousands separators"),
        ("1 711 893 900", "thousands separators"),
        ("2024", "a year alone"),
        ("4294967295", "no plausible time"),
        ("17118939000", "no plausible time"),
        ("-1711893900", "no plausible time"),
        ("1e999", "no plausible time"),
        ("#####", "no time"),
    ],
)
def test_what_is_no_time_or_several(text: str, words: str) -> None:
    (error,) = read("", text, "NaT").errors.items()
    assert words in error[0] and error[1] == [1]


@pytest.mark.parametrize(
    ("cells", "words", "where"),
    [
        (["2024-03-31T14:05Z", "2024-03-31T14:05", "2024-04-01T00:00+01"], "no zone where others have a zone", [1]),
        (["2024-03-31", "2024-03-31T14:05Z", "2024-04-01"], "a zone where others have no zone", [1]),
        (
            ["1711893900", "1711893900000", "1711893901"],
            "read as milliseconds since 1970, while others are seconds",
            [1],
        ),
        (["1711893900", "45382.5", "1711893901"], "days since 1900", [1]),
        (["1711893900", "0", "1711893901"], "no plausible time, while others are seconds", [1]),
        (["1711893900", "-1"], "no plausible time, while others are seconds", [1]),
        (["1711893900", "2024-03-31 14:05", "2024-04-01"], "a number where others have a date", [0]),
        (["45382", "31/03/2024", "14/03/2024"], "a number where others have a date", [0]),
        (["31/03/2024", "03/31/2024", "30/03/2024"], "the month first where others have the day first", [1]),
    ],
)
def test_forms_that_do_not_go_together(cells: list[str], words: str, where: list[int]) -> None:
    errors = {error: list(indices) for error, indices in read(*cells).errors.items()}
    assert [indices for error, indices in errors.items() if words in error] == [where], errors


def test_one_date_tells_the_order_of_all() -> None:
    assert read("03/04/2024", "25/06/2024").seconds == read("2024-04-03", "2024-06-25").seconds
    assert read("03/04/2024", "06/25/2024").seconds == read("2024-03-04", "2024-06-25").seconds
    assert "day first" in read("03/04/2024", "25/06/2024").remarks[0]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["2024-03-31 02:30"], "without a zone, as if UTC"),
        (["2024-03-31 02:30"], "2024-03-31 02:30 to 2024-03-31 02:30"),
        (["1711893900000"], "milliseconds since 1970"),
        (["45382.5"], "a spreadsheet's date"),
        (["1.7E+12", "1.71E+12"], "rounded to 1.16e+03 days"),
        (["1.7e9"], "rounded"),
        (["1970-01-01", "2024-01-01"], "1 time before 1980, e.g. 1970-01-01"),
        (["2106-02-07T06:28:15Z"], "1 time in the future"),
        (["2024-03-31", "2024-03-31 02:30"], "1 of 2 dates have no time of day"),
        (["0", "1", "2"], "good for an order"),
    ],
)
def test_what_is_said(cells: list[str], words: str) -> None:
    times = read(*cells)
    assert times.errors == {} and words in " | ".join(times.remarks)


def test_cells_without_a_time() -> None:
    assert read("", "NaT", "nan", "None", "#N/A") == Times([None] * 5, "", {}, ())


@settings(deadline=None)
@given(st.text(max_size=30) | st.floats().map(str) | st.integers().map(str))
def test_any_text_is_a_time_or_an_error(text: str) -> None:
    times = read(text)
    (moment,) = times.seconds
    assert times.errors or moment is None or np.isfinite(moment)
    assert (
        moment is not None or times.errors or not text.strip() or text.lower() in {"nat", "nan", "na", "none", "null"}
    )


@settings(deadline=None)
@given(
    st.lists(st.floats(EARLIEST, LATEST - 1e6), min_size=1, max_size=4),
    st.sampled_from([("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)]),
    st.sampled_from([str, repr, "{:.0f}".format, "{:.17e}".format]),
)
def test_every_unit_is_known_by_its_size(moments: list[float], unit: tuple[str, float], write: object) -> None:
    """As whatever program wrote them: never a thousand times off."""
    cells = [write(moment * unit[1]) for moment in moments]  # type: ignore[operator]
    assert read(*cells).seconds == [pytest.approx(moment, abs=1.0) for moment in moments]


@settings(deadline=None)
@given(
    st.datetimes(datetime(1980, 1, 1), datetime(2099, 12, 31)),
    st.integers(-14 * 4, 14 * 4),
    st.sampled_from(["%Y-%m-%dT%H:%M:%S.%f%z", "%Y/%m/%d %H:%M:%S.%f %z", "%d %B %Y %I:%M:%S.%f %p %z"]),
)
def test_zones_are_kept(moment: datetime, quarters: int, form: str) -> None:
    there = moment.replace(tzinfo=timezone(timedelta(minutes=15 * quarters)))
    assert read(there.strftime(form)).seconds == [pytest.approx(there.timestamp(), abs=1e-5)]
