"""Tables as spreadsheets, pandas and scripts write them: read as they are meant, or refused with a line and the fix."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_host.data.sources import list_images
from eyas_host.data.tables import Table, read_table
from eyas_host.recipe.data import DataSection, Source
from eyas_host.support.errors import DataError

FILES = ["pics/ring/0.png", "pics/ring/1.png", "pics/square/0.png", "pics/square/a b.png"]
PLAIN = "path,label\n" + "".join(f"{file},{file.split('/')[1]}\n" for file in FILES)
ROWS = [(file, file.split("/")[1]) for file in FILES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that a table can name; nothing here decodes them."""
    root = tmp_path_factory.mktemp("table")
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def read(place: Path, content: str | bytes, *, times: bool = False, name: str = "t.csv") -> Table:
    (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(place / name, times=times)


def pairs(place: Path, table: Table) -> list[tuple[str, str]]:
    return [(str(Path(row.path).relative_to(place)), row.label) for row in table.rows]


def refused(place: Path, content: str | bytes, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(place, content, **options)
    message = str(caught.value)
    assert message.startswith(str(place)) and "\n" not in message
    return message


def with_index(text: str, name: str = "") -> str:
    header, *rows = text.splitlines()
    return "\n".join([f"{name},{header}", *(f"{7 * number},{row}" for number, row in enumerate(rows))])


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (PLAIN, None),
        (PLAIN.encode("utf-8-sig"), None),
        (("\ufeff" + PLAIN).encode("utf-8-sig"), None),
        (PLAIN.encode("utf-16"), None),
        (PLAIN.encode("utf-16-le"), None),
        (PLAIN.encode("utf-16-be"), None),
        (("\ufeff" + PLAIN).encode("utf-16-be"), None),
        (PLAIN.encode("utf-32"), None),
        (PLAIN.encode("utf-32-be"), None),
        (PLAIN.encode("utf-32-le"), None),
        (PLAIN.replace("\n", "\r\n"), None),
        (PLAIN.replace("\n", "\r"), None),
        (PLAIN.replace(",", ";"), None),
        (PLAIN.replace(",", "\t"), None),
        (PLAIN.replace(",", "|"), None),
        (PLAIN.replace(",", ", "), None),
        ("sep=;\r\n" + PLAIN.replace(",", ";"), None),
        ('"sep=,"\n' + PLAIN, None),
        ("# made by hand\n#\n" + PLAIN, "2 comment lines above the header"),
        ("# " + PLAIN, None),
        ("\n\n" + PLAIN + "\n\n", None),
        (PLAIN + ",\n , \n", "2 empty rows passed over"),
        (PLAIN.replace("path,label", " PATH ,\xa0Label"), None),
        (re.sub(r"([^,\n]+)", r'"\1"', PLAIN), None),
        (PLAIN + "\x1a", None),
        (PLAIN.replace("\n", ",\n"), "column 3 has no name and no cells"),
        (PLAIN.replace("\n", ",,\n").replace("path,label,,", "path,label"), None),
        (PLAIN.replace("path,label", "path,label,group"), None),
        (with_index(PLAIN), "counts the rows (pandas' index): left out"),
        (with_index(PLAIN, "Unnamed: 0"), "counts the rows"),
        (PLAIN.replace("/", "\\"), "4 paths are read with backslashes for slashes"),
        (PLAIN.replace("pics", ".\\pics", 1), "1 path is read with backslashes"),
        (PLAIN.replace("a b", "a%20b"), "1 path is read with %20"),
        (PLAIN.replace(",ring", ",ring\xa0"), "2 labels had blanks at the ends"),
    ],
)
def test_what_programs_write(place: Path, content: str | bytes, remark: str | None) -> None:
    table = read(place, content)
    assert pairs(place, table) == ROWS
    assert remark in " | ".join(table.remarks) if remark else table.remarks == ()


