"""CSV tables of labelled images, as spreadsheets, pandas and other tools write them.

Every row is taken or named: a table that has one row which cannot be used is refused, with all of its errors at once.
What is passed over (empty rows, comments above the header, an index column) is a remark.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eyas_host.data.split_names import SplitName, split_name
from eyas_host.data.table_paths import explain_missing, find_file, is_file, is_formula
from eyas_host.data.table_text import read_text
from eyas_host.data.times import Axis, read_times
from eyas_host.support.errors import DataError

COLUMNS = ("path", "label", "group", "time", "split")
"""Columns of a table; the last three are optional."""
USAGE = f"a table with the header {','.join(COLUMNS[:2])}[,{','.join(COLUMNS[2:])}] is needed"

_SEPARATORS = (",", ";", "\t", "|")
_SYNONYMS = {
    "path": "file filename file_name filepath file_path image image_path imagepath img img_path name url uri",
    "label": "class classname class_name category target labels tag y species defect annotation",
    "group": "patient patient_id subject batch camera site lot session device series serial",
    "split": "subset partition fold set phase usage",
    "time": "timestamp datetime date_time date created created_at captured taken when t",
}
_ALIASES = {alias: column for column, aliases in _SYNONYMS.items() for alias in aliases.split()}
_UNNAMED = re.compile(r"unnamed: ?\d+(?:_level_\d+)?")
_SEP_LINE = re.compile(r'"?sep=(.|\\t)"?[,;\t| ]*', re.IGNORECASE)
_NO_VALUE = frozenset({"NaN", "nan", "NaT", "<NA>", "#NA", "-nan"})
_ERROR_VALUE = re.compile(r"#(?:N/A|REF!|VALUE!|NAME\?|DIV/0!|NULL!|NUM!|SPILL!|CALC!|FIELD!|GETTING_DATA)|#+")
_SHOWN = 3
"""Examples of each error."""


class TableRow(NamedTuple):
    """One image of a table."""

    line: int
    """Where it begins, from 1."""
    path: str
    """Absolute."""
    label: str
    group: str
    time: float | None
    """Seconds since 1970 UTC."""
    split: SplitName | None
    """The split that its column names; None without one."""


class Table(NamedTuple):
    """What a table holds."""

    rows: tuple[TableRow, ...]
    axis: Axis
    """What its times lie on."""
    remarks: tuple[str, ...]
    """What was passed over, and how it was read."""


class _Cells(NamedTuple):
    line: int
    path: str
    label: str
    group: str
    time: str
    split: str


class _Content(NamedTuple):
    rows: list[_Cells]
    remarks: list[str]


def read_table(path: Path, *, times: bool = False, splits: bool = False) -> Table:
    """Read a table; paths are relative to it.

    `times`: whether the splits need them: what is wrong in them is an error, and how they were read is a remark.
    `splits`: whether every row has to name its split. Raises `DataError` with all errors of the header, or of the rows.
    """
    content = _read(path)
    base = path.parent.resolve()
    errors: dict[str, list[str]] = {}
    readings: Counter[str] = Counter()
    files = []
    for row in content.rows:
        file, how = find_file(row.path, base)
        files.append(file)
        readings[how] += bool(how)
        explained = len(errors.get(_missing(base), ())) >= _SHOWN  # a hint may list a folder: not for every row
        for error, example in _row_errors(row, file, base, explain=not explained):
            errors.setdefault(error, []).append(f"line {row.line}{example}")
        if splits and split_name(row.split) is None:
            example = f" ({_shorten(row.split)})" if row.split else ""
            errors.setdefault("split is not train, validation or test", []).append(f"line {row.line}{example}")
    column = read_times([row.time for row in content.rows])
    remarks = [
        *content.remarks,
        *(f"{_count(count, 'path is', 'paths are')} read {how}" for how, count in readings.items() if count),
    ]
    for error, indices in column.errors.items():
        named = [f"line {content.rows[i].line} ({_shorten(content.rows[i].time)})" for i in sorted(indices)]
        if times:
            errors[f"time is {error}"] = named
        else:
            remarks.append(f"times are not used: {_listed(f'time is {error}', named)}")
    if errors:
        listed = "; ".join(_listed(error, examples) for error, examples in errors.items())
        raise DataError(f"{path}: {listed}; fix the table and run again")
    if not content.rows:
        raise DataError(f"{path}: the table has no rows below its header; one row per image is needed")
    moments = [None] * len(files) if column.errors else column.seconds
    rows = tuple(
        TableRow(row.line, file, row.label, row.group, moment, split_name(row.split))
        for row, file, moment in zip(content.rows, files, moments, strict=True)
    )
    return Table(rows, column.axis, (*remarks, *(column.remarks if times else ())))


def table_files(path: Path) -> Iterator[Path]:
    """Every file that a table names, whether it exists or not. Raises `DataError` if the table cannot be read."""
    base = path.parent.resolve()
    return (Path(find_file(row.path, base)[0]) for row in _read(path).rows)


def _missing(base: Path) -> str:
    return f"no such file (paths are relative to {base})"


def _row_errors(row: _Cells, file: str, base: Path, *, explain: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with a row, and an example of it; `explain`: with what may be wrong with a path."""
    if not row.path:
        yield "no path", ""
    elif (row.path.lower(), row.label.lower()) == COLUMNS[:2]:
        yield "the header again: remove it", ""
        return
    elif not is_file(file):
        hint = explain_missing(row.path, base) if explain else ""
        yield _missing(base), f" ({_shorten(row.path)}{': ' * bool(hint)}{hint})"
    for name, cell in (("label", row.label), ("group", row.group)):
        if name == "label" and not cell:
            yield "no label", ""
        elif cell in _NO_VALUE or _ERROR_VALUE.fullmatch(cell):
            empty = (
                "leave it empty where there is none" if name == "group" else "an image without a label is no example"
            )
            yield f"the {name} is missing or an error of the spreadsheet; {empty}", f" ({cell})"
        elif is_formula(cell):
            yield f"the {name} is a formula; paste the column as values", f" ({_shorten(cell)})"


