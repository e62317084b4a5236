"""Blobs: only what is missing is fetched, from where it broke off, and nothing but what was signed is ever used."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.updates.fetch import SpaceError, Staging, check_files
from eyas_device.updates.fetcher import Fetcher, Limits
from eyas_device.updates.refusals import EndlessDataError, SlowDataError, TamperedError, TrustError, UnreachableError
from eyas_device.updates.release import ReleaseFile, UpdateError, Variant, blob_path
from tests.support.blob_server import BlobServer, serving

LIMITS = Limits(answer_s=2.0, window_s=1.0)
CONTENT = {
    "manifest.json": b'{"name": "x"}',
    "model.tflite": random.Random(1).randbytes(200_000),
    "parts/weights.bin": random.Random(2).randbytes(70_001),
    "NOTICE": b"",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def variant_of(content: dict[str, bytes]) -> Variant:
    files = tuple(ReleaseFile(path=path, sha256=digest(data), size_bytes=len(data)) for path, data in content.items())
    return Variant(files=files, manifest_sha256=digest(content["manifest.json"]))


VARIANT = variant_of(CONTENT)
MODEL = blob_path(digest(CONTENT["model.tflite"]))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BlobServer]:
    root = tmp_path / "repository"
    for data in CONTENT.values():
        path = root / blob_path(digest(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with serving(root) as server:
        yield server


@pytest.fixture
def fetcher(server: BlobServer) -> Fetcher:
    return Fetcher(server.url, limits=LIMITS)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "updates")


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blobs_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "updates/blobs").iterdir())


def test_a_bundle_is_put_together_and_the_way_there_is_shown(staging: Staging, fetcher: Fetcher) -> None:
    shown: list[tuple[int, int]] = []
    root = staging.assemble(VARIANT, fetcher, progress=lambda done, total: shown.append((done, total)))
    assert content_of(root) == CONTENT
    total = sum(map(len, CONTENT.values()))
    assert shown[-1] == (total, total) and shown == sorted(shown)


def test_only_what_neither_slots_nor_staging_have_is_fetched(
    staging: Staging, fetcher: Fetcher, server: BlobServer, tmp_path: Path
) -> None:
    (tmp_path / "slot").mkdir()
    old = tmp_path / "slot/old-name.tflite"
    old.write_bytes(CONTENT["model.tflite"])
    same_size = tmp_path / "slot/other"
    same_size.write_bytes(bytes(len(CONTENT["parts/weights.bin"])))
    link = tmp_path / "slot/link"
    link.symlink_to(old)
    have = [link, same_size, tmp_path / "slot", tmp_path / "slot/gone", old]
    assert content_of(staging.assemble(VARIANT, fetcher, have)) == CONTENT
    assert ("/" + MODEL, 0) not in server.requests and len(server.requests) == 2
    server.requests.clear()
    assert content_of(staging.assemble(VARIANT, fetcher, have)) == CONTENT
    assert server.requests == []
    staging.clean()
    assert old.read_bytes() == CONTENT["model.tflite"], "a file of a slot is linked, never taken away"
    assert blobs_in(tmp_path) == [] and not (tmp_path / "updates/bundle").exists()


@pytest.mark.parametrize("mode", ["ranges", "no ranges"])
def test_a_broken_download_goes_on_where_it_ended(
    mode: str, staging: Staging, fetcher: Fetcher, server: BlobServer, tmp_path: Path
) -> None:
    server.mode = mode
    staging.assemble(variant_of({"manifest.json": CONTENT["manifest.json"]}), fetcher)
    server.cut = 150_000
    with pytest.raises(UnreachableError):
        staging.assemble(VARIANT, fetcher)
    part = tmp_path / "updates/blobs" / f"{Path(MODEL).name}.part"
    assert 100_000 < part.stat().st_size <= 150_000
    arrived = part.stat().st_size
    server.requests.clear()
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT
    assert ("/" + MODEL, arrived) in server.requests, "asked for the rest; a server may send all of it"


def test_what_a_power_cut_left_of_a_part_is_never_trusted(
    staging: Staging, fetcher: Fetcher, server: BlobServer, tmp_path: Path
) -> None:
    """Zeros where bytes were not synced, more than there should be, a part that is complete: all end in the blob."""
    part = tmp_path / "updates/blobs" / f"{Path(MODEL).name}.part"
    data = CONTENT["model.tflite"]
    for left in (data[:1000] + bytes(5000), data + b"more", data, bytes(len(data)), b""):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(left)
        assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT
        staging.clean()
    whole = part.with_suffix("")
    whole.write_bytes(bytes(len(data)))  # a blob that was complete once, and rotted
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("tampered", TamperedError),
        ("endless", EndlessDataError),
        ("short", UnreachableError),
        ("slow", SlowDataError),
    ],
)
def test_a_hostile_server_costs_no_more_than_the_signed_bytes(
    mode: str, error: type[TrustError], staging: Staging, fetcher: Fetcher, server: BlobServer, tmp_path: Path
) -> None:
    server.mode = mode
    with pytest.raises(error):
        staging.assemble(VARIANT, fetcher)
    assert not (tmp_path / "updates/bundle").exists()
    size = sum(path.stat().st_size for path in (tmp_path / "updates").rglob("*") if path.is_file())
    assert size <= sum(map(len, CONTENT.values()))
    server.mode = "ranges"
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT


def test_a_server_that_sends_another_range_than_asked_never_spoils_a_blob(
    staging: Staging, fetcher: Fetcher, server: BlobServer, tmp_path: Path
) -> None:
    part = tmp_path / "updates/blobs" / f"{Path(MODEL).name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT["model.tflite"][:5000])
    server.mode = "wrong range"
    with pytest.raises(UnreachableError, match="another range"):
        staging.assemble(VARIANT, fetcher)
    server.mode = "ranges"
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT


def test_nothing_is_fetched_that_does_not_fit(
    staging: Staging, fetcher: Fetcher, server: BlobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    statvfs = os.statvfs(tmp_path)
    free = sum(map(len, CONTENT.values())) + (1 << 20)

    def limited(path: object) -> os.statvfs_result:
        return os.statvfs_result([1, 1, *statvfs[2:4], free, *statvfs[5:]])

    monkeypatch.setattr(os, "statvfs", limited)
    with pytest.raises(SpaceError, match="free some space"):
        staging.assemble(VARIANT, fetcher, extra_bytes=1)
    assert server.requests == [] and blobs_in(tmp_path) == []
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT


def test_leftovers_of_other_releases_go(staging: Staging, fetcher: Fetcher, tmp_path: Path) -> None:
    blobs = tmp_path / "updates/blobs"
    (blobs / "folder").mkdir(parents=True)
    (blobs / ("0" * 64)).write_bytes(b"old")
    (blobs / ("0" * 64 + ".part")).write_bytes(b"old")
    (tmp_path / "outside").write_bytes(CONTENT["model.tflite"])
    (blobs / Path(MODEL).name).symlink_to(tmp_path / "outside")
    os.mkfifo(blobs / f"{digest(CONTENT['parts/weights.bin'])}.part")
    (tmp_path / "updates/bundle").symlink_to(tmp_path)
    assert content_of(staging.assemble(VARIANT, fetcher)) == CONTENT
    assert set(blobs_in(tmp_path)) == {digest(data) for data in CONTENT.values()}
    assert (tmp_path / "outside").exists()
    assert not (blobs / Path(MODEL).name).is_symlink()


def test_the_rate_is_kept_on_average(fetcher: Fetcher, tmp_path: Path) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    staging = Staging(tmp_path / "updates", rate_kb=100.0, clock=lambda: now[0], sleep=sleep)
    staging.assemble(VARIANT, fetcher)
    assert sum(slept) == pytest.approx(2.7, rel=0.01), "270 kB at 100 kB/s"


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "", "a\\b", "a\x1b[2J", "1/2/3/4/5", "x" * 201, "model.tflite/x"],
)
def test_paths_that_no_bundle_has(path: str) -> None:
    file = ReleaseFile(path=path, sha256="0" * 64, size_bytes=1)
    with pytest.raises(UpdateError, match="publish it again"):
        check_files(msgspec.structs.replace(VARIANT, files=(*VARIANT.files, file)))


def test_lists_of_files_that_no_bundle_has() -> None:
    huge = ReleaseFile(path="a", sha256="0" * 64, size_bytes=2 << 30)
    many = tuple(ReleaseFile(path=f"f{n}", sha256="0" * 64, size_bytes=1) for n in range(300))
    for files in ((), many, (*VARIANT.files, huge), (*VARIANT.files, VARIANT.files[0]), VARIANT.files[1:]):
        with pytest.raises(UpdateError, match="publish it again"):
            check_files(msgspec.structs.replace(VARIANT, files=files))


@given(
    lefts=st.lists(st.tuples(st.integers(0, 210_000), st.booleans()), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 200_000), max_size=3),
    ranges=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_left_and_wherever_it_breaks_the_end_is_the_signed_content(
    lefts: list[tuple[int, bool]], cuts: list[int], ranges: bool, server: BlobServer, tmp_path: Path
) -> None:
    staging = Staging(tmp_path / "updates")
    server.mode = "ranges" if ranges else "no ranges"
    blobs = tmp_path / "updates/blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for (length, spoilt), data in zip(lefts, CONTENT.values(), strict=False):
        (blobs / digest(data)).unlink(missing_ok=True)
        left = data[:length] if not spoilt else bytes(length)
        (blobs / f"{digest(data)}.part").write_bytes(left)
    with_cuts = Fetcher(server.url, limits=LIMITS)
    for cut in cuts:
        server.cut = cut
        with suppress(UnreachableError):
            staging.assemble(VARIANT, with_cuts)
    server.cut = -1
    assert content_of(staging.assemble(VARIANT, with_cuts)) == CONTENT
    staging.clean()
