"""A former split is kept: known images stay, new ones follow their unit or are assigned, what is gone is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_host.data.assign import DAY
from eyas_host.data.class_balance import summary, warnings
from eyas_host.data.file_info import FileInfo
from eyas_host.data.index import Index
from eyas_host.data.manifest import SPLITS, SplitManifest, save_split
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import split_index
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError


def stream(numbers: range | list[int], group: Callable[[int], str] = lambda _: "", *, relabelled: int = 0) -> Index:
    """Images of one endless stream, each one day after the other."""
    images, files = [], {}
    for n in numbers:
        sha = hashlib.sha256(str(n).encode()).hexdigest()
        images.append(
            LabelledImage(
                path=f"{n}",
                label="b" if n % 9 == 0 or n == relabelled else "a",
                sha256=sha,
                group=group(n),
                time=n * DAY,
            )
        )
        files[sha] = FileInfo(8, 8, "grey", 8, np.random.default_rng(n).bytes(32))
    return Index(images=tuple(images), labels=("a", "b"), files=files)


def alike(index: Index, rows: list[int]) -> Index:
    """The index with these images' perceptual hashes equal to the first one's."""
    first = index.files[index.images[rows[0]].sha256].hash
    changed = {
        index.images[row].sha256: msgspec.structs.replace(index.files[index.images[row].sha256], hash=first)
        for row in rows
    }
    return msgspec.structs.replace(index, files=index.files | changed)


def sides(manifest: SplitManifest) -> dict[str, str]:
    found = {p.sha256: name for name in SPLITS for p in getattr(manifest, name)}
    return found | {p.sha256: why for why, some in manifest.set_aside.items() for p in some}


def keeping(manifest: SplitManifest, folder: Path, data: DataSection | None = None) -> DataSection:
    path = save_split(manifest, folder)
    return msgspec.structs.replace(data or DataSection(), keep=str(path))


def sha(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


@pytest.mark.parametrize(
    "data",
    [DataSection(), DataSection(fold=(1, 4)), DataSection(by="group"), DataSection(by="time", gap_days=3.0)],
    ids=["stratified", "fold", "group", "time"],
)
def test_known_images_stay_whatever_comes(data: DataSection, tmp_path: Path) -> None:
    """Small classes, another seed, other labels, later images: where the hash alone would move some."""
    group = (lambda n: f"g{n // 4}") if data.by == "group" else (lambda _: "")
    former = split_index(stream(range(100), group), data, 0)
    kept = keeping(former, tmp_path, data)
    for more in (101, 110, 260):
        new = split_index(stream(range(more), group, relabelled=1), kept, 7)
        before, after = sides(former), sides(new)
        assert {name: after[name] for name in before} == before and len(after) == more
        assert new.kept is not None and (new.kept.images, new.kept.new) == (100, more - 100)
        assert f"100 kept from a former split, {more - 100} new" in summary(new)
        assert any("have another label now" in line for line in warnings(new))
    if data.by == "time":
        assert {after[sha(n)] for n in range(100, 260)} == {"test"}
    elif data.by == "group":
        assert all(len({after[sha(4 * g + n)] for n in range(4)}) == 1 for g in range(65))
    else:
        test = sum(after[sha(n)] == "test" for n in range(100, 260))
        assert abs(test - 160 * (0.25 if data.fold[1] else 0.15)) < 20
    again = split_index(stream(range(260), group, relabelled=1), keeping(new, tmp_path / "next", data), 3)
    assert sides(again) == after


def test_a_new_near_duplicate_follows_and_one_that_joins_two_splits_is_set_aside(tmp_path: Path) -> None:
    former = split_index(stream(range(200)), DataSection(), 0)
    data, before = keeping(former, tmp_path), sides(former)
    train, test = (next(n for n in range(200) if before[sha(n)] == name) for name in ("train", "test"))
    follows = split_index(alike(stream(range(201)), [test, 200]), data, 0)
    assert sides(follows) == before | {sha(200): "test"}
    joins = split_index(alike(stream(range(201)), [train, test, 200]), data, 0)
    assert sides(joins) == before | {sha(200): "linked to images of another split"}
    assert "1 set aside (linked to images of another split)" in summary(joins)


def test_images_that_are_gone(tmp_path: Path) -> None:
    former = split_index(stream(range(200)), DataSection(), 0)
    data, before = keeping(former, tmp_path), sides(former)
    training = [n for n in range(200) if before[sha(n)] == "train"][:5]
    fewer = split_index(stream([n for n in range(200) if n not in training]), data, 0)
    assert sides(fewer) == {name: side for name, side in before.items() if name not in map(sha, training)}
    assert "images of the kept split are gone: 5 of train" in warnings(fewer)[0]
    tested = [n for n in range(200) if before[sha(n)] == "test"][:4]
    left = stream([n for n in range(200) if n not in tested])
    with pytest.raises(DataError) as caught:
        split_index(left, data, 0)
    message = str(caught.value)
    assert f"4 of the {len(former.test)} images of its held-out test set are gone" in message and "\n" not in message
    assert "keep_missing = true" in message
    allowed = split_index(left, msgspec.structs.replace(data, keep_missing=True), 0)
    assert len(allowed.test) == len(former.test) - 4 and "gone: 4 of test" in warnings(allowed)[0]


@pytest.mark.parametrize(
    ("content", "data", "words"),
    [
        (None, DataSection(), "No such file"),
        (b'{"strategy": 3}', DataSection(), "cannot be read"),
        ("former", DataSection(fold=(0, 5)), "fold = [0, 0], this recipe asks for [0, 5]"),
        ("former", DataSection(by="time"), "by = 'stratified', this recipe asks for 'time'"),
    ],
)
def test_a_manifest_that_cannot_be_kept(
    content: str | bytes | None, data: DataSection, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "split/manifest.json"
    if content == "former":
        save_split(split_index(stream(range(60)), DataSection(), 0), tmp_path)
    elif isinstance(content, bytes):
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        split_index(stream(range(70)), msgspec.structs.replace(data, keep=str(path)), 0)
    assert words in str(caught.value) and "\n" not in str(caught.value) and "keep" in str(caught.value) + words