def test_addresses_of_files_and_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    rows = [f"file://{place}/pics/ring/0.png", "~/pics/ring/1.png", f"file://localhost{place}/pics/square/a%20b.png"]
    table = read(place, "path,label\n" + "".join(f"{path},x\n" for path in rows))
    assert [path for path, _ in pairs(place, table)] == [FILES[0], FILES[1], FILES[3]]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert "1 x no such file" in refused(place, "path,label\n~/pics/ring/1.png,x\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            PLAIN.replace("square", "kühl").encode("latin-1"),
            ["line 4 is not UTF-8", "'ü' in Windows-1252", "CSV UTF-8"],
        ),
        (PLAIN.replace("square", "5€").encode("cp1252"), ["line 4 is not UTF-8", "'€' in Windows-1252"]),
        (PLAIN.encode("utf-16")[:-1], ["cut or damaged UTF-16"]),
        (PLAIN.replace("ring", "ri\0ng"), ["line 2 has a NUL byte"]),
        (b"PK\x03\x04rest", ["workbook", "CSV UTF-8"]),
        (b"PAR1rest", ["Parquet", "to_csv(path, index=False)"]),
        (b"\xd0\xcf\x11\xe0rest", ["old workbook", "CSV UTF-8"]),
        ('[{"path": "a"}]', ["is JSON", "to_csv"]),
        ("<html>", ["HTML"]),
        ("path,label\n", ["no rows below its header"]),
        ("path,label\n\n,\n", ["no rows below its header"]),
        ("a/0.png,ring\na/1.png,ring\n", ["first line looks like a row", "header path,label"]),
        (
            "file,class\na,b\n",
            ["columns are file, class", "did you mean path?", "mean label?", "path is missing"],
        ),
        ("pth,lable,colour\na,b,c\n", ["mean path?", "mean label?", "'colour' is not known: leave it out"]),
        ("path,label,label,grp\na,b,c,d\n", ["label comes 2 times", "did you mean group?"]),
        ("path,label,timestamp\na,b,c\n", ["'timestamp' is not known (did you mean time?)"]),
        ("path,label,\na,b,x\n", ["column 3 has no name, but cells, first in line 2 (x)", "index=False"]),
        ("path,label,file\na,b,x\n", ["'file' is not known: leave it out"]),
        (PLAIN.replace("0.png,ring", "0.png,x,ring"), ["line 2 has 3 cells where the header has 2", "in quotes"]),
        (PLAIN.replace("0.png,", "0.png"), ["line 2 has 1 cell where", "line 4 has 1 cell where"]),
        (PLAIN + '"pics,ring\n', ["line 6: a quote is opened here and not closed"]),
        (PLAIN + '"a"b,ring\n', ["line 6: text follows a closing quote"]),
        ("'path','label'\n'a','b'\n", ["did you mean path?", 'write double quotes (")']),
        (PLAIN.replace("pics/ring/0.png", "'pics/ring/0.png'"), ["single quotes, which count as part of the name"]),
        (PLAIN + "x" * 140_000 + ",ring\n", ["line 6: a cell has more than 131,072 characters"]),
        (b"", ["the table is empty"]),
        (b"\xff\xfe", ["the table is empty"]),
        ("path\na\n", ["label is missing; a table"]),
        (PLAIN + "Total,4\n", ["1 x no such file", "line 6 (Total)"]),
        (PLAIN + "path,label\n", ["1 x the header again", "line 6"]),
        (PLAIN + "# the end,x\n", ["line 6 (# the end: begins with #"]),
        (PLAIN + '"=HYPERLINK(""a.png"")",ring\n', ["line 6", "is a formula: paste the column as values"]),
        (PLAIN + 'pics/ring/0.png,"=""01"""\n', ["the label is a formula", "line 6"]),
        (PLAIN.replace(",square", ",NaN"), ["2 x the label is missing", "line 4 (NaN), line 5 (NaN)"]),
        (PLAIN.replace(",square", ",#N/A"), ["2 x the label is missing or an error of the spreadsheet"]),
        (PLAIN.replace(",square", ",#REF!"), ["line 4 (#REF!)"]),
        (PLAIN.replace("pics/ring", "C:\\data\\ring"), ["2 x no such file", "Windows path of another machine"]),
        (PLAIN.replace("pics/ring", r"\\server\share"), ["Windows path of another machine", "relative to the table"]),
        (PLAIN.replace("pics/ring/0", "https://x.org/0"), ["is a web address: download"]),
        (PLAIN.replace("ring/0.png", "Ring/0.PNG"), ["line 2 (pics/Ring/0.PNG: did you mean", "pics/ring/0.png?"]),
        (PLAIN.replace("ring/0.png", "ring/0"), ["line 2 (pics/ring/0: did you mean", "pics/ring/0.png?"]),
        (PLAIN.replace("ring/0.png", "ring/0.jpg"), ["pics/ring/0.png?"]),
        (PLAIN.replace("ring/0.png", "ring"), ["line 2 (pics/ring: is a folder)"]),
        (PLAIN.replace("0.png", "0" * 5000 + ".png", 1), ["1 x no such file"]),
        (PLAIN + "gone.png,\n,\n,ring\n", ["1 x no such file", "1 x no label", "1 x no path, first in line 8"]),
    ],
)
def test_what_is_refused_and_the_fix(place: Path, content: str | bytes, words: list[str]) -> None:
    message = refused(place, content)
    assert [word for word in words if word not in message] == [], message


