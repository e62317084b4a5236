"""`eyas split` and `eyas preview`: planted leaks are caught, user errors end in one line without leftovers."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import pytest

from eyas_host.data.manifest import SplitManifest
from eyas_host.data.split import Split
from tests.support import inside
from tests.support.shapes import SHAPES, draw_folder, draw_shape

LABELS = SHAPES[:3]


def eyas(verb: str, folder: Path, *settings: str, data: str = 'path = "images"') -> inside.Done:
    (folder / "recipe.toml").write_text(f'[run]\nname = "toy"\n[data]\n{data}\n')
    return inside.eyas(
        folder, verb, "recipe.toml", "--yes", *(word for setting in settings for word in ("--set", setting))
    )


def split(folder: Path, *settings: str, data: str = 'path = "images"') -> tuple[SplitManifest, str]:
    done = eyas("split", folder, *settings, data=data)
    assert done.code == 0, done.err
    return Split.load(folder / "runs/toy").manifest, done.err


def split_of(manifest: SplitManifest) -> dict[str, str]:
    """Path below the images -> split."""
    return {
        "/".join(Path(p.path).parts[-2:]): name
        for name in ("train", "validation", "test")
        for p in getattr(manifest, name)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_folder(tmp_path / "images", count=30, width=120, height=100, labels=LABELS)
    return tmp_path


# Planted leaks


def test_exact_copies_are_dropped(folder: Path) -> None:
    for number in range(0, 30, 3):
        for suffix in ("png", "jpg"):
            source = folder / f"images/ring/{number:03d}.{suffix}"
            if source.exists():
                shutil.copy(source, source.with_name(f"zz-copy-{number}.{suffix}"))
    manifest, stderr = split(folder)
    assert manifest.copies == 10 and "10 exact copies dropped" in stderr
    assert not any("copy" in path for path in split_of(manifest))
    with (folder / "runs/toy/split/index.csv").open(newline="") as stream:
        splits = [row["split"] for row in csv.DictReader(stream)]
    assert len(splits) == 100 and sum(name.startswith("copy of ") for name in splits) == 10


def altered_copy(image: Path, name: str, how: Callable[[Path], tuple[object, Sequence[int]]]) -> str:
    pixels, options = how(image)
    copy = image.with_name(name)
    assert cv2.imwrite(str(copy), pixels, options)
    return f"{copy.parent.name}/{copy.name}"


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
def test_near_duplicates_stay_in_one_split(
    folder: Path, suffix: str, how: Callable[[Path], tuple[object, Sequence[int]]]
) -> None:
    twins = {}
    for label in LABELS:
        for image in sorted((folder / "images" / label).iterdir())[::2]:
            twins[f"{label}/{image.name}"] = altered_copy(image, f"{image.stem}-again.{suffix}", how)
    manifest, stderr = split(folder)
    splits = split_of(manifest)
    assert len(splits) == 90 + len(twins) and len(twins) == 45
    assert all(splits[one] == splits[two] for one, two in twins.items())
    assert f"near-duplicates in {len(manifest.clusters)} clusters kept together" in stderr
    leaky, _ = split(folder, "data.near_duplicates=0")
    leaks = [one for one, two in twins.items() if split_of(leaky)[one] != split_of(leaky)[two]]
    assert len(leaks) > 5  # without near_duplicates there is a leak


def test_a_group_stays_in_one_split(folder: Path) -> None:
    """Two production lines with the same patients, one table each."""
    for number, line in enumerate(("north", "south")):
        with (folder / f"{line}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["path", "label", "group"])
            for label in LABELS:
                images = sorted((folder / "images" / label).iterdir())[number::2]
                rows.writerows(
                    (p.relative_to(folder), label, f"patient {index % 13}") for index, p in enumerate(images)
                )
    data = 'source = "csv"\npath = "north.csv"\nmore = [{ source = "csv", path = "south.csv" }]'
    manifest, stderr = split(folder, data=data)
    assert manifest.by == "group" and "13 groups" in stderr and "by group" in manifest.strategy
    groups = [{p.group for p in getattr(manifest, part)} for part in ("train", "validation", "test")]
    assert len(set.union(*groups)) == 13 == sum(map(len, groups))
    leaky, _ = split(folder, "data.by=stratified", data=data)
    assert {p.group for p in leaky.train} & {p.group for p in leaky.test}
    folds = [split(folder, "data.by=group", f"data.fold=[{k}, 3]", data=data)[0].test for k in range(3)]
    assert sum(len({p.group for p in fold}) for fold in folds) == 13 and sum(map(len, folds)) == 90


def test_time_order_with_a_gap(folder: Path) -> None:
    with (folder / "table.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "time"])
        images = sorted((folder / "images").rglob("*.*g"), key=lambda p: p.name)
        rows.writerows(
            (p.relative_to(folder), p.parent.name, f"2026-{1 + n // 28:02}-{1 + n % 28:02}")
            for n, p in enumerate(images)
        )
    manifest, stderr = split(folder, "data.by=time", "data.gap_days=2", data='source = "csv"\npath = "table.csv"')
    times = [[p.time for p in getattr(manifest, part)] for part in ("train", "validation", "test")]
    assert max(times[0]) + 2 * 86400 <= min(times[1]) and max(times[1]) + 2 * 86400 <= min(times[2])
    assert "4 set aside (gap)" in stderr and sum(map(len, manifest.set_aside.values())) == 4


# User errors


def rows(folder: Path, header: str, cells: Callable[[int, str], str]) -> None:
    lines = [
        f"{path.relative_to(folder)},{path.parent.name}{cells(number, path.parent.name)}"
        for number, path in enumerate(sorted((folder / "images").rglob("*.*g")))
    ]
    (folder / "table.csv").write_text("\n".join([header, *lines]) + "\n")


def one_class(folder: Path) -> None:
    shutil.rmtree(folder / "images/ring")
    shutil.rmtree(folder / "images/circle")


def two_images(folder: Path) -> None:
    for path in sorted((folder / "images/ring").iterdir())[2:]:
        path.unlink()


def two_labels(folder: Path) -> None:
    shutil.copy(folder / "images/ring/000.png", folder / "images/cross/000-too.png")


def zero_bytes(folder: Path) -> None:
    (folder / "images/ring/000.png").write_bytes(b"")


def large_group(folder: Path) -> None:
    rows(folder, "path,label,group", lambda n, _: f",{'all' if n % 10 else n}")


def one_group_a_class(folder: Path) -> None:
    rows(folder, "path,label,group", lambda n, label: f",{n // 3 if label != 'ring' else 'r' + str(n % 2)}")


def ambiguous_times(folder: Path) -> None:
    rows(folder, "path,label,time", lambda n, _: f",{1 + n % 9}/12/2025")


def short_times(folder: Path) -> None:
    rows(folder, "path,label,time", lambda n, _: f",2026-01-{1 + n % 28:02}")


def rows_only(folder: Path) -> None:
    rows(folder, "path,label", lambda n, _: "")


def strange_labels(folder: Path) -> None:
    rows(folder, "path,label", lambda n, _: ["/../../outside", "", "\\b", "\t"][n] if n < 4 else "")


def no_columns(folder: Path) -> None:
    rows(folder, "file,class", lambda n, _: "")


def wrong_paths(folder: Path) -> None:
    rows(folder, "path,label", lambda n, _: "")
    (folder / "images").rename(folder / "moved")


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
        (ambiguous_times, TABLE + '\nby = "time"', ["90 x time is the day or the month first?", "line 2 (1/12/2025)"]),
        (short_times, TABLE + '\nby = "time"\ngap_days = 9', ["span 27 days", "take less than gap_days = 9"]),
        (short_times, TABLE + '\nby = "time"\nfold = [0, 5]', ["by = 'time' has no folds"]),
        (short_times, TABLE + '\nby = "group"', ["90 of 90 images have no group"]),
        (short_times, TABLE + "\ngap_days = 2", ["gap_days belongs to by = 'time'"]),
        (
            strange_labels,
            TABLE,
            ["2 labels cannot be used", "'circle/../../outside' (has a path separator, line 2)", "a label is"],
        ),
        (no_columns, TABLE, ["the columns are file, class", "path,label[,group,time,split]"]),
        (wrong_paths, TABLE, ["90 x no such file", "relative to"]),
        (one_class, 'path = "images"\nby = "time"', ["source = 'csv' is needed"]),
        (rows_only, TABLE + '\nkeep = "nothing.json"', ["[data] keep", "nothing.json", "No such file"]),
        (rows_only, TABLE + '\nkeep = "nothing.json"\nlimit = 9', ["[data] limit", "leave one out"]),
        (rows_only, TABLE + '\nkeep = "runs/toy/split/manifest.json"', ["is this run's own split", "another name"]),
        (one_class, 'path = "images"\nmore = [{ file = "x" }]', ["[data] more", "file"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_user_errors_end_in_one_line(folder: Path, make: Callable[[Path], None], data: str, words: list[str]) -> None:
    make(folder)
    done = eyas("split", folder, data=data)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert sum(line.startswith("eyas: ") for line in done.err.splitlines()) == 1
    for word in words:
        assert word in done.err, done.err
    assert not [p for pattern in ("manifest.json", "index.csv", "stage.json", "*.part") for p in folder.rglob(pattern)]


def test_skipped_unreadable_images_are_listed(folder: Path) -> None:
    zero_bytes(folder)
    manifest, stderr = split(folder, "data.skip_unreadable=true")
    assert manifest.unreadable == 1 and "1 unreadable left out" in stderr and "left out: " in stderr
    with (folder / "runs/toy/split/index.csv").open(newline="") as stream:
        (line,) = [row for row in csv.DictReader(stream) if row["split"].startswith("unreadable")]
    assert line["path"].endswith("ring/000.png") and "0 bytes" in line["split"]


# The verbs


def test_help_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = inside.eyas(tmp_path, "split", "--help")
    assert done.code == 0
    for word in (
        "path,label[,group,time,split]",
        'by = "time"',
        "near_duplicates",
        "index.csv",
        "test-sets",
        "gap_days",
    ):
        assert word in done.out


def test_preview_prints_the_path_of_the_sheet(folder: Path) -> None:
    cv2.imwrite(str(folder / "images/ring/wide.png"), draw_shape("ring", 99, 300, 60))
    done = eyas("preview", folder, "augment.randaugment=1", "augment.mixup=0.2")
    assert done.code == 0, done.err
    path = folder / done.out.strip()
    assert path == folder / "runs/toy/preview/sheet.png"
    assert cv2.imread(str(path)).shape[0] > 9 * 112
    assert "split" in done.err
    wrong = eyas("preview", folder, 'augment.forbid=["contrast"]', "augment.contrast=0.3")
    assert wrong.code == 2 and "ruled out by forbid" in wrong.err
