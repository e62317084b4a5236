"""How images are divided: groups and near-duplicates whole, time in order, and why a split is refused."""

from __future__ import annotations

import hashlib
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence

import cv2
import msgspec
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from eyas_host.data.assign import DAY, assign_by_time, assign_stratified
from eyas_host.data.class_balance import balance, ratio, summary, warnings
from eyas_host.data.duplicates import BITS, cluster_hashes, link_hashes, perceptual_hash
from eyas_host.data.file_info import FileInfo
from eyas_host.data.index import Index
from eyas_host.data.manifest import SPLITS, SplitManifest
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import split_index
from eyas_host.data.units import unit_ids
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from tests.support.shapes import SHAPES, draw_shape

THIRDS = (0.7, 0.15, 0.15)


def made_up(rows: Sequence[tuple[str, str, float | None]], hashes: Sequence[bytes] = ()) -> Index:
    """An index of images (label, group, time) that no file holds."""
    images = tuple(
        LabelledImage(path=f"/p/{number}.png", label=label, sha256=f"{number:06d}", group=group, time=moment)
        for number, (label, group, moment) in enumerate(rows)
    )
    files = {p.sha256: FileInfo(8, 8, "grey", 8, value) for p, value in zip(images, hashes, strict=False)}
    return Index(images=images, labels=tuple(sorted({p.label for p in images})), files=files)


def parts_of(manifest: SplitManifest) -> dict[str, tuple[LabelledImage, ...]]:
    return {"train": manifest.train, "validation": manifest.validation, "test": manifest.test}


def sides(manifest: SplitManifest) -> dict[str, str]:
    """sha256 -> part."""
    return {p.sha256: part for part, images in parts_of(manifest).items() for p in images}


# Units: groups and clusters


_UNITS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=12, max_size=60)
"""Sizes and main labels of groups."""
_FOLD = st.one_of(st.just((0, 0)), st.integers(2, 6).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))


def grouped(units: Sequence[tuple[int, int]], mixed: np.random.Generator) -> list[LabelledImage]:
    images = []
    for number, (size, label) in enumerate(units):
        for _ in range(size):
            own = label if mixed.random() < 0.8 else int(mixed.integers(3))
            sha = f"{len(images):06d}"
            images.append(LabelledImage(path=sha, label="abc"[own], sha256=sha, group=f"g{number}"))
    return images


@settings(max_examples=150, deadline=None)
@given(_UNITS, _FOLD, st.integers(0, 2**31 - 1))
def test_units_are_never_divided_and_shares_are_near(
    units: list[tuple[int, int]], fold: tuple[int, int], seed: int
) -> None:
    images = grouped(units, np.random.default_rng(seed))
    places: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.group, []).append(place)
    bound = [group for group in places.values() if len(group) > 1]
    chosen = assign_stratified(images, bound, THIRDS, seed, fold)
    assert sorted(place for part in chosen for place in part) == list(range(len(images)))
    side = {place: number for number, part in enumerate(chosen) for place in part}
    assert all(len({side[place] for place in unit}) == 1 for unit in bound)
    assert chosen == assign_stratified(images, bound, THIRDS, seed, fold)
    test = 1 / fold[1] if fold[1] else THIRDS[2]
    largest = max(map(len, bound), default=1)
    for part, share in zip(chosen, (0.7 * (1 - test) / 0.85, 0.15 * (1 - test) / 0.85, test), strict=True):
        # each split first gets one unit of each of the three labels, however large; in 4,000 random cases the excess
        # stayed at or below 1.75 times the largest unit
        assert abs(len(part) - share * len(images)) <= 3 * largest + 3


@settings(max_examples=60, deadline=None)
@given(_UNITS, st.integers(2, 5), st.integers(0, 2**31 - 1))
def test_folds_of_whole_groups_are_disjoint_and_cover_everything(
    units: list[tuple[int, int]], folds: int, seed: int
) -> None:
    images = grouped(units, np.random.default_rng(seed))
    places: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.group, []).append(place)
    bound = [group for group in places.values() if len(group) > 1]
    tests = [assign_stratified(images, bound, THIRDS, seed, (fold, folds))[2] for fold in range(folds)]
    assert sorted(place for test in tests for place in test) == list(range(len(images)))


