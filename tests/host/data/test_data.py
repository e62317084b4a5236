"""Images: the index, the split and the views."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from eyas_device.preprocess import Preprocessing, prepare, read_image
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.index import Index, build_index
from eyas_host.data.manifest import SPLITS, SplitManifest, data_hash, save_split
from eyas_host.data.sources import ELPV_NOTICE, LabelledImage
from eyas_host.data.split import Split, split_index
from eyas_host.data.transforms import Augmenter, prepared
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from tests.support.shapes import draw_folder, draw_shape

STILL = AugmentSection(horizontal_flip=False, rotate_degrees=0.0, crop_scale=1.0, brightness=0.0, contrast=0.0)
SPEC = Preprocessing(size=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images, to be spoilt."""
    return draw_folder(tmp_path / "images", count=3, width=40, height=36, labels=("ring", "square"))


def index(folder: Path, **settings: object) -> Index:
    return build_index(DataSection(path=str(folder), **settings))  # type: ignore[arg-type]


# The index


def test_index_lists_every_image_with_its_hash(shape_images: Path) -> None:
    found = index(shape_images)
    assert found.labels == ("circle", "cross", "ring", "square", "triangle")
    assert set(found.counts().values()) == {12}
    assert {p.path for p in found.images} == {str(p) for p in shape_images.rglob("*.*g")}
    for image in found.images[::7]:
        assert image.sha256 == hashlib.sha256(Path(image.path).read_bytes()).hexdigest()
        assert Path(image.path).parent.name == image.label


def test_folders_that_cannot_be_used(folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        index(folder / "absent")
    (folder / "triangle").mkdir()
    with pytest.raises(DataError, match="class without images: triangle"):
        index(folder)
    (folder / "triangle").rmdir()
    shutil.rmtree(folder / "ring")
    with pytest.raises(DataError, match=r"two or more class folders are needed, found 1 \(square\)"):
        index(folder)


def test_hidden_folders_and_other_files_are_no_images(folder: Path) -> None:
    (folder / ".thumbs").mkdir()
    (folder / "ring" / "notes.txt").write_text("not an image")
    (folder / "README").write_text("nor this")
    (folder / "ring" / "deeper").mkdir()
    (folder / "ring" / "000.png").rename(folder / "ring" / "deeper" / "UPPER.PNG")
    assert index(folder).counts() == {"ring": 3, "square": 3}


def test_every_unreadable_image_is_listed(folder: Path) -> None:
    empty, junk = folder / "ring" / "empty.png", folder / "square" / "junk.jpg"
    empty.touch()
    junk.write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match="2 unreadable images") as caught:
        index(folder)
    assert str(empty) in str(caught.value) and str(junk) in str(caught.value)
    assert "skip_unreadable" in str(caught.value)
    found = index(folder, skip_unreadable=True)
    assert found.counts() == {"ring": 3, "square": 3}
    assert [image.path for image in found.unreadable] == [str(empty), str(junk)]


def test_an_image_that_is_too_large_is_named_with_the_limit(folder: Path) -> None:
    """A hundred megapixels, of which only the header is read: 10,000 x 10,000 in a few bytes."""
    path = folder / "ring" / "panorama.png"
    good = (folder / "ring" / "000.png").read_bytes()
    path.write_bytes(good[:16] + (10_000).to_bytes(4, "big") * 2 + good[24:])
    with pytest.raises(DataError, match=r"panorama.png: 10000x10000 pixels, 100.0 megapixels; at most 50 are allowed"):
        index(folder)


def test_long_lists_of_unreadable_images_end(folder: Path) -> None:
    for number in range(13):
        (folder / "ring" / f"bad{number}.png").touch()
    with pytest.raises(DataError, match="and 3 more"):
        index(folder)


def test_class_with_nothing_readable(folder: Path) -> None:
    for path in (folder / "ring").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(DataError, match="class 'ring' has no readable image"):
        index(folder, skip_unreadable=True)


def test_same_image_under_two_labels(folder: Path) -> None:
    shutil.copy(folder / "ring" / "000.png", folder / "square" / "again.png")
    with pytest.raises(DataError, match="two labels") as caught:
        index(folder)
    assert "(ring)" in str(caught.value) and "again.png (square)" in str(caught.value)