def test_paths_relative_to_the_current_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "tables").mkdir(exist_ok=True)
    assert f"move the table to {place}" in refused(place / "tables", PLAIN)


def test_names_of_tables_that_are_not_there(place: Path) -> None:
    read(place, PLAIN, name="Labels.CSV")
    for name in ("labels.csv", "Labels", "labels.xlsx"):
        with pytest.raises(DataError, match=r"no such file \(did you mean .*Labels.CSV\?\)"):
            read_table(place / name)


def test_labels_stay_as_they_are_written(place: Path) -> None:
    labels = ["1", "1.0", "01", "TRUE", "none"]
    rows = "".join(f"{FILES[0]},{label}\n" for label in labels)
    read(place, "path,label\n" + rows)
    found = list_images(DataSection(source="csv", path=str(place / "t.csv")))
    assert [image.label for image in found.images] == labels
    assert found.remarks == ("the labels '01', '1', '1.0' are kept apart; if they mean one, write them in one way",)
    assert found.origins[str(place / FILES[0]), "01"].endswith("t.csv line 4")


TIMED = "path,label,time\n" + "".join(f"{file},{label},{{}}\n" for file, label in ROWS)


def test_times_are_needed_or_remarked(place: Path) -> None:
    wrong = TIMED.format("2024-01-01", "2024-01-02", "x", "2024-01-04")
    assert "1 x time is no time; write 2026-11-30T14:05" in refused(place, wrong, times=True)
    table = read(place, wrong)
    assert [row.time for row in table.rows] == [None] * 4
    assert "times are not used: 1 x time is no time" in " | ".join(table.remarks) and "line 4 (x)" in table.remarks[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["1704067200"] * 4, "count from 1970"),
        (["2024-01-01T00:00+01"] * 4, "have a zone"),
        (["1", "2", "3", "4"], "are small numbers"),
        (["2024-01-01 00:00"] * 4, None),
        ([""] * 4, "have no time"),
    ],
)
def test_tables_share_one_axis(place: Path, more: Sequence[str], words: str | None) -> None:
    read(place, TIMED.format(*["2024-01-01T10:00"] * 4), name="a.csv")
    read(place, TIMED.format(*more), name="b.csv")
    data = DataSection(
        source="csv", path=str(place / "a.csv"), by="time", more=(Source(source="csv", path=str(place / "b.csv")),)
    )
    if words is None:
        assert len(list_images(data).images) == 8
        assert any("b.csv: times are read as dates without a zone" in remark for remark in list_images(data).remarks)
        return
    with pytest.raises(DataError, match=words):
        list_images(data)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
LINE_ENDS = ("\n", "\r\n", "\r")