def test_many_small_groups_give_the_shares_of_every_class() -> None:
    rng = np.random.default_rng(1)
    rows = [("ab"[int(rng.random() < 0.2)], f"g{number // 5}", None) for number in range(3000)]
    manifest = split_index(made_up(rows), DataSection(), 3)
    assert manifest.by == "group" and "by group" in manifest.strategy
    assert sum(manifest.groups.values()) == 600
    for part, share in zip(SPLITS, THIRDS, strict=True):
        for label in "ab":
            wanted = share * sum(own == label for own, _, _ in rows)
            assert abs(manifest.counts[part][label] - wanted) < 0.3 * wanted


def test_automatic_strategy_follows_the_groups_and_can_be_overruled() -> None:
    with_groups = made_up([("ab"[n % 2], f"g{n // 4}", None) for n in range(200)])
    assert split_index(with_groups, DataSection(), 0).by == "group"
    assert split_index(with_groups, DataSection(by="stratified"), 0).by == "stratified"
    assert split_index(made_up([("ab"[n % 2], "", None) for n in range(50)]), DataSection(), 0).by == "stratified"


def test_groups_that_share_a_image_stay_together() -> None:
    """Two copies of an image in two groups, and two near-duplicates in two others, tie those groups."""
    flat, other = bytes(32), bytes([255] * 32)
    rng = np.random.default_rng(0)
    rows = [("ab"[n % 2], f"g{n // 4}", None) for n in range(120)]
    hashes = [rng.bytes(32) for _ in rows]
    hashes[0] = hashes[9] = flat  # g0 and g2
    hashes[40], hashes[81] = other, bytes([254, *other[1:]])  # g10 and g20
    index = made_up(rows, hashes)
    dropped = LabelledImage(path="/p/copy.png", label="a", sha256=index.images[16].sha256, group="g29")  # of g4
    index = msgspec.structs.replace(index, copies=((dropped, index.images[16]),))
    for seed in range(8):
        manifest = split_index(index, DataSection(), seed)
        side = {p.group: part for part, images in parts_of(manifest).items() for p in images}
        assert side["g0"] == side["g2"] and side["g10"] == side["g20"] and side["g4"] == side["g29"]
        assert manifest.copies == 1 and sorted(map(len, manifest.clusters)) == [2, 2]


@pytest.mark.parametrize("by", ["stratified", "group"])
@pytest.mark.parametrize("fold", [(0, 0), (1, 4)])
def test_near_duplicates_lie_on_one_side(by: str, fold: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    base = [rng.bytes(32) for _ in range(60)]
    hashes = [base[n % 60] if n < 180 else rng.bytes(32) for n in range(400)]
    rows = [("ab"[n % 2], f"g{n // 2}" if by == "group" else "", None) for n in range(400)]
    data = DataSection(by=by, fold=fold)  # type: ignore[arg-type]
    for seed in range(4):
        manifest = split_index(made_up(rows, hashes), data, seed)
        side = sides(manifest)
        assert len(side) == 400 and len(manifest.clusters) == 60
        assert all(len({side[sha] for sha in cluster}) == 1 for cluster in manifest.clusters)
    assert "16 of 256 bits" in manifest.strategy and manifest.near_duplicates == 16
    off = split_index(made_up(rows, hashes), msgspec.structs.replace(data, near_duplicates=0), 0)
    assert not off.clusters and "near" not in off.strategy


def test_without_near_duplicates_nothing_changes() -> None:
    """The same lists, in the same order, whether they were looked for or not."""
    rng = np.random.default_rng(2)
    rows = [("ab"[n % 3 == 0], "", None) for n in range(300)]
    index = made_up(rows, [rng.bytes(32) for _ in rows])
    for fold in ((0, 0), (2, 5)):
        one, two = (split_index(index, DataSection(near_duplicates=bits, fold=fold), 7) for bits in (0, 16))
        assert (one.train, one.validation, one.test) == (two.train, two.validation, two.test)


def test_a_few_near_duplicates_move_few_images() -> None:
    rng = np.random.default_rng(2)
    rows = [("ab"[n % 3 == 0], "", None) for n in range(1000)]
    hashes = [rng.bytes(32) for _ in rows]
    before = sides(split_index(made_up(rows, hashes), DataSection(), 7))
    for n in range(10):
        hashes[n] = hashes[500 + n]
    after = sides(split_index(made_up(rows, hashes), DataSection(), 7))
    assert sum(before[sha] != after[sha] for sha in before) < 40


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=5, unique=True), max_size=8),
    st.booleans(),
)
def test_units_of_a_dataset_are_the_linked_images(groups: list[int], clusters: list[list[int]], grouped: bool) -> None:
    """Group 0 stands for no group; clusters may name images that are elsewhere, which link nothing."""
    images = made_up([("a", f"g{group}" if group else "", None) for group in groups]).images
    found = unit_ids(images, [[f"{number:06d}" for number in cluster] for cluster in clusters], grouped=grouped)
    linked = np.eye(len(groups), dtype=bool)
    for one in range(len(groups)):
        for two in range(len(groups)):
            linked[one, two] |= grouped and groups[one] == groups[two] != 0
            linked[one, two] |= any({one, two} <= set(cluster) for cluster in clusters)
    for _ in groups:
        linked = linked @ linked
    assert found.dtype == np.int64 and np.array_equal(found[:, None] == found[None], linked)