def test_exact_copies_are_dropped(folder: Path) -> None:
    shutil.copy(folder / "ring" / "000.png", folder / "ring" / "again.png")
    assert index(folder).counts() == {"ring": 3, "square": 3}


def test_limit_keeps_the_classes_shares(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, count=10, width=40, height=36, labels=("ring",))
    draw_folder(tmp_path, count=20, width=40, height=36, labels=("square",))
    assert index(root, limit=15).counts() == {"ring": 5, "square": 10}
    assert index(root, limit=1).counts() == {"ring": 1, "square": 1}
    assert index(root, limit=99).counts() == {"ring": 10, "square": 20}


def gradient(mode: str) -> Image.Image:
    """An image that is dark on the left and bright on the right."""
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("I;16", "png"), ("CMYK", "jpg"), ("L", "tif")]
)
def test_images_of_other_kinds_are_read(folder: Path, mode: str, suffix: str) -> None:
    path = folder / "ring" / f"other.{suffix}"
    gradient(mode).save(path)
    assert index(folder).counts()["ring"] == 4
    pixels = read_image(path)
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    grey = pixels.astype(float).mean(axis=(0, 2))
    assert np.abs(grey - np.linspace(0, 255, 60)).max() < 12


def test_exif_rotation_is_applied(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = folder / "ring" / "turned.jpg"
    gradient("RGB").save(path, exif=exif, quality=95)
    assert index(folder).counts()["ring"] == 4
    pixels = read_image(path)
    assert pixels.shape == (60, 40, 3)
    assert pixels[:5].mean() < 30 and pixels[-5:].mean() > 225


def test_elpv_has_its_published_counts(solar_cells: Index) -> None:
    found = solar_cells
    severities = [p.severity for p in found.images]
    assert len(found.images) == len({p.sha256 for p in found.images}) == 2624
    assert found.counts()["defective"] == 821
    assert {p.stratum for p in found.images} == {"mono", "poly"}
    assert all((p.label == "defective") == (p.severity is not None and p.severity >= 0.5) for p in found.images)
    assert {round(s, 2) for s in severities if s is not None} == {0.0, 0.33, 0.67, 1.0}
    assert ELPV_NOTICE in found.notices and any("optimistic" in notice for notice in found.notices)


# The split


def made_up(counts: dict[tuple[str, str], int]) -> Index:
    images = [
        LabelledImage(path=f"/p/{label}/{n}", label=label, sha256=f"{n:04d}{label}{stratum}", stratum=stratum)
        for (label, stratum), count in counts.items()
        for n in range(count)
    ]
    return Index(images=tuple(images), labels=tuple(sorted({label for label, _ in counts})))


def part_of(manifest: SplitManifest, part: str) -> tuple[LabelledImage, ...]:
    images: tuple[LabelledImage, ...] = getattr(manifest, part)
    return images


_COUNTS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.sampled_from(("", "x"))), st.integers(1, 60), min_size=2, max_size=6
)
_PARTS = st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(2, 20)).map(
    lambda w: (w[0] / sum(w), w[1] / sum(w), 1 - (w[0] + w[1]) / sum(w))
)