def _listed(error: str, examples: Sequence[str]) -> str:
    """`24 x no such file, first in line 2 (a.png), line 3 (b.png), ...`."""
    more = ", ..." if len(examples) > _SHOWN else ""
    return f"{len(examples)} x {error}, first in {', '.join(examples[:_SHOWN])}{more}"


def _shorten(text: str) -> str:
    shown = text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
    return repr(shown) if not shown.isprintable() else shown


def _read(path: Path) -> _Content:
    """Cells of every row; missing columns are empty. Raises `DataError` if the table cannot be taken apart."""
    text, first, separator, remarks = _skip_preamble(read_text(path, USAGE))
    header, reader = _open(path, text, first, separator)
    names = [_clean(name) for name in header]
    _check_header(path, names)
    records, empty, wrong = [], 0, []
    for line, cells in _records(path, reader, first):
        stripped = [cell.strip() for cell in cells]
        if not any(stripped):
            empty += bool(cells)
            continue
        missing = names[len(stripped) :]
        if any(stripped[len(names) :]) or set(missing) & set(COLUMNS[:2]):
            wrong.append(f"line {line} has {_count(len(cells), 'cell', 'cells')} where the header has {len(names)}")
        records.append((line, [*stripped, *[""] * len(missing)], cells))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f'{path}: {", ".join(wrong[:_SHOWN])}{more}; put cells that contain the separator in quotes: "a, b.png"'
        )
    remarks += _left_out_columns(path, names, records)
    if empty:
        remarks.append(f"{_count(empty, 'empty row', 'empty rows')} passed over")
    blank = sum(_has_blanks(names, cells) for _, _, cells in records)
    if blank:
        remarks.append(f"{_count(blank, 'label', 'labels')} had blanks at the ends, which do not count")
    rows = []
    for line, stripped, _ in records:
        row = dict.fromkeys(COLUMNS, "") | dict(zip(names, stripped, strict=False))
        rows.append(_Cells(line, *(row[name] for name in COLUMNS)))
    return _Content(rows, remarks)


def _has_blanks(names: Sequence[str], cells: Sequence[str]) -> bool:
    label = cells[names.index("label")]
    return label != label.strip()


def _skip_preamble(text: str) -> tuple[str, int, str, list[str]]:
    """The text from its header on, the lines above it, the separator that one of them names, and remarks."""
    separator, skipped, comments = "", 0, 0
    while text:
        match = re.match(r"([^\r\n]*)(\r\n|\r|\n|$)", text)
        line = match[1] if match else ""
        named = _SEP_LINE.fullmatch(line)
        if named:
            separator = "\t" if named[1] == "\\t" else named[1]
        elif line.startswith("#"):
            if {"path", "label"} <= set(re.split(r"[,;\t| ]+", line.lstrip("# ").strip().lower())):
                text = line.lstrip("# ") + text[len(line) :]  # numpy.savetxt writes its header so
                break
            comments += 1
        elif line.strip(' \t,;|"'):
            break
        skipped += 1
        text = text[match.end() if match else 0 :]
    remarks = [f"{_count(comments, 'comment line', 'comment lines')} above the header passed over"] if comments else []
    return text, skipped, separator, remarks