# Stability


def sequel(count: int, label: Callable[[int], str], group: Callable[[int], str] = lambda _: "") -> Index:
    """The first `count` images of one endless stream."""
    images = tuple(
        LabelledImage(path=str(n), label=label(n), sha256=hashlib.sha256(str(n).encode()).hexdigest(), group=group(n))
        for n in range(count)
    )
    return Index(images=images, labels=tuple(sorted({p.label for p in images})))


@pytest.mark.parametrize("fold", [(0, 0), (3, 5)])
@pytest.mark.parametrize("size", [1, 3])
def test_further_images_move_nobody(fold: tuple[int, int], size: int) -> None:
    """2,000 images, alone or in groups of three: 1, 20 and 100 more move none of those that were there."""
    data = DataSection(fold=fold)
    label, group = (lambda n: "ab"[n // size % 2]), (lambda n: f"g{n // size}" if size > 1 else "")
    for seed in range(3):
        before = sides(split_index(sequel(2000, label, group), data, seed))
        wanted = 0.2 if fold[1] else 0.15
        spread = 4 * (wanted * (1 - wanted) * 2000 * size) ** 0.5
        assert abs(sum(side == "test" for side in before.values()) - wanted * 2000) < spread
        for more in (1, 20, 100):
            after = sides(split_index(sequel(2000 + more, label, group), data, seed))
            assert {sha: after[sha] for sha in before} == before


def test_a_test_image_of_a_rare_class_never_becomes_a_training_image() -> None:
    """20 defects of 2,000: few may change sides at the border of the test set, and then to validation."""
    moved = 0
    for seed in range(12):
        before = sides(split_index(sequel(2000, lambda n: "ab"[n % 100 == 0]), DataSection(), seed))
        after = sides(split_index(sequel(2020, lambda n: "ab"[n % 100 == 0]), DataSection(), seed))
        assert not [sha for sha in before if (before[sha], after[sha]) == ("test", "train")]
        moved += sum(before[sha] != after[sha] for sha in before)
    assert moved <= 12


@pytest.mark.parametrize("count", [24, 40, 60, 100])
def test_small_sets_keep_the_requested_fractions(count: int) -> None:
    for seed in range(30):
        manifest = split_index(sequel(count, lambda n: "ab"[n % 2]), DataSection(), seed)
        for name, fraction in (("validation", 0.15), ("test", 0.15)):
            for label in "ab":
                assert abs(manifest.counts[name][label] - fraction * count / 2) <= max(1.0, 0.25 * fraction * count / 2)


# What cannot be


def refused(index: Index, data: DataSection, seed: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        split_index(index, data, seed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_group_larger_than_a_part() -> None:
    rows = [("ab"[n % 2], "giant" if n < 180 else f"g{n}", None) for n in range(200)]
    message = refused(made_up(rows), DataSection())
    assert "'giant' holds 180 of 200" in message and "instead of" in message


@pytest.mark.parametrize(("flipped", "wanted"), [(3, 4), (0, 0)])
def test_clusters_larger_than_a_part_are_answered_with_a_distance_that_works(flipped: int, wanted: int) -> None:
    """Five shots of each part, two parts and a bit of each class: the largest distance that splits, or 0 alone."""
    rng = np.random.default_rng(0)
    rows, hashes = [], []
    for label in "ab":
        for number in range(12):
            if number % 5 == 0:
                bits = rng.integers(0, 2, BITS, dtype=np.uint8)
            shot = bits.copy()
            shot[rng.choice(BITS, flipped, replace=False)] ^= 1
            rows.append((label, "", None))
            hashes.append(np.packbits(shot).tobytes())
    index = made_up(rows, hashes)
    message = refused(index, DataSection())
    assert "a cluster of near-duplicates holds 5 of 24" in message
    assert "near_duplicates = 0 turns the search off" in message and "by = 'time' or 'group'" in message
    named = re.search(r"set near_duplicates = (\d+)", message)
    assert int(named[1] if named else 0) == wanted
    split_index(index, DataSection(near_duplicates=wanted), 0)


def test_class_in_too_few_groups() -> None:
    rows = [("a", f"g{n // 3}", None) for n in range(90)] + [("b", f"h{n % 2}", None) for n in range(10)]
    message = refused(made_up(rows), DataSection())
    assert "none of b ('b' comes in 2 groups (h0, h1))" in message


def test_class_with_two_images() -> None:
    rows = [("a", "", None)] * 40 + [("b", "", None)] * 2
    assert "too few images: the test split would have none of b" in refused(made_up(rows), DataSection())


def test_scarce_classes_reach_every_part_where_they_can() -> None:
    """Three groups of a rare class, each with many of a common one: one for each part, whatever the seed."""
    rows = [("a", f"g{n // 10}", None) for n in range(300)]
    rows += [("b", f"g{10 * (n // 4)}", None) for n in range(12)]
    for seed in range(10):
        manifest = split_index(made_up(rows), DataSection(), seed)
        assert all(manifest.counts[part]["b"] for part in SPLITS)


# Time


def along(days: Sequence[float], label: str = "ab") -> Index:
    return made_up([(label[n % len(label)], "", day * DAY) for n, day in enumerate(days)])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=20, max_size=150),
    st.sampled_from([0.0, 1.0, 7.0]),
    st.lists(st.lists(st.integers(0, 19), min_size=2, max_size=4, unique=True), max_size=4),
)
def test_training_comes_before_validation_before_test(days: list[int], gap: float, clusters: list[list[int]]) -> None:
    taken: set[int] = set()
    disjoint = [kept for one in clusters if len(kept := [p for p in one if not (p in taken or taken.add(p))]) > 1]  # type: ignore[func-returns-value]
    images = along(days).images
    chosen, aside = assign_by_time(images, disjoint, THIRDS, gap)
    everything = [place for part in (*chosen, *aside.values()) for place in part]
    assert sorted(everything) == list(range(len(days)))
    times = [[images[place].time or 0.0 for place in part] for part in chosen]
    for early, late in ((0, 1), (1, 2), (0, 2)):
        if times[early] and times[late]:
            assert max(times[early]) < min(times[late])
            assert min(times[late]) - max(times[early]) >= gap * DAY - 1e-6
    side = {place: number for number, part in enumerate(chosen) for place in part}
    assert all(len({side[p] for p in cluster if p in side}) <= 1 for cluster in disjoint)


def test_time_split_has_its_shares_and_says_what_was_set_aside() -> None:
    manifest = split_index(along(range(200)), DataSection(by="time", gap_days=5.0), 0)
    assert [len(images) for images in parts_of(manifest).values()] == [140, 25, 25]
    assert {why: len(images) for why, images in manifest.set_aside.items()} == {"gap": 10}
    assert manifest.strategy.startswith("by time, 5 days apart") and "10 set aside (gap)" in summary(manifest)
    assert len(sides(manifest)) == 190 and manifest.data == split_index(along(range(200)), DataSection(), 0).data


def test_near_duplicates_of_the_past_are_set_aside() -> None:
    hashes = [np.random.default_rng(n).bytes(32) for n in range(100)]
    hashes[90] = hashes[3]
    index = made_up([("ab"[n % 2], "", n * DAY) for n in range(100)], hashes)
    manifest = split_index(index, DataSection(by="time"), 0)
    (why, twins), *others = manifest.set_aside.items()
    assert why == "near-duplicate of an earlier split" and [p.path for p in twins] == ["/p/90.png"] and not others


def test_gap_that_swallows_a_part() -> None:
    message = refused(along(range(100)), DataSection(by="time", gap_days=20.0))
    assert "validation" in message and "span 99 days" in message and "gap_days = 20" in message


def test_one_moment_cannot_be_divided() -> None:
    assert "1 different times" in refused(along([3.0] * 50), DataSection(by="time"))


def test_class_that_ended_before_the_test() -> None:
    rows = [("a", "", n * DAY) for n in range(100)] + [("b", "", n * DAY) for n in range(20)]
    message = refused(made_up(rows), DataSection(by="time"))
    assert "none of b ('b' was taken from 1970-01-01 to 1970-01-20, the split is from" in message


# Near-duplicates


def test_links_equal_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (40, BITS), dtype=np.uint8)
    bits = base[rng.integers(40, size=500)] ^ (rng.random((500, BITS)) < rng.choice([0.01, 0.04, 0.2], (500, 1)))
    hashes = np.packbits(bits, axis=1)
    unique, rows = np.unique(hashes, axis=0, return_index=True)
    apart = (bits[rows, None] != bits[rows][None]).sum(axis=2)
    for most in (1, 7, 16, 33):
        _, wanted = connected_components(apart <= most, directed=False)
        found = link_hashes(unique, most)
        assert len(set(zip(wanted.tolist(), found.tolist(), strict=True))) == len(set(wanted)) == len(set(found))


def test_a_chain_is_divided_and_a_cloud_is_not() -> None:
    """A walk of 6 bits a step is one chain of links; a cloud of as many around one hash is a cluster."""
    rng = np.random.default_rng(0)
    walk = np.zeros((400, BITS), dtype=np.uint8)
    for row in range(1, 400):
        walk[row] = walk[row - 1]
        walk[row, rng.choice(BITS, 6, replace=False)] ^= 1
    cloud = np.zeros((400, BITS), dtype=np.uint8)
    cloud[np.arange(400)[:, None], rng.integers(0, BITS, (400, 7))] = 1
    assert len(set(link_hashes(np.unique(np.packbits(walk, axis=1), axis=0), 16).tolist())) == 1
    found = cluster_hashes(np.packbits(walk, axis=1), 16)
    assert 20 < len(set(found.tolist())) < 120
    for number in set(found.tolist()):
        own = walk[found == number].astype(int)
        assert (own[:, None] != own[None]).sum(axis=2).max(axis=1).min() <= 32
    assert len(set(cluster_hashes(np.packbits(cloud, axis=1), 16).tolist())) == 1


def test_clusters_of_none_one_and_equal_ones() -> None:
    assert cluster_hashes(np.zeros((0, 32), np.uint8), 16).tolist() == []
    assert cluster_hashes(np.zeros((1, 32), np.uint8), 16).tolist() == [0]
    assert len(set(cluster_hashes(np.zeros((900, 32), np.uint8), 16).tolist())) == 1


def distance(one: np.ndarray, two: np.ndarray) -> int:
    first, second = (np.frombuffer(perceptual_hash(p), dtype=np.uint8) for p in (one, two))
    return int(np.unpackbits(first ^ second).sum())


def test_hash_survives_encoding_size_and_light_and_tells_images_apart() -> None:
    images = [draw_shape(label, seed, 200, 160) for label in SHAPES for seed in range(6)]
    for image in images:
        encoded = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], cv2.IMREAD_COLOR)
        smaller = cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
        lighter = np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8)
        assert max(distance(image, changed) for changed in (encoded, smaller, lighter)) <= 16
    apart = [distance(a, b) for n, a in enumerate(images) for b in images[:n]]
    assert min(apart) > 2 * 16 and 110 < np.mean(apart) < 146