@settings(max_examples=60, deadline=None)
@given(_COUNTS, _PARTS, st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
def test_split_is_whole_fair_and_repeatable(
    counts: dict[tuple[str, str], int], parts: tuple[float, float, float], seed: int, random: object
) -> None:
    whole = made_up(counts)
    assume(len(whole.labels) > 1)
    try:
        manifest = split_index(whole, DataSection(split=parts), seed)
    except DataError as error:
        smallest = min(sum(n for (label, _), n in counts.items() if label == own) for own in whole.labels)
        assert smallest < 3, error  # a class with an image for each part is never refused
        return
    chosen = [{p.sha256 for p in part_of(manifest, part)} for part in SPLITS]
    assert sum(map(len, chosen)) == len(whole.images)
    assert set().union(*chosen) == {p.sha256 for p in whole.images}
    for part, share in zip(SPLITS, parts, strict=True):
        images = part_of(manifest, part)
        got = Counter((p.label, p.stratum) for p in images)
        for key, total in counts.items():
            moved = 2 if sum(n for (label, _), n in counts.items() if label == key[0]) * min(parts) < 2 else 1
            assert abs(got[key] - share * total) <= max(1.0, 0.25 * share * total) + moved + 1e-9
        assert manifest.counts[part] == Counter(p.label for p in images)
    shuffled = list(whole.images)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    moved = [msgspec.structs.replace(p, path=f"/elsewhere/{n}") for n, p in enumerate(shuffled)]
    again = split_index(msgspec.structs.replace(whole, images=tuple(moved)), DataSection(split=parts), seed)
    for part in SPLITS:
        assert [p.sha256 for p in part_of(again, part)] == [p.sha256 for p in part_of(manifest, part)]
    assert data_hash(again) == data_hash(manifest)


def test_seeds_differ_and_the_data_hash_does_not() -> None:
    whole = made_up({("a", ""): 40, ("b", ""): 40})
    one, two = (split_index(whole, DataSection(), seed) for seed in (1, 2))
    assert {p.sha256 for p in one.test} != {p.sha256 for p in two.test}
    assert data_hash(one) == data_hash(two)
    relabelled = msgspec.structs.replace(one, test=tuple(msgspec.structs.replace(p, label="b") for p in one.test))
    assert data_hash(relabelled) != data_hash(one)


def test_too_few_images(folder: Path) -> None:
    assert split_index(index(folder), DataSection(split=(0.9, 0.05, 0.05)), 0).counts["test"] == {
        "ring": 1,
        "square": 1,
    }
    (folder / "ring" / "000.png").unlink()
    with pytest.raises(DataError, match=r"too few images: the (validation|test) split would have none of ring"):
        split_index(index(folder), DataSection(split=(0.9, 0.05, 0.05)), 0)


@pytest.fixture
def split(folder: Path, tmp_path: Path) -> Split:
    manifest = split_index(index(folder), DataSection(split=(0.34, 0.33, 0.33)), 0)
    save_split(manifest, tmp_path / "run", sources=[str(folder)])
    return Split.load(tmp_path / "run")


def test_the_access_log_survives_a_new_split(split: Split, tmp_path: Path) -> None:
    assert split.test_accesses() == []
    assert len(split.train) == len(split.validation) == 2 and split.test_accesses() == []
    assert sorted(p.label for p in split.open_test("one", early=True).images) == ["ring", "square"]
    split.open_test("two", early=True)
    shutil.rmtree(tmp_path / "run" / "split")
    save_split(split.manifest, tmp_path / "run")
    accesses = Split.load(tmp_path / "run").test_accesses()
    assert [access.reason for access in accesses] == ["one", "two"]
    assert accesses[0].time <= accesses[1].time
    assert not hasattr(split, "test")


def test_targets_follow_the_labels(split: Split) -> None:
    part = ImageDataset(split.manifest.train, ("square", "ring"))
    assert part.targets.tolist() == [("square", "ring").index(p.label) for p in part.images]
    assert [p.shape for p in part.pixels] == [(36, 40, 3)] * 2


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_file_that_changed_since_the_split(split: Split, change: str) -> None:
    path = Path(split.manifest.train[0].path)
    path.unlink()
    if change == "edited":
        Image.fromarray(np.zeros((36, 40, 3), dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match="missing or changed since the split") as caught:
        list(split.train.pixels)
    assert str(path) in str(caught.value)
    assert len(split.validation.pixels) == 2


def test_forgotten_pixels_are_read_and_checked_again(split: Split) -> None:
    before = split.train.pixels[0].copy()
    Path(split.manifest.train[0].path).write_bytes(b"")
    assert np.array_equal(split.train.pixels[0], before)
    split.train.release()
    with pytest.raises(DataError):
        _ = split.train.pixels[0]


def test_missing_and_damaged_manifests(tmp_path: Path, split: Split) -> None:
    with pytest.raises(DataError, match="--from split"):
        Split.load(tmp_path / "nothing")
    (tmp_path / "run" / "split" / "manifest.json").write_bytes(b'{"strategy": 3}')
    with pytest.raises(DataError, match="--from split"):
        Split.load(tmp_path / "run")


# Views


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [draw_shape("ring", seed, 60 + 4 * seed, 50) for seed in range(8)]


def test_without_augmentation_a_view_is_what_the_device_prepares(frames: list[np.ndarray]) -> None:
    spec = Preprocessing(size=32, fit="pad")
    views = Augmenter(STILL, spec).views(frames, (3, 1))
    assert np.array_equal(views, prepared(frames, spec))
    assert np.array_equal(views, np.stack([prepare(frame, spec) for frame in frames]))


def test_the_same_seed_draws_the_same_views(frames: list[np.ndarray]) -> None:
    augmenter = Augmenter(AugmentSection(quarter_turns=True, vertical_flip=True, cutmix=0.3), SPEC)
    before = [frame.copy() for frame in frames]
    first = augmenter.views(frames, (0, 5, 1))
    assert first.shape == (8, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, augmenter.views(frames, (0, 5, 1)))
    assert not np.array_equal(first, augmenter.views(frames, (0, 5, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(before, frames, strict=True))


@pytest.mark.parametrize(
    ("change", "variants"),
    [
        ({"horizontal_flip": True}, lambda p: [p, p[:, ::-1]]),
        ({"vertical_flip": True}, lambda p: [p, p[::-1]]),
        ({"quarter_turns": True}, lambda p: [np.rot90(p, k) for k in range(4)]),
    ],
)
def test_flips_and_turns_give_just_those_images(
    change: dict[str, bool], variants: Callable[..., list[np.ndarray]]
) -> None:
    image = draw_shape("triangle", 1, 32, 32)
    views = Augmenter(msgspec.structs.replace(STILL, **change), SPEC).views([image] * 40, (0,))
    expected = [v.tobytes() for v in map(np.ascontiguousarray, variants(image))]
    seen = {view.tobytes() for view in views}
    assert seen == set(expected) and len(seen) == len(expected)


def test_light_changes_brightness_within_its_bounds() -> None:
    grey = np.full((32, 32, 3), 100, dtype=np.uint8)
    views = Augmenter(msgspec.structs.replace(STILL, brightness=0.2), SPEC).views([grey] * 60, (0,))
    levels = views.reshape(60, -1)
    assert (levels == levels[:, :1]).all()
    assert levels.min() >= 79 and levels.max() <= 121
    assert levels.min() < 90 and levels.max() > 110


def test_crops_keep_at_least_the_smallest_part() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))[..., np.newaxis].repeat(3, axis=2)
    views = Augmenter(msgspec.structs.replace(STILL, crop_scale=0.25), SPEC).views([ramp] * 60, (0,))
    width = (views[:, 0, -1, 0].astype(int) - views[:, 0, 0, 0]) * 32 / 31 / 200
    assert width.min() > 0.48 and width.min() < 0.65 and width.max() > 0.9


def test_cutmix_pastes_patches_of_other_images_into_some() -> None:
    plain = [np.full((32, 32, 3), 20 * n, dtype=np.uint8) for n in range(12)]
    views = Augmenter(msgspec.structs.replace(STILL, cutmix=0.5), SPEC).views(plain, (1,))
    mixed = [len(np.unique(view)) > 1 or view[0, 0, 0] != 20 * n for n, view in enumerate(views)]
    assert 0 < sum(mixed) < 12
    for number, view in enumerate(views):
        values = set(np.unique(view).tolist())
        assert values <= {20 * n for n in range(12)} and len(values) <= 2
        assert not mixed[number] or (view != 20 * number).any()
    nothing = Augmenter(STILL, SPEC).views(plain, (1,))
    assert np.array_equal(nothing, np.stack(plain))


def test_jpeg_bytes_survive_the_round_through_the_index(folder: Path) -> None:
    buffer = io.BytesIO()
    gradient("RGB").save(buffer, "JPEG", quality=100)
    (folder / "ring" / "exact.jpeg").write_bytes(buffer.getvalue())
    found = {Path(p.path).name: p for p in index(folder).images}
    part = ImageDataset([found["exact.jpeg"]], ("ring", "square"))
    assert np.abs(part.pixels[0].astype(int)[..., 0].mean(axis=0) - np.linspace(0, 255, 60)).max() < 4
