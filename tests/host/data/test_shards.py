"""Tar shards: the split of the folder with the same images, random access, and every broken or hostile archive."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.data import index as index_module
from eyas_host.data import shards as shards_module
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.image_bytes import Member, file_name, parse_member, read_image_bytes
from eyas_host.data.index import build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.shards import expand, list_shards
from eyas_host.data.sources import fingerprint, list_source
from eyas_host.data.split import Split, split_index
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from tests.support.shapes import draw_folder

Entries = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def write_tar(path: Path, entries: Entries | list[tuple[str, bytes]]) -> Path:
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    with tarfile.open(path, "w") as archive:
        for name, data in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(count: int = 6) -> dict[str, bytes]:
    """WebDataset samples of two classes."""
    found: dict[str, bytes] = {}
    for number in range(count):
        found[f"{number:04d}.png"] = image(number)
        found[f"{number:04d}.cls"] = b"ring" if number % 2 else b"square"
    return found


def complaint(path: Path | str, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        build_index(DataSection(source="tar", path=str(path), **settings))  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 700
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "images", count=14, width=24, height=20, labels=("ring", "square", "cross"))


def as_class_folders(folder: Path, place: Path) -> Path:
    with tarfile.open(place / "all.tar", "w") as archive:
        archive.add(folder, arcname="./images")
    return place / "all.tar"


def as_samples(folder: Path, place: Path) -> Path:
    """Four shards with labels in .cls and .json files, in another order than the folder's."""
    files = sorted(folder.rglob("*.*"), key=lambda path: path.read_bytes())
    for shard in range(4):
        entries: dict[str, bytes] = {}
        for number, path in enumerate(files[shard::4]):
            label = path.parent.name
            entries[f"part/{number:03d}{path.suffix}"] = path.read_bytes()
            if number % 2:
                entries[f"part/{number:03d}.cls"] = f"{label}\n".encode()
            else:
                entries[f"part/{number:03d}.json"] = json.dumps({"label": label, "camera": [1, 2]}).encode()
        write_tar(place / f"train-{shard:03d}.tar", entries)
    return place / "train-{000..003}.tar"