def photographed(frames: Sequence[tuple[str, np.ndarray]]) -> Index:
    rows = [(label, "", None) for label, _ in frames]
    return made_up(rows, [perceptual_hash(frame) for _, frame in frames])


def line_camera(count: int, defective: Callable[[int], bool]) -> list[tuple[str, np.ndarray]]:
    """One part at one place, +-2 px, +-10 % light, noise; defective ones have a scratch."""
    rng = np.random.default_rng(0)
    base = cv2.cvtColor(cv2.resize(skimage.data.coins(), (200, 160)), cv2.COLOR_GRAY2BGR)
    frames = []
    for number in range(count):
        shift = np.array([[1, 0, rng.uniform(-1, 1)], [0, 1, rng.uniform(-1, 1)]])
        frame = cv2.warpAffine(base, shift, (200, 160), borderMode=cv2.BORDER_REFLECT)
        if defective(number):
            x, y = rng.integers(20, 140, 2).tolist()
            cv2.line(frame, (x, y), (x + 20, y + int(rng.integers(-15, 15))), (250, 250, 250), 2)
        frame = np.clip(frame * rng.uniform(0.9, 1.1) + rng.normal(0, 6, frame.shape), 0, 255).astype(np.uint8)
        frames.append(("defective" if defective(number) else "ok", frame))
    return frames


