"""The view cache: the teacher's outputs match the views, the size is checked first, files are written atomically."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from eyas_host.data.index import build_index
from eyas_host.data.split import Split, split_index
from eyas_host.data.transforms import Augmenter
from eyas_host.evaluation.inference import logits_of
from eyas_host.models.factory import PixelClassifier
from eyas_host.pipeline.runner import RunContext, run_chain
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.stages.chain import STAGES
from eyas_host.support.errors import StageError
from eyas_host.train.student import DistillationTask
from eyas_host.train.view_cache import ViewCache, check_views_fit
from tests.support.small_disk import mounted

CPU = torch.device("cpu")
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def recipe(shape_images: Path) -> Recipe:
    return Recipe(
        run=RunSection(name="toy", device="cpu", workers=0),
        data=DataSection(path=str(shape_images), limit=30, split=(0.6, 0.2, 0.2)),
        image=ImageSection(size=32),
        teacher=TeacherSection(model="mobilenetv3_small_050", weights="random", head_epochs=1, epochs=0),
        student=StudentSection(model="mobilenetv3_small_050", weights="random", views=2, batch=8),
    )


@pytest.fixture(scope="module")
def split(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Split:
    manifest = split_index(build_index(recipe.data), recipe.data, 0)
    return Split(manifest, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cached(recipe: Recipe, split: Split, network: PixelClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a view cache. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("cached") / "views"
    ViewCache.make(root, recipe, split, copy.deepcopy(network))
    return root


def with_student(recipe: Recipe, **changes: object) -> Recipe:
    return msgspec.structs.replace(recipe, student=msgspec.structs.replace(recipe.student, **changes))


def whole_view(cache: ViewCache, number: int, count: int) -> np.ndarray:
    return cache.pixels(np.full(count, number), np.arange(count))


def test_the_views_and_the_teachers_answers_to_them(
    recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    cache = ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    count = len(split.train)
    views = [whole_view(cache, number, count) for number in range(len(cache))]
    assert cache.logits.shape == (2, count, 5) and cache.features.shape == (2, count, network.pooled_channels)
    augmenter = Augmenter(recipe.augment, recipe.image.preprocessing())
    for number, view in enumerate(views):
        assert np.array_equal(view, augmenter.views(split.train.pixels, (recipe.run.seed, 5, number)))
        assert np.allclose(cache.logits[number], logits_of(network, view, CPU), atol=2e-2)
    rows = np.array([3, 0, 3])
    with torch.inference_mode():
        pooled = network.pooled(torch.from_numpy(np.stack([views[0][3], views[1][0], views[1][3]])).permute(0, 3, 1, 2))
    assert np.allclose(cache.features[np.array([0, 1, 1]), rows], pooled, atol=2e-2)


def test_distillation_reads_each_image_once_with_its_own_logits(
    recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    cache, count = ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network)), len(split.train)
    views = [whole_view(cache, number, count) for number in range(len(cache))]
    task = DistillationTask(recipe, split, cache)
    batches = list(task.batches(0))
    assert len(batches) == task.images // 8 == count // 8
    again = list(task.batches(0))
    assert all(
        torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x[:4], y[:4], strict=True)
    )
    where = {view[row].tobytes(): row for view in views for row in range(count)}
    for pixels, labels, teacher, _, _ in batches:
        rows = [where[p.permute(1, 2, 0).contiguous().numpy().tobytes()] for p in pixels]
        assert torch.equal(labels, torch.eye(len(split.labels))[split.train.targets[rows]])
        assert torch.allclose(teacher, torch.from_numpy(logits_of(network, _hwc(pixels), CPU)), atol=2e-2)


def _hwc(pixels: Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def test_mixed_views_are_answered_for_as_they_are(
    recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    """With CutMix and mixup the teacher sees the mix, whatever batch or process drew it."""
    augment = AugmentSection(cutmix=0.6, mixup=0.6)
    caches = []
    for workers in (0, 2):
        run = msgspec.structs.replace(recipe.run, workers=workers)
        mixed = msgspec.structs.replace(recipe, augment=augment, run=run)
        caches.append(ViewCache.make(tmp_path / str(workers), mixed, split, copy.deepcopy(network)))
    count = len(split.train)
    one, two = (whole_view(cache, 0, count) for cache in caches)
    assert np.array_equal(one, two)
    alone = Augmenter(augment, recipe.image.preprocessing()).views(split.train.pixels, (0, 5, 0), mixed=False)
    assert 2 < sum(not np.array_equal(a, b) for a, b in zip(one, alone, strict=True)) < count
    assert np.allclose(caches[0].logits[0], logits_of(network, one, CPU), atol=2e-2)
    task = DistillationTask(mixed, split, caches[1], teacher=False)
    labels = {
        p.permute(1, 2, 0).numpy().tobytes(): row
        for b in task.batches(0)
        for p, row in zip(b.pixels, b.labels, strict=True)
    }
    shares = [labels.get(view.tobytes()) for view in one]
    some = [
        (share, int(target)) for share, target in zip(shares, split.train.targets, strict=True) if share is not None
    ]
    assert len(some) > 2 and all(float(share.sum()) == pytest.approx(1.0, abs=2e-3) for share, _ in some)
    assert any(float(share[target]) < 0.99 for share, target in some)


@pytest.mark.parametrize("damage", ["pixels", "logits", "features", "none"])
def test_damaged_views(recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path, damage: str) -> None:
    ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    if damage == "pixels":
        with (tmp_path / "view-1.u8").open("ab") as damaged:
            damaged.write(bytes(8 * 32 * 32 * 3 * len(split.train)))
    elif damage == "none":
        for path in tmp_path.glob("*.logits.npy"):
            path.unlink()
    else:
        (tmp_path / f"view-1.{damage}.npy").write_bytes(b"junk")
    with pytest.raises(StageError, match="--from distill"):
        ViewCache(tmp_path)


def test_views_that_a_killed_run_left_whole_are_kept(
    recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    expected = ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    count = len(split.train)
    wanted = whole_view(expected, 1, count)
    (tmp_path / "view-0.u8").write_bytes(bytes([7]) * (count * 32 * 32 * 3))
    (tmp_path / "view-1.logits.npy").unlink()  # as if it was killed before the last of the three files
    (tmp_path / "view-1.u8").write_bytes(b"half")
    cache = ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    assert (whole_view(cache, 0, count) == 7).all() and np.array_equal(whole_view(cache, 1, count), wanted)
    assert not list(tmp_path.glob(".*.part"))


# How large


def test_what_is_said_is_what_is_written(
    recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_bytes = 2 * (2 * 5 + network.pooled_channels)
    needed = check_views_fit(tmp_path, recipe, len(split.train), output_bytes=output_bytes)
    assert needed == 2 * len(split.train) * (3 * 32 * 32 + output_bytes)
    assert check_views_fit(tmp_path, recipe, len(split.train), output_bytes=output_bytes, existing=1) == needed // 2
    ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert needed < written < needed + 6 * 256  # the headers
    assert f"2 x {len(split.train)} images, {needed / 1e9:.3g} GB in {tmp_path}" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_cache_above_its_bound_is_refused(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, 10**15))
    large = msgspec.structs.replace(with_student(recipe, views=12), image=ImageSection(size=224))
    with pytest.raises(StageError) as caught:
        check_views_fit(tmp_path / "not" / "yet", large, 100_000, output_bytes=2 * 1282)
    assert str(caught.value) == (
        "[student] views = 12 of 100,000 images at 224 px need 184 GB, more than cache_gb = 20; take views = 1, "
        "or raise cache_gb"
    )
    assert check_views_fit(tmp_path, with_student(large, views=1), 100_000, output_bytes=2 * 1282) < 20e9
    with pytest.raises(StageError, match=r"even one view is too large: take a smaller \[image\] size, or raise"):
        check_views_fit(tmp_path, with_student(large, views=12), 1_000_000)
    assert check_views_fit(tmp_path, with_student(large, cache_gb=0.0), 100_000) == 12 * 100_000 * 224 * 224 * 3


def test_a_cache_above_the_free_disk_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 1000 * 32 * 32 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 5 * one // 2))
    six = with_student(recipe, views=6)
    with pytest.raises(StageError, match=r"0.0184 GB more and 0.00768 GB are free; take views = 2, or free some space"):
        check_views_fit(tmp_path, six, 1000)
    with pytest.raises(StageError, match="take views = 3"):
        check_views_fit(tmp_path, six, 1000, existing=1)
    assert check_views_fit(tmp_path, six, 1000, existing=4) == 2 * one


def test_the_bound_is_reported_before_the_teacher_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    small = with_student(recipe, views=500, cache_gb=0.001)
    with pytest.raises(StageError, match=r"\[student\] views = 500 of .* more than cache_gb = 0.001; take views = "):
        run_chain(STAGES, RunContext(small, tmp_path), until="teach")
    assert [path.parent.name for path in tmp_path.rglob("stage.json")] == ["split"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".u8", ".pt")]


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one view and a half."""
    with mounted(tmp_path / "small", "size=150k") as disk:
        yield disk