@pytest.mark.parametrize("pack", [as_class_folders, as_samples])
def test_the_split_is_that_of_the_folder(folder: Path, tmp_path: Path, pack: Callable[[Path, Path], Path]) -> None:
    place = tmp_path / "shards"
    place.mkdir()
    packed = DataSection(source="tar", path=str(pack(folder, place)))
    plain = DataSection(path=str(folder))
    manifests = []
    for name, data in (("packed", packed), ("plain", plain)):
        index = build_index(data)
        save_split(split_index(index, data, 3), tmp_path / name, index)
        manifests.append((tmp_path / name / "split/manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    one, other = (Split.load(tmp_path / name).train for name in ("packed", "plain"))
    assert len(one) > 20 and all(".tar::" in image.path for image in one.images)
    for number in np.random.default_rng(0).permutation(len(one)):
        assert np.array_equal(one.pixels[number], other.pixels[number])


def test_evaluate_lists_a_shard_like_a_folder(tmp_path: Path) -> None:
    found = list_source(write_tar(tmp_path / "new.tar", samples(4)))
    assert [image.label for image in found.images] == ["square", "ring", "square", "ring"]


def test_groups_and_times_are_in_the_json(tmp_path: Path) -> None:
    entries: dict[str, bytes] = {}
    for number in range(12):
        entries[f"{number:02d}.png"] = image(number)
        when = f"2026-11-{1 + number:02d}T00:00:00Z"
        values = {"cls": number % 2, "group": f"line {number // 4}", "time": when}
        entries[f"{number:02d}.json"] = json.dumps(values).encode()
    path = write_tar(tmp_path / "a.tar", entries)
    data = DataSection(source="tar", path=str(path), by="time")
    images = build_index(data).images
    assert {image.label for image in images} == {"0", "1"} and images[5].group == "line 1"
    assert [round((image.time or 0) / 86_400) for image in images] == list(range(20_758, 20_770))
    manifest = split_index(build_index(data), data, 0)
    assert max(p.time or 0 for p in manifest.train) < min(p.time or 0 for p in manifest.test)


def test_a_shard_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", samples())
    first = list_shards(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_read_list", lambda *_: pytest.fail("listed again"))
        assert list_shards(str(path)) == first
    (cached,) = (tmp_path / "cache/eyas/shards").iterdir()
    cached.write_bytes(b"damaged")
    assert list_shards(str(path)) == first
    write_tar(path, samples(8))
    assert len(list_shards(str(path)).images) == 8


def test_what_is_no_sample_is_left_out_and_counted(tmp_path: Path) -> None:
    entries = samples() | {"0000.mask.png": image(90), "._0001.png": b"x", "0002.txt": b"a cat", "README": b"hello"}
    path = write_tar(tmp_path / "a.tar", entries)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0009.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        pipe = tarfile.TarInfo("0008.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    index = build_index(DataSection(source="tar", path=str(path)))
    assert len(index.images) == 6 and sum(index.left_out.values()) == 6
    assert index.left_out == {
        shards_module.SEVERAL_DOTS: 1,
        "hidden": 1,
        ".txt": 1,
        "without a usual suffix": 1,
        "link in an archive": 1,
        "no regular file": 1,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "cut short or damaged"),
        (lambda data: data[:700], "not a whole tar archive"),
        (lambda data: data[:1024], "cut short or damaged"),  # at the border of a member
        (lambda data: data[:1024] + bytes([1]) * 512 + data[1536:], "cut short or damaged"),
        (lambda data: data + data, "more data follows its end"),
        (lambda data: b"", "not a whole tar archive"),
        (lambda data: b"no archive\n" * 500, "not a whole tar archive"),
        (lambda data: b"\x1f\x8b" + data, "is compressed (gzip)"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "is compressed (zstd)"),
        (lambda data: bytes(10_240), "no images in 1 shard"),
    ],
)
def test_a_broken_archive_is_one_line(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    path = write_tar(tmp_path / "a.tar", samples())
    path.write_bytes(change(path.read_bytes()))
    message = complaint(path)
    assert words in message and str(path) in message


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("../../etc/x.png", image()), ("../../etc/x.cls", b"a")], ("'../../etc/x.png'", "leads out of the archive")),
        ([("/etc/x.png", image()), ("a.cls", b"a")], ("'/etc/x.png'", "leads out of the archive")),
        ([("a/../../x.png", image())], ("leads out of the archive",)),
        ([("a/1.png", image()), ("./a//1.png", image(1))], ("holds a/1.png twice",)),
        ([("1.png", image()), ("1.cls", b"a"), ("1.cls", b"b")], ("holds 1.cls twice",)),
        ([("1.png", image()), ("1.jpg", image(1)), ("1.cls", b"a")], ("1.png and 1.jpg have one key",)),
        ([("1.png", image()), ("1.cls", b"a"), ("2.png", image(1))], ("1 of 2 images have no label", "2.cls")),
        ([("1.png", image()), ("1.json", b'{"width": 4}')], ("no label", "1.json")),
        ([("1.png", image()), ("a/2.png", image(1))], ("1 of 2 images have no label", "::1.png", "nor a folder")),
        ([("1.png", image()), ("1.cls", b"  \n")], ("1.cls: is empty",)),
        ([("1.png", image()), ("1.cls", b"\xff\xfe")], ("1.cls: not UTF-8",)),
        ([("1.png", image()), ("1.cls", b"x" * 70_000)], ("70,000 bytes",)),
        ([("1.png", image()), ("1.json", b"[1]")], ("1.json: not a JSON object",)),
        ([("1.png", image()), ("1.json", b"[" * 60_000)], ("1.json: not a JSON object",)),
        ([("1.png", image()), ("1.json", b'{"label": ["a"]}')], ("label is list", "text or a number")),
        ([("1.png", image()), ("1.json", b'{"label": true}')], ("label is bool",)),
        ([("1.png", image()), ("1.json", b'{"label": "a", "cls": "b"}')], ("label and cls are two",)),
        ([("1.png", image()), ("1.json", b'{"label": "a"}'), ("1.cls", b"b")], ("1.cls and 1.json give two labels",)),
        ([("1.png", image()), ("1.cls", b"a/b"), ("2.png", image(1)), ("2.cls", b"c")], ("has a path separator",)),
        ([("1.png", image()), ("1.cls", b"a")], ("two or more classes are needed",)),
    ],
)
def test_a_hostile_or_careless_archive_is_one_line(
    tmp_path: Path, entries: list[tuple[str, bytes]], words: tuple[str, ...]
) -> None:
    message = complaint(write_tar(tmp_path / "a.tar", entries))
    assert all(word in message for word in words), message


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    assert "not UTF-8" in complaint(write_tar(tmp_path / "a.tar", [(os.fsdecode(b"\xff.png"), image())]))