@pytest.mark.parametrize(("count", "every"), [(400, 2), (100, 20), (24, 2)])
def test_a_fixed_camera_over_a_line_is_divided_at_the_first_try(count: int, every: int) -> None:
    manifest = split_index(photographed(line_camera(count, lambda n: n % every == 0)), DataSection(), 0)
    assert sum(len(part) for part in parts_of(manifest).values()) == count
    assert abs(len(manifest.test) - 0.15 * count) <= 0.25 * 0.15 * count + 1
    (cluster,) = [one for one in manifest.unjoined if len(one.images) > count / 2]
    assert cluster.why == "has images of several labels"
    (message,) = [line for line in warnings(manifest) if "look alike" in line]
    assert f"of {len(cluster.images)}, has images of several labels" in message and "group" in message


@pytest.mark.parametrize("jitter", [2, 150])
def test_black_frames_with_a_small_object_are_divided_at_the_first_try(jitter: int) -> None:
    rng = np.random.default_rng(1)
    frames = []
    for number in range(40):
        frame = np.zeros((320, 400, 3), np.uint8)
        x, y = (np.array([200, 160]) + rng.integers(-jitter, jitter + 1, 2)).tolist()
        if number % 2:
            cv2.circle(frame, (x, y), 6, (255, 255, 255), -1)
        else:
            cv2.rectangle(frame, (x - 6, y - 6), (x + 6, y + 6), (255, 255, 255), -1)
        frames.append(("ab"[number % 2], frame))
    frames += [("c", np.zeros((320, 400, 3), np.uint8))] * 20
    manifest = split_index(photographed(frames), DataSection(), 0)
    assert all(manifest.counts[part][label] >= 1 for part in SPLITS for label in "abc")
    assert any("20 of the 20 images of 'c'" in cluster.why for cluster in manifest.unjoined)


