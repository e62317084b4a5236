"""Class folders as people have them: divided already, one level too deep, linked, with litter, in odd names."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import cv2
import msgspec
import pytest

from eyas_host.data.class_folders import BESIDE, inspect_folder, list_class_folders
from eyas_host.data.index import build_index
from eyas_host.data.sources import fingerprint
from eyas_host.data.split import split_index
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from tests.support.shapes import SHAPES, draw_shape


def draw(root: Path, *, count: int = 4, labels: tuple[str, ...] = ("ring", "square"), start: int = 0) -> Path:
    """Class folders of these names; other numbers from `start` are other images."""
    for number, label in enumerate(labels):
        (root / label).mkdir(parents=True, exist_ok=True)
        for seed in range(start, start + count):
            image = draw_shape(SHAPES[number % len(SHAPES)], 1000 * number + seed, 40, 36)
            (root / label / f"{seed:03d}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return root


def section(path: Path, **changes: object) -> DataSection:
    return msgspec.structs.replace(DataSection(path=str(path), near_duplicates=0), **changes)


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """A set that is divided already; Validation has another spelling."""
    for number, (name, count) in enumerate((("train", 8), ("Val", 3), ("testing", 4))):
        draw(tmp_path / "set" / name, count=count, start=100 * number)
    return tmp_path / "set"


def test_splits_are_no_classes(divided: Path) -> None:
    with pytest.raises(DataError, match="is divided already: Val, testing, train are splits") as caught:
        build_index(section(divided))
    assert "by = 'folders'" in str(caught.value)


def test_a_given_division_is_kept(divided: Path) -> None:
    data = section(divided, by="folders")
    index = build_index(data)
    assert index.labels == ("ring", "square")
    manifest = split_index(index, data, 0)
    where = {Path(image.path).parts[-3] for image in manifest.train}
    assert where == {"train"}
    assert {Path(image.path).parts[-3] for image in manifest.validation} == {"Val"}
    assert {Path(image.path).parts[-3] for image in manifest.test} == {"testing"}
    assert [sum(counts.values()) for counts in manifest.counts.values()] == [16, 6, 8]
    assert split_index(index, data, 1).train == manifest.train, "the seed has no say"
    assert "split" not in msgspec.to_builtins(manifest.train[0]), "the manifest names it once"


def test_a_split_without_a_folder_takes_training_images(tmp_path: Path) -> None:
    draw(tmp_path / "set" / "Training", count=20)
    draw(tmp_path / "set" / "holdout", count=5, start=100)
    data = section(tmp_path / "set", by="folders")
    manifest = split_index(build_index(data), data, 0)
    assert {Path(image.path).parts[-3] for image in manifest.test} == {"holdout"}
    assert {Path(image.path).parts[-3] for image in (*manifest.train, *manifest.validation)} == {"Training"}
    sizes = [sum(counts.values()) for counts in manifest.counts.values()]
    assert sum(sizes[:2]) == 40
    assert 4 <= sizes[1] <= 8
    assert sizes[2] == 10


def test_a_copy_in_two_splits_stays_in_the_test_set(divided: Path) -> None:
    source = next((divided / "testing" / "ring").iterdir())
    (divided / "train" / "ring" / "copied.png").write_bytes(source.read_bytes())
    data = section(divided, by="folders")
    manifest = split_index(build_index(data), data, 0)
    assert manifest.copies == 1
    assert sum(manifest.counts["test"].values()) == 8
    assert sum(manifest.counts["train"].values()) == 16


def test_years_below_classes_are_no_splits(tmp_path: Path) -> None:
    for label in ("circle", "cross"):
        draw(tmp_path / label, count=2, labels=("2021", "2022"))
    assert {label: len(files) for label, files in list_class_folders(tmp_path).classes.items()} == {
        "circle": 4,
        "cross": 4,
    }


@pytest.mark.parametrize("labels", [("train", "bus"), ("dev", "prod")])
def test_classes_that_are_called_like_a_split_stay_classes(labels: tuple[str, str], tmp_path: Path) -> None:
    draw(tmp_path, labels=labels)
    assert set(list_class_folders(tmp_path).classes) == set(labels)


def test_one_level_too_deep_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "ds" / "data")
    with pytest.raises(DataError) as caught:
        list_class_folders(tmp_path / "ds")
    assert str(caught.value).endswith(f"did you mean {tmp_path / 'ds' / 'data'}?")


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    draw(tmp_path)
    for name in ("ring/a.heic", "ring/b.heic", "square/c.gif", "loose.png", "square/._000.png", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    found = inspect_folder(tmp_path)
    assert sum(map(len, found.classes.values())) == 8
    assert found.left_out == {".heic": 2, ".gif": 1, "hidden": 1, BESIDE: 1}
    assert build_index(section(tmp_path)).left_out == found.left_out


def test_a_class_of_unknown_files_says_what_is_in_it(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"phone \(1 \.heic\)"):
        list_class_folders(tmp_path)


def test_links_into_a_store_keep_their_own_names(tmp_path: Path) -> None:
    draw(tmp_path / "drawn")
    for number, path in enumerate(sorted((tmp_path / "drawn").rglob("*.*"))):
        (tmp_path / "store").mkdir(exist_ok=True)
        target = tmp_path / "store" / f"{number:064x}"
        path.rename(target)
        link = tmp_path / "set" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    index = build_index(section(tmp_path / "set"))
    assert len(index.images) == 8
    assert all(Path(image.path).parent.name == image.label and Path(image.path).suffix for image in index.images)


def test_what_lies_behind_a_link_changes_the_fingerprint(tmp_path: Path) -> None:
    draw(tmp_path / "set")
    draw(tmp_path / "elsewhere", labels=("third",), start=50)
    (tmp_path / "set" / "third").symlink_to(tmp_path / "elsewhere" / "third")
    data = section(tmp_path / "set")
    before = fingerprint(data)
    assert build_index(data).counts()["third"] == 4
    draw(tmp_path / "elsewhere", labels=("third",), count=6, start=50)
    assert fingerprint(data) != before


def test_labels_in_two_forms_of_unicode_are_refused_by_both_names(tmp_path: Path) -> None:
    name = "Gerät"
    assert unicodedata.normalize("NFD", name) != name
    draw(tmp_path, labels=(unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), "ok"))
    with pytest.raises(DataError, match=r"two forms of Unicode \('Gera\\u0308t' and 'Ger\\xe4t'\)"):
        list_class_folders(tmp_path)


def test_a_label_is_the_same_from_every_system(tmp_path: Path) -> None:
    draw(tmp_path, labels=(unicodedata.normalize("NFD", "Gerät"), "ok"))
    assert set(list_class_folders(tmp_path).classes) == {"Ger\u00e4t", "ok"}


@pytest.mark.parametrize("labels", [("a b", "a\u00a0b", "c"), ("OK1", "OK\uff11", "c")])
def test_labels_that_nobody_can_tell_apart_are_refused(labels: tuple[str, ...], tmp_path: Path) -> None:
    draw(tmp_path, labels=labels)
    with pytest.raises(DataError, match=r"look the same|invisible character"):
        build_index(section(tmp_path))


def test_a_folder_with_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / os.fsdecode(b"kreis\xfc")).mkdir()
    with pytest.raises(DataError, match=r"kreis\\xfc.*not UTF-8"):
        list_class_folders(tmp_path)


def test_contradictions_come_in_one_message(tmp_path: Path) -> None:
    draw(tmp_path, count=14)
    for path in sorted((tmp_path / "ring").iterdir())[:12]:
        (tmp_path / "square" / f"copy-{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(DataError) as caught:
        build_index(section(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("12 images have two labels")
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more"