def test_a_disk_that_others_fill_meanwhile(
    recipe: Recipe, split: Split, network: PixelClassifier, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when it was looked at: the view in work vanishes, the whole ones stay, and it goes on later."""
    three = with_student(recipe, views=3)
    with pytest.raises(StageError, match="are free; take views = 1"):
        ViewCache.make(small_disk, three, split, copy.deepcopy(network))
    assert not list(small_disk.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**12))
    with pytest.raises(StageError, match=r"No space left on device.*free some space and run again") as caught:
        ViewCache.make(small_disk, three, split, copy.deepcopy(network))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in small_disk.iterdir()) == [f"view-0.{kind}" for kind in KINDS]
    before = (small_disk / "view-0.u8").stat().st_mtime_ns
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    cache = ViewCache.make(small_disk, three, split, copy.deepcopy(network))
    assert len(cache) == 3 and (small_disk / "view-0.u8").stat().st_mtime_ns == before
    augmenter = Augmenter(three.augment, three.image.preprocessing())
    assert np.array_equal(
        whole_view(cache, 2, len(split.train)), augmenter.views(split.train.pixels, (three.run.seed, 5, 2))
    )


KINDS = ("features.npy", "labels.npy", "logits.npy", "u8")


@pytest.mark.parametrize("kind", ["logits.npy", "labels.npy", "features.npy", "u8"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:7], lambda data: data[: len(data) // 2], lambda data: data[:-1]],
    ids=["empty", "seven bytes", "half", "without its end"],
)
def test_a_damaged_view_is_made_again(
    kind: str,
    damage: Callable[[bytes], bytes],
    recipe: Recipe,
    split: Split,
    cached: Path,
    network: PixelClassifier,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "views"
    shutil.copytree(cached, root)
    path = root / f"view-1.{kind}"
    path.write_bytes(damage(path.read_bytes()))
    ViewCache.make(root, recipe, split, copy.deepcopy(network))
    assert f"{root}: view 1 is damaged" in capsys.readouterr().err
    for file in cached.iterdir():
        assert (root / file.name).read_bytes() == file.read_bytes(), file.name