def test_solar_cells_that_look_alike_stay_together(solar_cells: Index) -> None:
    """All 95 sets of linked images of the demonstration, some with one image of another label."""
    index = solar_cells
    images = sorted(index.images, key=lambda p: p.sha256)
    hashes = index.hashes(images)
    apart = np.bitwise_count(hashes.view(np.uint64)[:, None] ^ hashes.view(np.uint64)[None]).sum(axis=2)
    _, linked = connected_components(apart <= 16, directed=False)
    sizes = Counter(linked.tolist())
    for fold in ((0, 0), (1, 5)):
        manifest = split_index(index, DataSection(source="elpv", fold=fold), 0)
        side = sides(manifest)
        assert len(manifest.clusters) == sum(size > 1 for size in sizes.values()) == 95 and not manifest.unjoined
        assert len({(number, side[p.sha256]) for number, p in zip(linked, images, strict=True)}) == len(sizes)


def test_a_pair_with_two_labels_is_joined_and_more_of_each_are_not() -> None:
    rng = np.random.default_rng(0)
    for labels, kept in (("ab", True), ("aab", True), ("aabb", False), ("aaaaaabb", False)):
        hashes = [rng.bytes(32) for _ in range(200)]
        hashes[: len(labels)] = [hashes[0]] * len(labels)
        rows = [(labels[n] if n < len(labels) else "ab"[n % 2], "", None) for n in range(200)]
        manifest = split_index(made_up(rows, hashes), DataSection(), 0)
        assert (len(manifest.clusters), len(manifest.unjoined)) == ((1, 0) if kept else (0, 1))