def test_a_member_of_negative_size(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = -1024
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    assert "negative size" in complaint(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.tar", "no such file"),
        ("empty", "no .tar files in this folder"),
        ("a-{0..2}.tar", "2 of 3 shards are missing"),
        ("a-{0..9999999}.tar", "more than 1,000,000 names"),
        ("a-{5..1}.tar", "makes 0 names"),
        ("a-{0..999}{0..999}{0..9}.tar", "1 to 1,000,000 are allowed"),
    ],
)
def test_paths_that_name_no_shards(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "a-0.tar", samples())
    assert words in complaint(tmp_path / path)


def test_the_fingerprint_changes_with_a_shard(tmp_path: Path) -> None:
    data = DataSection(source="tar", path=str(tmp_path))
    write_tar(tmp_path / "a.tar", samples())
    before = fingerprint(data)
    assert fingerprint(data) == before
    write_tar(tmp_path / "b.tar", samples())
    assert fingerprint(data) != before


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", samples())
    read = index_module.read_file_infos

    def read_and_change(paths: list[str], bits: int) -> Iterator[object]:
        yield from read(paths, bits)
        write_tar(path, samples(8))

    monkeypatch.setattr(index_module, "read_file_infos", read_and_change)
    assert "changed while its images were read" in complaint(path)


def test_a_shard_that_changes_after_the_split(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples())
    images = build_index(DataSection(source="tar", path=str(path))).images
    pixels = ImageDataset(images, ("ring", "square")).pixels
    assert pixels[0].shape == (8, 8, 3)
    write_tar(path, {name: data[::-1] for name, data in samples().items()})
    with pytest.raises(DataError, match="missing or changed since the split"):
        pixels[1]
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="missing or changed since the split"):
        pixels[2]
    path.unlink()
    with pytest.raises(DataError, match="missing or changed since the split"):
        pixels[3]


def test_there_may_be_more_shards_than_file_descriptors(tmp_path: Path) -> None:
    for number in range(120):
        entries = {f"{number}.png": image(number), f"{number}.cls": b"odd" if number % 2 else b"even"}
        write_tar(tmp_path / f"{number:03d}.tar", entries)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        index = build_index(DataSection(source="tar", path=str(tmp_path)))
        dataset = ImageDataset(index.images, index.labels)
        assert len([dataset.pixels[number] for number in range(len(dataset))]) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@settings(max_examples=50)
@given(_NAMES, _NAMES, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_member_s_path_is_read_as_it_was_written(shard: str, name: str, offset: int, size: int) -> None:
    member = Member(f"/{shard.replace('.tar::', '')}.tar", name, offset, size)
    assert parse_member(str(member)) == member


@settings(max_examples=40)
@given(st.dictionaries(st.from_regex(r"[a-c]/[0-9]{1,4}\.png", fullmatch=True), st.binary(max_size=2000), min_size=1))
def test_every_member_is_read_at_its_place(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, bytes]) -> None:
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", entries)
    found = {msgspec.structs.asdict(one)["name"]: one for one in shards_module._read_list(str(path), (0, 0)).images}
    assert set(found) == set(entries)
    for name, data in entries.items():
        assert read_image_bytes(str(Member(str(path), name, found[name].offset, found[name].size))) == data


def test_names_for_people() -> None:
    assert file_name("/data/a.tar::cat/7.jpg@1536+20480") == "7.jpg" == file_name("/data/cat/7.jpg")
    assert parse_member("/data/cat/7.jpg") is None and parse_member("/data/a.tar") is None
    assert expand("plain.tar") == ["plain.tar"]
    assert expand("{a,b}-{1..2}.tar") == ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]
