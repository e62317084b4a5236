"""Class folders as people have them: divided already, one level too deep, linked, with litter, in odd names."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import cv2
import msgspec
import pytest

from eyas_device.support.image_files import BROKEN, LISTED, NO_SUFFIX
from eyas_host.data.class_folders import BESIDE, inspect_folder, list_class_folders, list_divided
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


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Train", "TEST"), {"train", "test"}),
        (("TRAINING", "valid", "test1"), {"train", "validation", "test"}),
        (("train_set", "Validation-Set", "test_set"), {"train", "validation", "test"}),
        (("trainImages", "devImages", "holdout"), {"train", "validation", "test"}),
        (("01_train", "02_val"), {"train", "validation"}),
        (("trainset", "hold-out"), {"train", "test"}),
        (("train2017", "val2017"), {"train", "validation"}),
        (("Training Data", "held out data"), {"train", "test"}),
        (("train",), {"train"}),
    ],
)
def test_splits_are_known_in_every_spelling(names: tuple[str, ...], splits: set[str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        draw(tmp_path / name, count=1, start=10 * number)
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    found = inspect_folder(tmp_path)
    assert set(found.classes) == {"ring", "square"}
    assert set(found.splits) == set(names)
    assert set(list_divided(tmp_path)) == splits
    assert found.left_out == {".md": 1}
    with pytest.raises(DataError, match="is divided already"):
        list_class_folders(tmp_path)


def test_a_division_with_more_beside_it_is_refused_by_the_name(divided: Path) -> None:
    draw(divided / "extra", count=1, start=500)
    (divided / "annotations").mkdir()
    with pytest.raises(DataError, match=r"images lie in extra, too, which is no split"):
        inspect_folder(divided)


def test_a_folder_of_other_files_beside_splits_is_counted(divided: Path) -> None:
    (divided / "annotations").mkdir()
    (divided / "annotations" / "train.json").write_text("{}", encoding="utf-8")
    (divided / "train" / "loose.png").write_bytes(b"x")
    assert inspect_folder(divided).left_out == {".json": 1, BESIDE: 1}


def test_test_images_without_labels_are_said(tmp_path: Path) -> None:
    draw(tmp_path / "train")
    for number in range(3):
        (tmp_path / "test1").mkdir(exist_ok=True)
        (tmp_path / "test1" / f"{number}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"test1: 3 images in no class folder.*move the folder away"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("inner", ["", "ring"])
def test_a_split_without_images_is_said(inner: str, divided: Path) -> None:
    shutil.rmtree(divided / "Val")
    (divided / "Val" / inner).mkdir(parents=True)
    with pytest.raises(DataError, match=r"Val: .*(no images|without images: ring \(empty\))"):
        inspect_folder(divided)


def test_splits_of_loose_images_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat.0.jpg").write_bytes(name.encode())
    with pytest.raises(DataError, match=r"train: 1 image in no class folder|test: 1 image in no class folder"):
        inspect_folder(tmp_path)


def test_all_splits_that_lack_classes_are_said_at_once(divided: Path) -> None:
    draw(divided / "train", labels=("ring", "square", "third"), start=700, count=1)
    shutil.rmtree(divided / "Val" / "ring")
    with pytest.raises(DataError, match=r"validation has no ring, third; test has no third|test has no third"):
        inspect_folder(divided)


def test_a_class_that_a_split_lacks_is_said_by_the_split_too(divided: Path) -> None:
    draw(divided / "train", labels=("ring", "square", "third"), start=700, count=4)
    data = section(divided, by="folders")
    with pytest.raises(
        DataError, match=r"none of third \(the folders have 'third' in train alone\); every split needs"
    ):
        split_index(build_index(data), data, 0)


@pytest.mark.parametrize("middle", ["images", "train"])
def test_class_folders_too_deep_in_each_split_are_said(middle: str, tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        draw(tmp_path / name / (middle if middle == "images" else name), start=10 * number)
    with pytest.raises(DataError, match="one level too deep"):
        inspect_folder(tmp_path)


def test_two_folders_of_one_split_are_said(divided: Path) -> None:
    draw(divided / "training", start=900, count=1)
    with pytest.raises(DataError, match="two folders are the train split"):
        inspect_folder(divided)


@pytest.mark.parametrize("labels", [("train", "bus"), ("dev", "prod"), ("valid", "invalid"), ("test strip", "other")])
def test_classes_that_are_called_like_a_split_stay_classes(labels: tuple[str, str], tmp_path: Path) -> None:
    draw(tmp_path, labels=labels)
    assert set(list_class_folders(tmp_path).classes) == set(labels)


def test_one_level_too_deep_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "ds" / "data")
    with pytest.raises(DataError) as caught:
        list_class_folders(tmp_path / "ds")
    assert str(caught.value).endswith(f"did you mean {tmp_path / 'ds' / 'data'}?")


def test_levels_too_deep_are_said_through_every_folder(tmp_path: Path) -> None:
    draw(tmp_path / "ds" / "data" / "images")
    (tmp_path / "ds" / "README.md").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"did you mean .*/ds/data/images\?"):
        list_class_folders(tmp_path / "ds")
    (tmp_path / "ds" / "docs").mkdir()
    with pytest.raises(DataError, match=r"without images: docs \(empty\).*did you mean .*/ds/data/images\?"):
        list_class_folders(tmp_path / "ds")


def test_a_division_too_deep_is_said(divided: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean .*/set\?"):
        inspect_folder(divided.parent)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("1.png", "2.jpg"), "2 images lie in no folder: sort them"),
        (("ds.zip",), r"found 0 \(none\); 1 file left out: 1 \.zip"),
        ((), r"found 0 \(none\)$"),
    ],
)
def test_a_folder_without_folders_says_what_it_has(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        inspect_folder(tmp_path)


def test_what_may_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    for label in ("images", "masks"):
        draw(tmp_path / "a" / label, count=1, start=100 * len(label))
    assert ["are no classes" in doubt for doubt in inspect_folder(tmp_path / "a").doubts] == [True]
    draw(tmp_path / "b" / "train", count=1)
    draw(tmp_path / "b", labels=("unlabelled",), count=1, start=50)
    assert ["train is taken as a class" in doubt for doubt in inspect_folder(tmp_path / "b").doubts] == [True]
    for label in ("circle", "cross"):
        draw(tmp_path / "c" / label, count=1, labels=("2021", "2022"), start=len(label))
    assert inspect_folder(tmp_path / "c").doubts == ()


def test_labels_that_the_split_refuses_get_no_recipe(tmp_path: Path) -> None:
    draw(tmp_path, labels=("ring", "Ring", "square"))
    with pytest.raises(DataError, match="look the same"):
        inspect_folder(tmp_path)


def test_a_class_linked_into_another_keeps_its_images(tmp_path: Path) -> None:
    draw(tmp_path, labels=("a", "b"))
    (tmp_path / "a" / "more").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = inspect_folder(tmp_path)
    assert {label: len(files) for label, files in found.classes.items()} == {"a": 4, "b": 4}
    assert found.left_out == {LISTED: 2}


def test_a_link_to_itself_is_no_trouble_in_a_split(divided: Path) -> None:
    for name in ("loop.png", "loop"):
        (divided / "train" / name).symlink_to(name)
    assert inspect_folder(divided).left_out == {BROKEN: 1, NO_SUFFIX: 1}


def test_a_class_twice_is_said(tmp_path: Path) -> None:
    draw(tmp_path, labels=("a", "b"))
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(DataError, match=r"without images: c \("):
        inspect_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("file", "is a file"), ("nothing", "no such folder"), ("x" * 300, "too long")]
)
def test_what_is_no_folder_is_said(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for listing in (inspect_folder, list_class_folders, list_divided):
        with pytest.raises(DataError, match=said):
            listing(tmp_path / name)


def test_a_path_that_is_no_text_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / os.fsdecode(b"pics\xfc")
    draw(inner / "set")
    with pytest.raises(DataError, match=r"pics\\xfc/set': the path is not UTF-8"):
        inspect_folder(inner / "set")
    monkeypatch.chdir(inner)
    with pytest.raises(DataError, match="the path is not UTF-8"):
        build_index(section(Path("set")))


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    draw(tmp_path)
    for name in ("ring/a.heic", "ring/b.heic", "square/c.gif", "loose.png", "square/._000.png", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    found = inspect_folder(tmp_path)
    assert sum(map(len, found.classes.values())) == 8
    assert found.left_out == {".heic": 2, ".gif": 1, "hidden": 1, ".md": 1, BESIDE: 1}
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


def test_what_is_left_out_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    draw(tmp_path / "set")
    data = section(tmp_path / "set")
    before = fingerprint(data)
    for name in ("ring/a.heic", "square/.x.png", "loose.png", "@eaDir/t.jpg", "README.md", "ring/part.png.part"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
        assert fingerprint(data) == before, name
    (tmp_path / "set" / "ring" / "new.png").write_bytes(b"x")
    assert fingerprint(data) != before


def test_the_fingerprint_of_a_division_knows_all_splits(divided: Path) -> None:
    data = section(divided, by="folders")
    before = fingerprint(data)
    (divided / "loose.png").write_bytes(b"x")
    assert fingerprint(data) == before
    os.utime(divided / "Val" / "ring" / "100.png", (1, 1))
    assert fingerprint(data) != before


@pytest.mark.parametrize("linked", ["file", "folder", "class", "root"])
def test_a_link_that_leads_elsewhere_changes_the_fingerprint(linked: str, tmp_path: Path) -> None:
    """Also where sizes and times of both files are the same, as in stores that write every time as 1."""
    for version in ("v1", "v2"):
        draw(tmp_path / version, count=2)
    for path in (tmp_path / "v1").rglob("*.png"):
        twin = tmp_path / "v2" / path.relative_to(tmp_path / "v1")
        size = max(path.stat().st_size, twin.stat().st_size)
        for one in (path, twin):
            one.write_bytes(one.read_bytes().ljust(size, b"x"))
            os.utime(one, (1, 1))
    root = tmp_path / "set"
    if linked == "root":
        link, target = root, ""
        root.symlink_to(tmp_path / "v1")
    else:
        shutil.copytree(tmp_path / "v1", root)
        link, target = {
            "file": (root / "ring" / "linked.png", "ring/000.png"),
            "folder": (root / "ring" / "more", "ring"),
            "class": (root / "third", "ring"),
        }[linked]
        link.symlink_to(tmp_path / "v1" / target)
    data = section(root)
    before = fingerprint(data)
    assert fingerprint(data) == before
    link.unlink()
    link.symlink_to(tmp_path / "v2" / target)
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


def test_an_image_with_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    draw(tmp_path)
    for name in (b"ring/\xfc.png", b"ring/\xfe/1.jpg", b"ring/\xfc.txt", b"@eaDir/\xfc.png"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"2 images have names that are not UTF-8, e\.g\. b'.*ring/\\xfc\.png'; rename"):
        inspect_folder(tmp_path)


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