def _open(path: Path, text: str, skipped: int, separator: str) -> tuple[list[str], Iterator[list[str]]]:
    """The header and the reader of the rows, with the separator that yields the needed columns."""
    found: list[tuple[list[str], Iterator[list[str]]]] = []
    for candidate in [separator] if separator else _SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=candidate, strict=True, skipinitialspace=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            if candidate == (separator or _SEPARATORS[-1]) and not found:
                raise DataError(f"{path}: line {skipped + 1}: {_csv_error(error)}; {USAGE}") from None
            continue
        if set(COLUMNS[:2]) <= {_clean(name) for name in header}:
            return header, reader
        found.append((header, reader))
    return max(found, key=lambda item: len(item[0]))


def _records(path: Path, reader: Iterator[list[str]], skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Cells of each record with the line that it begins in."""
    while True:
        line = skipped + getattr(reader, "line_num") + 1  # noqa: B009 - the reader's type has no public name
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}: cannot be read as CSV: line {line}: {_csv_error(error)}; {USAGE}") from None
        yield line, cells


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _csv_error(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text:
        return "a quote is opened here and not closed; double the quotes within a cell"
    if "field limit" in text:
        return f"a cell has more than {csv.field_size_limit():,} characters; is a quote opened and not closed?"
    if "expected after" in text:
        return "text follows a closing quote; double the quotes within a cell"
    return text


def _clean(name: str) -> str:
    """A column's name without blanks, byte order marks and case; empty for one that pandas made up."""
    name = name.strip().strip("\ufeff\u200b").strip().lower()
    return "" if _UNNAMED.fullmatch(name) else name


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raise `DataError` with all that is wrong with the columns' `names`."""
    missing = [name for name in COLUMNS[:2] if name not in names]
    unknown = [name for name in names if name and name not in COLUMNS]
    twice = [name for name, count in Counter(names).items() if name in COLUMNS and count > 1]
    if not missing and not unknown and not twice:
        return
    if not any(names):
        raise DataError(f"{path}: the table is empty: the columns are none; {USAGE}")
    problems = []
    for name in dict.fromkeys(unknown):
        meant = _closest(name, names)
        problems.append(f"{name!r} is not known" + (f" (did you mean {meant}?)" if meant else ": leave it out"))
    problems += [f"{name} is missing" for name in missing]
    problems += [f"{name} comes {names.count(name)} times: keep one" for name in twice]
    if missing == list(COLUMNS[:2]) and any("." in name or "/" in name for name in names):
        problems = [f"the first line looks like a row: put the header {','.join(COLUMNS[:2])} above it"]
    elif len(names) == 1 and re.search(r"[\s:/]", names[0]):
        problems.append("separate the columns by commas")
    elif any(name.strip("'`") in COLUMNS for name in unknown):
        problems.append('write double quotes (") or none')
    listed = ", ".join(name or "(without a name)" for name in names) or "none"
    raise DataError(f"{path}: the columns are {listed}: {'; '.join(problems)}; {USAGE}")


def _closest(name: str, names: Sequence[str]) -> str:
    """The known column that an unknown one probably is; one that the table has already is not meant."""
    alias = _ALIASES.get(re.sub(r"[^a-z_]", "", name.replace(" ", "_")), "")
    close = [alias] if alias else difflib.get_close_matches(name, COLUMNS, n=1)
    return next((one for one in close if one not in names), "")


def _left_out_columns(
    path: Path, names: Sequence[str], records: Iterable[tuple[int, Sequence[str], object]]
) -> Iterator[str]:
    """Remarks about columns without a name; raises `DataError` for one that is neither empty nor an index."""
    columns: Mapping[int, list[tuple[int, str]]] = {index: [] for index, name in enumerate(names) if not name}
    for line, cells, _ in records:
        for index, column in columns.items():
            if cells[index]:
                column.append((line, cells[index]))
    for index, column in columns.items():
        values = [cell for _, cell in column]
        if not values:
            yield f"column {index + 1} has no name and no cells: left out"
        elif index == 0 and len(set(values)) == len(values) and all(value.isdecimal() for value in values):
            yield "the first column has no name and counts the rows (pandas' index): left out"
        else:
            line, cell = column[0]
            raise DataError(
                f"{path}: column {index + 1} has no name, but cells, first in line {line} ({_shorten(cell)}); name it "
                f"or remove it (pandas: to_csv(path, index=False)); {USAGE}"
            )
