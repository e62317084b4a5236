"""`eyas split` and `eyas preview` from outside: planted leaks are caught, mistakes end in one line, nothing is left."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import msgspec
import pytest

from eyas_host.data.split import SplitManifest
from tests.support import inside
from tests.support.shapes import SHAPES, draw_folder, draw_shape

LABELS = SHAPES[:3]


def eyas(verb: str, place: Path, *settings: str, data: str = 'path = "images"') -> inside.Done:
    (place / "recipe.toml").write_text(f'[run]\nname = "toy"\n[data]\n{data}\n')
    return inside.eyas(place, verb, "recipe.toml", *(word for setting in settings for word in ("--set", setting)))


def divided(place: Path, *settings: str, data: str = 'path = "images"') -> tuple[SplitManifest, str]:
    done = eyas("split", place, *settings, data=data)
    assert done.code == 0, done.err
    path = place / "runs/toy/split/manifest.json"
    return msgspec.json.decode(path.read_bytes(), type=SplitManifest), done.err


def sides(manifest: SplitManifest) -> dict[str, str]:
    """Path below the images -> part."""
    return {
        "/".join(Path(p.path).parts[-2:]): part
        for part in ("train", "validation", "test")
        for p in getattr(manifest, part)
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    draw_folder(tmp_path / "images", count=30, width=120, height=100, labels=LABELS)
    return tmp_path


# Planted leaks


def test_the_same_image_twice_is_dropped(place: Path) -> None:
    for number in range(0, 30, 3):
        for suffix in ("png", "jpg"):
            source = place / f"images/ring/{number:03d}.{suffix}"
            if source.exists():
                shutil.copy(source, source.with_name(f"zz-copy-{number}.{suffix}"))
    manifest, told = divided(place)
    assert manifest.copies == 10 and "10 exact copies dropped" in told
    assert not any("copy" in path for path in sides(manifest))
    with (place / "runs/toy/split/index.csv").open(newline="") as stream:
        parts = [row["split"] for row in csv.DictReader(stream)]
    assert len(parts) == 100 and sum(part.startswith("copy of ") for part in parts) == 10


def spoilt(image: Path, name: str, how: Callable[[Path], tuple[object, Sequence[int]]]) -> str:
    pixels, options = how(image)
    made = image.with_name(name)
    assert cv2.imwrite(str(made), pixels, options)
    return f"{made.parent.name}/{made.name}"


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("jpg", lambda path: (cv2.imread(str(path)), [cv2.IMWRITE_JPEG_QUALITY, 60])),
        ("webp", lambda path: (cv2.imread(str(path)), [cv2.IMWRITE_WEBP_QUALITY, 70])),
        ("png", lambda path: (cv2.resize(cv2.imread(str(path)), (84, 70), interpolation=cv2.INTER_AREA), [])),
        ("png", lambda path: (cv2.convertScaleAbs(cv2.imread(str(path)), alpha=0.9, beta=4), [])),
    ],
    ids=["jpeg", "webp", "smaller", "darker"],
)
def test_a_changed_copy_stays_with_its_image(
    place: Path, suffix: str, how: Callable[[Path], tuple[object, Sequence[int]]]
) -> None:
    twins = {}
    for label in LABELS:
        for image in sorted((place / "images" / label).iterdir())[::2]:
            twins[f"{label}/{image.name}"] = spoilt(image, f"{image.stem}-again.{suffix}", how)
    manifest, told = divided(place)
    side = sides(manifest)
    assert len(side) == 90 + len(twins) and len(twins) == 45
    assert all(side[one] == side[two] for one, two in twins.items())
    assert f"near-duplicates in {len(manifest.clusters)} clusters kept together" in told
    blind, _ = divided(place, "data.near_duplicates=0")
    leaks = [one for one, two in twins.items() if sides(blind)[one] != sides(blind)[two]]
    assert len(leaks) > 5  # the leak is there for those who do not look


def test_the_same_group_twice_stays_on_one_side(place: Path) -> None:
    """Two lines report the same patients: one table each, joined."""
    for number, line in enumerate(("north", "south")):
        with (place / f"{line}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["path", "label", "group"])
            for label in LABELS:
                images = sorted((place / "images" / label).iterdir())[number::2]
                rows.writerows(
                    (p.relative_to(place), label, f"patient {place_of % 13}") for place_of, p in enumerate(images)
                )
    data = 'source = "csv"\npath = "north.csv"\nmore = [{ source = "csv", path = "south.csv" }]'
    manifest, told = divided(place, data=data)
    assert manifest.by == "group" and "13 groups" in told and "by group" in manifest.strategy
    seen = [{p.group for p in getattr(manifest, part)} for part in ("train", "validation", "test")]
    assert len(set.union(*seen)) == 13 == sum(map(len, seen))
    blind, _ = divided(place, "data.by=stratified", data=data)
    assert {p.group for p in blind.train} & {p.group for p in blind.test}
    folds = [divided(place, f"data.fold=[{k}, 3]", data=data)[0].test for k in range(3)]
    assert sum(len({p.group for p in fold}) for fold in folds) == 13 and sum(map(len, folds)) == 90


def test_time_order_with_a_gap(place: Path) -> None:
    with (place / "table.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "time"])
        images = sorted((place / "images").rglob("*.*g"), key=lambda p: p.name)
        rows.writerows(
            (p.relative_to(place), p.parent.name, f"2026-{1 + n // 28:02}-{1 + n % 28:02}")
            for n, p in enumerate(images)
        )
    manifest, told = divided(place, "data.by=time", "data.gap_days=2", data='source = "csv"\npath = "table.csv"')
    times = [[p.time for p in getattr(manifest, part)] for part in ("train", "validation", "test")]
    assert max(times[0]) + 2 * 86400 <= min(times[1]) and max(times[1]) + 2 * 86400 <= min(times[2])
    assert "4 set aside (gap)" in told and sum(map(len, manifest.set_aside.values())) == 4


# Mistakes


def rows(place: Path, header: str, cells: Callable[[int, str], str]) -> None:
    lines = [
        f"{path.relative_to(place)},{path.parent.name}{cells(number, path.parent.name)}"
        for number, path in enumerate(sorted((place / "images").rglob("*.*g")))
    ]
    (place / "table.csv").write_text("\n".join([header, *lines]) + "\n")


def one_class(place: Path) -> None:
    shutil.rmtree(place / "images/ring")
    shutil.rmtree(place / "images/circle")


def two_images(place: Path) -> None:
    for path in sorted((place / "images/ring").iterdir())[2:]:
        path.unlink()


def two_labels(place: Path) -> None:
    shutil.copy(place / "images/ring/000.png", place / "images/cross/000-too.png")


def zero_bytes(place: Path) -> None:
    (place / "images/ring/000.png").write_bytes(b"")


def large_group(place: Path) -> None:
    rows(place, "path,label,group", lambda n, _: f",{'all' if n % 10 else n}")


def one_group_a_class(place: Path) -> None:
    rows(place, "path,label,group", lambda n, label: f",{n // 3 if label != 'ring' else 'r' + str(n % 2)}")


def german_times(place: Path) -> None:
    rows(place, "path,label,time", lambda n, _: f",{1 + n % 28}.12.2026")


def short_times(place: Path) -> None:
    rows(place, "path,label,time", lambda n, _: f",2026-01-{1 + n % 28:02}")


def no_columns(place: Path) -> None:
    rows(place, "file,class", lambda n, _: "")


def wrong_paths(place: Path) -> None:
    rows(place, "path,label", lambda n, _: "")
    (place / "images").rename(place / "moved")


TABLE = 'source = "csv"\npath = "table.csv"'


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (one_class, 'path = "images"', ["two or more class folders are needed, found 1 (cross)"]),
        (two_images, 'path = "images"', ["would have none of ring", "add images"]),
        (two_labels, 'path = "images"', ["the same image has two labels", "(cross)", "(ring)"]),
        (zero_bytes, 'path = "images"', ["1 unreadable image;", "skip_unreadable", "0 bytes"]),
        (large_group, TABLE, ["group 'all' holds 81 of 90", "change [data] split"]),
        (one_group_a_class, TABLE, ["'ring' comes in 2 groups (r0, r1)", "add groups"]),
        (german_times, TABLE + '\nby = "time"', ["90 x time is neither ISO 8601", "first in line 2"]),
        (short_times, TABLE + '\nby = "time"\ngap_days = 9', ["span 27 days", "take less than gap_days = 9"]),
        (short_times, TABLE + '\nby = "time"\nfold = [0, 5]', ["by = 'time' has no folds"]),
        (short_times, TABLE + '\nby = "group"', ["90 of 90 images have no group"]),
        (short_times, TABLE + "\ngap_days = 2", ["gap_days belongs to by = 'time'"]),
        (no_columns, TABLE, ["the columns are file, class", "path,label[,group,time]"]),
        (wrong_paths, TABLE, ["90 x no such file", "relative to"]),
        (one_class, 'path = "images"\nby = "time"', ["source = 'csv' is needed"]),
        (one_class, 'path = "images"\nmore = [{ file = "x" }]', ["[data] more", "file"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_mistakes_are_told_in_a_line(place: Path, make: Callable[[Path], None], data: str, words: list[str]) -> None:
    make(place)
    done = eyas("split", place, data=data)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert sum(line.startswith("eyas: ") for line in done.err.splitlines()) == 1
    for word in words:
        assert word in done.err, done.err
    assert not [p for pattern in ("manifest.json", "index.csv", "stage.json", "*.part") for p in place.rglob(pattern)]


def test_unreadable_images_are_listed_where_they_are_allowed(place: Path) -> None:
    zero_bytes(place)
    manifest, told = divided(place, "data.skip_unreadable=true")
    assert len(manifest.unreadable) == 1 and "1 unreadable left out" in told and "left out: " in told
    with (place / "runs/toy/split/index.csv").open(newline="") as stream:
        (line,) = [row for row in csv.DictReader(stream) if row["split"].startswith("unreadable")]
    assert line["path"].endswith("ring/000.png") and "0 bytes" in line["split"]


# The verbs


def test_help_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = inside.eyas(tmp_path, "split", "--help")
    assert done.code == 0
    for word in ("path,label[,group,time]", 'by = "time"', "near_duplicates", "index.csv", "access.jsonl", "gap_days"):
        assert word in done.out


def test_preview_prints_where_the_sheet_is(place: Path) -> None:
    cv2.imwrite(str(place / "images/ring/wide.png"), draw_shape("ring", 99, 300, 60))
    done = eyas("preview", place, "augment.randaugment=1", "augment.mixup=0.2")
    assert done.code == 0, done.err
    path = place / done.out.strip()
    assert path == place / "runs/toy/preview/sheet.png"
    assert cv2.imread(str(path)).shape[0] > 9 * 112
    assert "split" in done.err
    wrong = eyas("preview", place, 'augment.forbid=["contrast"]', "augment.contrast=0.3")
    assert wrong.code == 2 and "ruled out by forbid" in wrong.err