def _is_value(cell: str) -> bool:
    """Whether a cell is a label or a group, whatever it says: no missing value, no formula."""
    return bool(cell.strip()) and not re.match(r"=|#|-?nan|NaN|NaT|<NA>", cell.strip())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from(FILES), CELLS.filter(_is_value), CELLS), min_size=1, max_size=5),
    encoding=st.sampled_from(ENCODINGS),
    separator=st.sampled_from(",;\t|"),
    line_end=st.sampled_from(LINE_ENDS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    index=st.sampled_from([None, "", "Unnamed: 0"]),
    preamble=st.sampled_from(["", "sep", "# by hand"]),
    columns=st.permutations(["path", "label", "group"]),
)
def test_whatever_a_writer_writes_is_read_or_named(
    place: Path,
    rows: list[tuple[str, str, str]],
    encoding: str,
    separator: str,
    line_end: str,
    quoting: Any,
    index: str | None,
    preamble: str,
    columns: list[str],
) -> None:
    """The rows come back but for blanks at the ends of cells; else rows that cannot be used are named by their line."""
    stream = io.StringIO()
    if preamble:
        stream.write((f"sep={separator}" if preamble == "sep" else preamble) + line_end)
    if any(re.search(r"[\r\n]", cell) for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # this writer quotes no line break but its own
    writer = csv.writer(stream, delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writerow(([index] if index is not None else []) + columns)
    for number, row in enumerate(rows):
        cells = dict(zip(("path", "label", "group"), row, strict=True))
        writer.writerow(([str(number)] if index is not None else []) + [cells[name] for name in columns])
    content = stream.getvalue().encode(encoding)
    try:
        table = read(place, content)
    except DataError as error:
        wrong = [row for row in rows if row[2].strip() and not _is_value(row[2])]
        assert wrong and f"{len(wrong)} x the group" in str(error) and "line " in str(error)
        return
    assert [(str(Path(row.path).relative_to(place)), row.label, row.group) for row in table.rows] == [
        (path, label.strip(), group.strip()) for path, label, group in rows
    ]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.sampled_from(
        [
            lambda lines, at, text: [*lines[:at], text, *lines[at:]],
            lambda lines, at, text: [*lines[:at], lines[at][: len(text)], *lines[at + 1 :]],
            lambda lines, at, text: [*lines[:at], lines[at] + text, *lines[at + 1 :]],
            lambda lines, at, text: [*lines[:at], text + lines[at], *lines[at + 1 :]],
        ]
    ),
    at=st.integers(0, len(FILES)),
    text=st.text(st.sampled_from(',;\t|"#=\r\n 0aпath\0\ufeff'), max_size=8),
)
def test_a_damaged_table_loses_no_row_in_silence(
    place: Path, damage: Callable[[list[str], int, str], list[str]], at: int, text: str
) -> None:
    """Every line with something in it is a row, is named by its number, or is remarked."""
    content = "\n".join(damage(PLAIN.splitlines(), at, text)) + "\n"
    try:
        table = read(place, content)
    except DataError as error:
        assert re.search(r"line \d|the columns are|looks like a row", str(error)), str(error)
        return
    lines = sum(bool(line.strip(' \t,;|"\ufeff')) for line in re.split(r"\r\n|\r|\n", content)) - 1
    passed_over = sum(int(found) for found in re.findall(r"(\d+) comment line", " ".join(table.remarks)))
    quoted = sum(row.label.count("\n") + row.label.count("\r") for row in table.rows)
    assert len(table.rows) >= lines - passed_over - quoted, (content, table)


def test_only_the_rows_that_are_shown_are_explained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint may list a folder; a table with many wrong paths must not do that for each of them."""
    asked = []
    monkeypatch.setattr("eyas_host.data.tables.explain_missing", lambda text, base: asked.append(text) or "a hint")
    message = refused(place, "path,label\n" + "".join(f"{n}.png,x\n" for n in range(50)))
    assert "50 x no such file" in message and message.count("a hint") == len(asked) == 3
