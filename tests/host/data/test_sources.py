"""Where images come from: tables and their mistakes, several sources joined, and what the index says of a file."""

from __future__ import annotations

import csv
import shutil
import tracemalloc
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from PIL import Image

from eyas_host.data.index import Index, build_index
from eyas_host.data.manifest import SPLITS
from eyas_host.data.sources import fingerprint
from eyas_host.data.split import split_index
from eyas_host.recipe.data import DataSection, Source
from eyas_host.support.errors import DataError
from tests.support.shapes import draw_folder, draw_shape


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two classes of three images, to be named by tables."""
    draw_folder(tmp_path / "images", count=3, width=40, height=36, labels=("ring", "square"))
    return tmp_path


def table(place: Path, text: str, name: str = "table.csv") -> DataSection:
    (place / name).write_text(text, encoding="utf-8")
    return DataSection(source="csv", path=str(place / name))


ROWS = "images/ring/000.png,ring\nimages/ring/001.jpg,ring\nimages/square/000.png,square\n"


def complaint(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        build_index(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_table_names_images_beside_it(place: Path) -> None:
    index = build_index(table(place, "path,label\n" + ROWS))
    assert index.counts() == {"ring": 2, "square": 1}
    assert {p.path for p in index.images} >= {str(place / "images/ring/000.png")}
    assert all(p.group == "" and p.time is None and len(p.sha256) == 64 for p in index.images)


def test_table_with_groups_times_quotes_and_a_byte_order_mark(place: Path) -> None:
    odd = place / "images" / "ring" / 'a, "b".png'
    (place / "images/ring/000.png").rename(odd)
    with (place / "odd.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["Label ", "time", "path", "group"])
        rows.writerow(["ring", "2026-11-30T14:05:00+01:00", odd.relative_to(place), "line, 1"])
        rows.writerow([" square ", "1700000000.5", place / "images/square/000.png", "line 2"])
        rows.writerow(["square", "", "images/../images/square/001.jpg", "Ω"])
    found = build_index(DataSection(source="csv", path=str(place / "odd.csv"), by="stratified")).images
    assert [(p.label, p.group) for p in found] == [("ring", "line, 1"), ("square", "line 2"), ("square", "Ω")]
    assert [p.time for p in found] == [1796043900.0, 1700000000.5, None]
    assert found[2].path == str(place / "images/square/001.jpg")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["columns are none", "path,label[,group,time,split]"]),
        ("path,label\n", ["no rows below its header"]),
        ("file,label\na,b\n", ["columns are file, label", "path,label"]),
        ("path,label,colour\na,b,c\n", ["columns are path, label, colour"]),
        ("path,label,label\na,b,c\n", ["columns are path, label, label"]),
        ("path label\na b\n", ["separate the columns by commas"]),
        ("path,label\na, b.png,ring\n", ["line 2 has 3 cells where the header has 2", "quotes"]),
        ('path,label\n"a.png,ring\n', ["line 2: a quote is opened here and not closed"]),
        ("path,label\n" + ROWS + "gone.png,ring\nlost.png,square\n", ["2 x no such file", "first in line 5"]),
        ("path,label\n" + ROWS + "images/square/001.jpg,\n,ring\n", ["1 x no label", "line 5", "1 x no path"]),
        ("path,label\n" + ROWS.replace(",square", ",ring"), ["two or more classes are needed, found 1 (ring)"]),
        ("path,label\n" + ROWS + "images/ring/000.png,square\n", ["the same image has two labels"]),
    ],
)
def test_mistakes_in_a_table(place: Path, text: str, words: list[str]) -> None:
    message = complaint(table(place, text))
    for word in words:
        assert word in message


def test_tables_that_are_none(place: Path) -> None:
    assert "is a folder" in complaint(DataSection(source="csv", path=str(place / "images")))
    assert "no such file" in complaint(DataSection(source="csv", path=str(place / "none.csv")))
    assert "source = 'csv'" in complaint(DataSection(path=table(place, "path,label\n").path))
    (place / "latin.csv").write_bytes("path,label\nä.png,ring\n".encode("latin-1"))
    assert "UTF-8" in complaint(DataSection(source="csv", path=str(place / "latin.csv")))


def test_groups_and_times_that_are_asked_for(place: Path) -> None:
    path = table(place, "path,label,group,time\n" + ROWS.replace("\n", ",,\n")).path
    for by in ("group", "time"):
        message = complaint(DataSection(source="csv", path=path, by=by))  # type: ignore[arg-type]
        assert f"3 of 3 images have no {by}" in message and "by = 'stratified'" in message
    some = "path,label,group\n" + ROWS.replace("\n", ",\n").replace("000.png,ring,", "000.png,ring,one")
    assert "2 of 3 images have no group" in complaint(table(place, some))
    wrong = "path,label,time\n" + ROWS.replace("\n", ",31.12.26\n")
    message = complaint(DataSection(source="csv", path=table(place, wrong).path, by="time"))
    assert "3 x time is a year of two digits" in message and "first in line 2" in message


def test_a_later_source_corrects_labels_of_an_earlier_one_if_it_may(place: Path) -> None:
    """Labels that people corrected after an earlier export, by another file with the same bytes or by the same file."""
    (place / "one.csv").write_text("path,label\nagain/a.jpg,triangle\n")
    (place / "two.csv").write_text("path,label\nimages/ring/000.png,triangle\nagain/a.jpg,ring\n")
    (place / "again").mkdir()
    shutil.copy(place / "images/square/001.jpg", place / "again/a.jpg")
    more = tuple(Source(source="csv", path=str(place / f"{name}.csv")) for name in ("one", "two"))
    data = DataSection(path=str(place / "images"), more=more)
    with pytest.raises(DataError, match="3 images have two labels"):
        build_index(data)
    index = build_index(msgspec.structs.replace(data, corrections=True))
    before = build_index(DataSection(path=str(place / "images")))
    labels = {image.sha256: image.label for image in index.images}
    changed = {image.path: labels[image.sha256] for image in before.images if labels[image.sha256] != image.label}
    assert changed == {str(place / "images/ring/000.png"): "triangle", str(place / "images/square/001.jpg"): "ring"}
    assert len(index.images) == len(before.images)
    assert [(copy.label, first.label) for copy, first in index.copies] == [("square", "triangle")], "groups are linked"
    assert any("2 images are corrected by a later source, e.g." in remark for remark in index.remarks), index.remarks
    (place / "two.csv").write_text("path,label\nagain/a.jpg,ring\nagain/a.jpg,square\n")
    assert "two labels" in complaint(msgspec.structs.replace(data, corrections=True)), "one source contradicts itself"


@pytest.mark.parametrize("seed", range(4))
def test_a_corrected_image_does_not_carry_its_group_into_another_split(seed: int, tmp_path: Path) -> None:
    """It comes again from another camera: what else its first group has stays in the same split."""
    draw_folder(tmp_path / "images", count=12, width=48, height=48, labels=("circle", "cross"))
    files = [(label, number, ".jpg" if number % 2 else ".png") for label in ("circle", "cross") for number in range(12)]
    rows = [f"images/{label}/{number:03}{ending},{label},{label}{number // 2}\n" for label, number, ending in files]
    (tmp_path / "first.csv").write_text("path,label,group\n" + "".join(rows))
    shutil.copy(tmp_path / "images/circle/000.png", tmp_path / "again.png")
    (tmp_path / "fix.csv").write_text("path,label,group\nagain.png,cross,camera\n")
    more = (Source(source="csv", path=str(tmp_path / "fix.csv")),)
    data = DataSection(source="csv", path=str(tmp_path / "first.csv"), more=more, corrections=True)
    split = split_index(build_index(data), data, seed)
    where = {image.group: name for name in SPLITS for image in getattr(split, name)}
    assert where["camera"] == where["circle0"]


def test_sources_are_joined_by_label(place: Path) -> None:
    draw_folder(place / "more", count=5, width=40, height=36, labels=("square",))
    (place / "table.csv").write_text("path,label\nmore/square/003.jpg,triangle\n")
    data = DataSection(
        path=str(place / "images"),
        more=(Source(path=str(place / "more")), Source(source="csv", path=str(place / "table.csv"))),
    )
    with pytest.raises(DataError, match="the same image has two labels"):
        build_index(data)
    cv2.imwrite(str(place / "another.png"), draw_shape("triangle", 9, 40, 36))
    (place / "table.csv").write_text("path,label\nanother.png,triangle\n")
    index = build_index(data)
    assert index.counts() == {"ring": 3, "square": 5, "triangle": 1}
    assert len(index.copies) == 3  # the first three squares of both folders are drawn alike


def test_fingerprint_follows_every_file(place: Path) -> None:
    data = DataSection(
        source="csv", path=table(place, "path,label\n" + ROWS).path, more=(Source(path=str(place / "x")),)
    )
    draw_folder(place / "x", count=1, width=40, height=36, labels=("ring",))
    seen = {fingerprint(data)}
    for change in (
        lambda: (place / "images/ring/000.png").write_bytes(b"1"),
        lambda: (place / "x/ring/000.png").write_bytes(b"2"),
        lambda: (place / "table.csv").write_text("path,label\n" + ROWS + "images/square/001.jpg,square\n"),
        lambda: (place / "images/square/001.jpg").unlink(),
    ):
        change()
        assert fingerprint(data) not in seen
        seen.add(fingerprint(data))
    assert fingerprint(data) in seen


@pytest.mark.parametrize(
    ("mode", "suffix", "wanted"),
    [
        ("L", "png", ("grey", 8)),
        ("LA", "png", ("grey+alpha", 8)),
        ("RGB", "png", ("colour", 8)),
        ("P", "png", ("colour", 8)),
        ("RGBA", "png", ("colour+alpha", 8)),
        ("I;16", "png", ("grey", 16)),
        ("1", "png", ("grey", 1)),
        ("L", "jpg", ("grey", 8)),
        ("RGB", "jpg", ("colour", 8)),
        ("CMYK", "jpg", ("colour", 8)),
        ("L", "tif", ("grey", 8)),
        ("RGB", "webp", ("colour", 8)),
        ("RGB", "bmp", ("colour", 8)),
    ],
)
def test_index_tells_size_and_mode(place: Path, mode: str, suffix: str, wanted: tuple[str, int]) -> None:
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(place / "images/ring" / f"made.{suffix}")
    index = build_index(DataSection(path=str(place / "images")))
    made = next(p for p in index.images if "made" in p.path)
    look = index.files[made.sha256]
    assert (look.mode, look.bits) == wanted
    assert (look.width, look.height) == (60, 40)


def test_no_pixels_are_kept(tmp_path: Path) -> None:
    """Sixty images of 3 MB each, decoded: the index stays far below that."""
    for label, level in (("dark", 40), ("light", 200)):
        (tmp_path / label).mkdir()
        for number in range(30):
            flat = np.full((1000, 1000, 3), level, dtype=np.uint8)
            flat[: 10 * number + 10] = 0
            cv2.imwrite(str(tmp_path / label / f"{number}.png"), flat)
    tracemalloc.start()
    index: Index = build_index(DataSection(path=str(tmp_path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.images) == 60
    assert peak < 40e6


def test_contradictions_of_tables_name_their_lines_in_one_message(place: Path) -> None:
    """A file named twice, by a link, by another path and in a second table: each label against the first."""
    (place / "link.png").symlink_to(place / "images/ring/000.png")
    one = "path,label\n" + ROWS + "images/../images/ring/001.jpg,square\nlink.png,square\n"
    (place / "two.csv").write_text("path,label\nimages/square/000.png,ring\nimages/ring/002.png,ring\n")
    data = DataSection(
        source="csv", path=table(place, one).path, more=(Source(source="csv", path=str(place / "two.csv")),)
    )
    with pytest.raises(DataError) as caught:
        build_index(data)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("3 images have two labels") and "eyas labels check" in head
    expected = [("000.png", 2, "link.png", "table.csv line 6"), ("square/000.png", 4, "000.png", "two.csv line 2")]
    for first, line, second, where in expected:
        assert any(
            f"{first} (" in text and f"line {line})" in text and second in text and where in text for text in lines
        )
    assert any("ring/001.jpg (ring," in text and "ring/001.jpg (square," in text for text in lines)


def test_copies_in_two_groups_or_named_twice_are_said(place: Path) -> None:
    (place / "copy.png").write_bytes((place / "images/ring/000.png").read_bytes())
    text = "path,label,group\n" + ROWS.replace("\n", ",a\n") + "copy.png,ring,b\nimages/square/000.png,square,a\n"
    remarks = " | ".join(build_index(table(place, text)).remarks)
    assert "1 file is named twice, e.g. " in remarks and "square/000.png: taken once" in remarks
    assert "1 image is in two groups, e.g. " in remarks and "'a' and 'b'" in remarks


def test_copies_in_two_given_splits_are_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw_folder(tmp_path / split, count=2, labels=("ring", "square"))
    index = build_index(DataSection(path=str(tmp_path), by="folders"))
    assert "4 images lie in two splits, e.g. " in index.remarks[0] and {p.split for p in index.images} == {"test"}


def divided_table(place: Path, splits: dict[str, str], **settings: object) -> DataSection:
    """A table of six images of each label; `splits` maps the number of an image to its cell, train by default."""
    draw_folder(place / "more", count=6, width=40, height=36, labels=("ring", "square"))
    rows = [
        f"{path.relative_to(place)},{path.parent.name},{splits.get(path.stem, 'Train')}"
        for path in sorted((place / "more").rglob("*.*g"))
    ]
    data = table(place, "path,label,Split\n" + "\n".join(rows))
    return msgspec.structs.replace(data, near_duplicates=0, **settings)


def test_a_column_of_splits_is_kept(place: Path) -> None:
    data = divided_table(place, {"001": "VAL", "002": "valid", "003": "testing"}, by="column")
    split = split_index(build_index(data), data, seed=0)
    stems = {name: {Path(image.path).stem for image in getattr(split, name)} for name in SPLITS}
    assert stems == {"train": {"000", "004", "005"}, "validation": {"001", "002"}, "test": {"003"}}


@pytest.mark.parametrize(
    ("splits", "settings", "words"),
    [
        ({"001": "val"}, {}, "its column split divides the images already: set [data] by = 'column' to keep that"),
        ({"001": "fold 1"}, {"by": "column"}, "split is not train, validation or test, first in line 3 (fold 1)"),
        ({"004": ""}, {"by": "column"}, "2 x split is not train, validation or test, first in line 6, line 12"),
        (dict.fromkeys(["000", "001", "002", "003", "004", "005"], "test"), {"by": "column"}, "no training images"),
    ],
)
def test_columns_of_splits_that_cannot_be_kept(
    place: Path, splits: dict[str, str], settings: dict[str, object], words: str
) -> None:
    assert words in complaint(divided_table(place, splits, **settings))