def test_near_duplicates_do_not_chain_groups() -> None:
    """60 groups, each with an image like one of the next: by the links they would be one unit of everything."""
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32) for _ in range(600)]
    for group in range(59):
        hashes[10 * group + 9] = hashes[10 * group + 10]
    manifest = split_index(made_up([("ab"[n % 2], f"g{n // 10}", None) for n in range(600)], hashes), DataSection(), 0)
    assert manifest.groups.keys() == set(SPLITS) and sum(manifest.groups.values()) == 60
    assert len(manifest.unjoined) == 59 and "links groups" in manifest.unjoined[0].why


def test_a_class_of_near_duplicates_reaches_every_split() -> None:
    """Three images of a class that are all alike: one in each split, and reported."""
    hashes = [np.random.default_rng(n).bytes(32) for n in range(100)]
    hashes[:3] = [hashes[0]] * 3
    manifest = split_index(made_up([("a" if n < 3 else "b", "", None) for n in range(100)], hashes), DataSection(), 0)
    assert all(manifest.counts[part]["a"] == 1 for part in SPLITS)
    assert [cluster.why for cluster in manifest.unjoined] == ["would leave 1 units of 'a'"]


def test_flat_images_are_alike() -> None:
    assert distance(np.full((40, 50, 3), 7, np.uint8), np.full((90, 30, 3), 250, np.uint8)) == 0


def test_a_hundred_thousand_images_are_divided_in_little_memory() -> None:
    """100,000 rows and hashes, a tenth of them near-duplicates: seconds, and far less memory than the pixels."""
    count = 100_000
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    hashes[: count // 20] = hashes[count // 2 : count // 2 + count // 20]
    index = made_up([("abc"[n % 3], "", None) for n in range(count)], [row.tobytes() for row in hashes])
    tracemalloc.start()
    before = time.process_time()
    manifest = split_index(index, DataSection(), 0)
    spent = time.process_time() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest.clusters) == count // 20
    assert peak < 150e6
    assert spent < 60


# Balance


def test_balance_counts_and_warns() -> None:
    rows = [("common", "", None)] * 400 + [("rare", "", None)] * 20
    manifest = split_index(made_up(rows), DataSection(), 0)
    found = balance(manifest)
    rare = found["rare"]
    assert rare["train"] + rare["validation"] + rare["test"] == rare["all"] == 20 and rare["share"] == 20 / 420
    assert abs(rare["test"] - 3) <= 1 and abs(rare["validation"] - 3) <= 1
    assert ratio(manifest) == manifest.counts["train"]["common"] / rare["train"]
    few, uneven = warnings(manifest)
    assert f"'rare' has {rare['train']:.0f} training images" in few and "at least 20" in few
    assert "training images of 'common' for each of 'rare'" in uneven and "class_weights" in uneven
    even = split_index(made_up([("ab"[n % 2], "", None) for n in range(100)]), DataSection(), 0)
    assert not warnings(even) and f"({ratio(even):.1f} : 1)" in summary(even)


def test_near_duplicates_with_two_labels_are_reported() -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32) for _ in range(200)]
    hashes[1] = hashes[0]
    manifest = split_index(made_up([("ab"[n % 2], "", None) for n in range(200)], hashes), DataSection(), 0)
    (message,) = warnings(manifest)
    assert "1 cluster of near-duplicates with more than one label" in message
    assert "/p/0.png (a)" in message and "/p/1.png (b)" in message
    assert Counter(map(len, manifest.clusters)) == {2: 1}
