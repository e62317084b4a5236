"""Views in batches: the same whoever draws them, drawn ahead, and no more in memory than a few batches."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from eyas_device.preprocess import Preprocessing
from eyas_host.compress.quantize.calibration import prepare_rows
from eyas_host.data import dataset as part_module
from eyas_host.data import loader
from eyas_host.data import transforms as views_module
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.index import build_index
from eyas_host.data.loader import BatchLoader, Prefetcher, Rows, ordered_batches, worker_count
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import Split, split_index
from eyas_host.data.transforms import Augmenter, Batch, prepared
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import TeacherSection
from eyas_host.support.errors import DataError, RecipeError, TrainError
from eyas_host.train.teacher import train_teacher

MIXED = AugmentSection(vertical_flip=True, rotate_degrees=20.0, brightness=0.4, randaugment=1, cutmix=0.4, mixup=0.4)
SEED = (3, 1, 4)


def recipe_of(images: Path, workers: int = 0) -> Recipe:
    return Recipe(
        run=RunSection(name="a", device="cpu", workers=workers),
        data=DataSection(path=str(images)),
        image=ImageSection(size=32),
        augment=MIXED,
    )


@pytest.fixture
def part(shape_images: Path) -> ImageDataset:
    index = build_index(recipe_of(shape_images).data)
    return ImageDataset(index.images[:23], index.labels)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_view_is_the_same_whoever_draws_it_in_whatever_order(
    part: ImageDataset, shape_images: Path, workers: int
) -> None:
    recipe = recipe_of(shape_images, workers)
    whole = Augmenter(MIXED, recipe.image.preprocessing()).views(part.pixels, SEED)
    order = np.random.default_rng(0).permutation(23)
    for batches in (ordered_batches(23, 5), [order[:9], order[9:]], [order]):
        drawn = list(BatchLoader(recipe, part).views(batches, SEED))
        assert [len(one) for one in drawn] == [len(rows) for rows in batches]
        assert all(np.array_equal(one, whole[rows]) for one, rows in zip(drawn, batches, strict=True))
    weak = next(BatchLoader(recipe, part).views([np.array([7])], SEED, strength=0.3, mixed=False))
    assert weak.shape == (1, 32, 32, 3) and not np.array_equal(weak[0], whole[7])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_without_augmentation(part: ImageDataset, shape_images: Path, workers: int) -> None:
    recipe = recipe_of(shape_images, workers)
    drawn = np.concatenate(list(BatchLoader(recipe, part).prepared(ordered_batches(23, 6))))
    assert np.array_equal(drawn, prepared(part.pixels, recipe.image.preprocessing()))


def test_many_prepared_images_lie_in_a_file(
    part: ImageDataset, shape_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe_of(shape_images).image.preprocessing()
    small = prepared(part.pixels, spec)
    monkeypatch.setattr(views_module, "MAX_IN_MEMORY_BYTES", small.nbytes - 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    large = prepared(part.pixels, spec)
    assert isinstance(large, np.memmap) and not isinstance(small, np.memmap)
    assert np.array_equal(large, small) and np.array_equal(large[[3, 1]], small[[3, 1]])
    assert torch.equal(torch.from_numpy(large[4:9]), torch.from_numpy(small[4:9]))
    assert not list(tmp_path.iterdir())  # nothing to clean up
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"7.07e-05 GB .*No such file or directory.*set TMPDIR"):
        prepared(part.pixels, spec)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_keeps_its_random_state(part: ImageDataset, shape_images: Path, workers: int) -> None:
    """Dropout between two batches is what it would be without any drawing."""
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    seen = [
        torch.rand(1) for _ in BatchLoader(recipe_of(shape_images, workers), part).views(ordered_batches(23, 6), SEED)
    ]
    assert torch.equal(torch.cat(seen), expected)


def test_a_teacher_is_the_same_with_and_without_workers(shape_images: Path, tmp_path: Path) -> None:
    """Both stages, to the bit."""
    data = DataSection(path=str(shape_images), limit=30, split=(0.6, 0.2, 0.2))
    split = Split(split_index(build_index(data), data, 0), tmp_path / "run")
    teacher = TeacherSection(model="mobilenetv3_small_050", weights="random", head_epochs=1, epochs=1, batch=8)
    states = []
    for workers in (0, 2):
        recipe = msgspec.structs.replace(recipe_of(shape_images, workers), teacher=teacher)
        states.append(train_teacher(recipe, split, tmp_path / str(workers))[0].state_dict())
    assert all(torch.equal(one, two) for one, two in zip(*(state.values() for state in states), strict=True))


def test_all_rows_ordered_batches() -> None:
    assert [len(rows) for rows in ordered_batches(50, 8)] == [8] * 6 + [2]
    assert np.array_equal(np.concatenate(ordered_batches(50, 8)), np.arange(50)) and ordered_batches(0) == []


def test_workers_share_what_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one worker read, another one and the parent find, as far as there is room; the rest is read again."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(4):
            image = rng.integers(0, 256, (40, 32 + 8 * number, 3), dtype=np.uint8)
            assert cv2.imwrite(str(tmp_path / label / f"{number}.png"), image)
    index = build_index(DataSection(path=str(tmp_path)))
    sizes = [40 * (32 + 8 * (number % 4)) * 3 for number in range(8)]
    monkeypatch.setattr(part_module, "MAX_CACHED_BYTES", sum(sizes[:5]))
    part = ImageDataset(index.images, index.labels)
    before = [pixels.copy() for pixels in ImageDataset(index.images, index.labels).pixels]
    list(BatchLoader(recipe_of(tmp_path, 1), part).prepared(ordered_batches(8, 1)))
    for image in part.images[:5]:
        Path(image.path).unlink()
    assert all(np.array_equal(part.pixels[n], before[n]) for n in range(8))
    Path(part.images[6].path).unlink()
    with pytest.raises(DataError, match="missing or changed"):
        _ = part.pixels[6]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changed_stops_training_with_one_line(tmp_path: Path, workers: int) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(4):
            image = np.full((40, 40, 3), 10 * number + (label == "b"), dtype=np.uint8)
            assert cv2.imwrite(str(tmp_path / label / f"{number}.png"), image)
    index = build_index(DataSection(path=str(tmp_path)))
    part = ImageDataset(index.images, index.labels)
    Path(part.images[5].path).write_bytes(b"other bytes")
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(BatchLoader(recipe_of(tmp_path, workers), part).prepared(ordered_batches(8, 2)))
    assert str(caught.value).startswith(part.images[5].path) and "\n" not in str(caught.value)
    assert len(seen) == 2  # the two batches before it, in order


def test_a_killed_worker_is_said_with_what_to_do() -> None:
    parent = os.getpid()

    def draw(rows: Rows) -> Batch:
        if rows[0] == 2 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((len(rows), 32, 32, 3), dtype=np.uint8)

    with pytest.raises(TrainError, match=r"killed.*smaller \[run\] workers than 1, or 0"):
        list(Prefetcher(draw, 1)(ordered_batches(4, 1)))
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL  # torch's raises at any later place


def test_workers_are_kept_from_one_epoch_to_the_next() -> None:
    """Also where an epoch was not read to its end; arrays of a tuple arrive together."""

    def load(item: tuple[int, float]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([os.getpid()]), np.full(3, item[0] * item[1])

    loader = Prefetcher(load, 2)
    first, second = ([*loader([(n, scale) for n in range(5)])] for scale in (1.0, 2.0))
    unfinished = loader([(n, 3.0) for n in range(9)])
    next(unfinished)
    third = [*loader([(n, 4.0) for n in range(4)])]
    for seen, scale in ((first, 1.0), (second, 2.0), (third, 4.0)):
        assert [float(values[0]) for _, values in seen] == [n * scale for n in range(len(seen))]
    processes = [{int(pid) for pid, _ in seen} for seen in (first, second, third)]
    assert processes[0] == processes[1] == processes[2] and os.getpid() not in processes[0]
    assert len(third) == 4 and len(first) == 5


def test_a_fault_of_ours_is_not_hidden() -> None:
    def draw(rows: Rows) -> Batch:
        raise RuntimeError("a bug")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug"):
            list(Prefetcher(draw, workers)(ordered_batches(2)))


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """A run that is killed may be started again at once: no child holds its lock."""
    code = f"""
import fcntl, os, signal, time, numpy as np
from eyas_host.data import loader
from eyas_host.data.loader import Prefetcher, ordered_batches
lock = open({str(tmp_path / "lock")!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
def draw(rows):
    time.sleep(0 if rows[0] == 0 else 60)
    return np.zeros((1, 8, 8, 3), dtype=np.uint8)
loader = Prefetcher(draw, 2)
next(loader(ordered_batches(9, 1)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    taken = ["flock", "--timeout", "2", str(tmp_path / "lock"), "true"]
    assert subprocess.run(taken, check=False).returncode == 0


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(cores: int, ranks: str = "1", **run: object) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        return worker_count(RunSection(name="a", device="cpu", **run))  # type: ignore[arg-type]

    assert [count(cores) for cores in (1, 2, 4, 64)] == [0, 1, 3, 4]
    assert count(8, "4") == 1 and count(2, "4") == 0
    assert count(1, workers=3) == 3 and count(64, workers=0) == 0


def test_workers_whose_batches_do_not_fit_into_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64e6, 0, 64e6) if "shm" in str(path) else 1 / 0)
    loader._warn_of_shared_memory.cache_clear()
    run = RunSection(name="a", device="cpu")
    assert [worker_count(run, batch_bytes=size) for size in (1_000_000, 10_000_000, 30_000_000)] == [3, 2, 0]
    assert worker_count(run, batch_bytes=10_000_000) == 2
    assert capsys.readouterr().err.count("64 MB are free, too little for the batches of 3 loader processes") == 2
    monkeypatch.setattr(loader, "_SHARED_MEMORY", Path("/nowhere/at/all"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.statvfs(path))
    assert worker_count(RunSection(name="a", workers=4), batch_bytes=1) == 0


def test_little_memory_for_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(loader, "usable_memory", lambda: 1.2e9)
    assert worker_count(RunSection(name="a", device="cpu")) == 2
    assert worker_count(RunSection(name="a", device="cpu", workers=5)) == 5


def test_the_setting_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "a"\nworkers = 2\n[data]\npath = "images"\n')
    assert load_recipe(path).run.workers == 2
    assert load_recipe(path, ["run.workers=auto"]).run.workers == "auto"
    for wrong in ("-1", "1000", "many"):
        with pytest.raises(RecipeError, match=r"\[run\] workers"):
            load_recipe(path, [f"run.workers={wrong}"])


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Peak memory of an epoch over 150 images, then over 700 in the same process, whose views are 83 MB more."""
    rng = np.random.default_rng(0)
    tile = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (48, 48))
    for number in range(700):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        tile[0, :2] = np.frombuffer(number.to_bytes(6, "big"), dtype=np.uint8).reshape(2, 3)
        assert cv2.imwrite(str(folder / f"{number:04d}.bmp"), tile)
    code = f"""
import torch
from pathlib import Path
from eyas_host.data import dataset
from eyas_host.data.index import build_index
from eyas_host.data import loader
from eyas_host.data.loader import BatchLoader, ordered_batches
from eyas_host.recipe import DataSection, ImageSection, Recipe, RunSection
torch.set_num_threads(1)
dataset.MAX_CACHED_BYTES = 1 << 20
recipe = Recipe(run=RunSection(name="a", device="cpu", workers=0), image=ImageSection(size=224))
index = build_index(DataSection(path={str(tmp_path)!r}, near_duplicates=0))
for count in (150, 700):
    some = dataset.ImageDataset(index.images[:count], index.labels)
    seen = sum(len(batch) for batch in BatchLoader(recipe, some).views(ordered_batches(count, 16), (0, 2)))
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(seen, int(peak) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (few, before), (many, after) = (line.split() for line in done.stdout.splitlines())
    assert (int(few), int(many)) == (150, 700)
    assert float(after) - float(before) < 20, done.stdout


@pytest.mark.parametrize("how", ["rows", "slice", "all", "loader"])
def test_no_more_than_a_few_decoded_images_are_in_memory(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 images of 1.2 megapixels are prepared with the memory of a few."""
    monkeypatch.setattr(part_module, "MAX_CACHED_BYTES", 0)
    images = []
    for number in range(40):
        path = tmp_path / f"{number}.jpg"
        cv2.imwrite(str(path), np.full((900, 1350, 3), number, dtype=np.uint8))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        images.append(LabelledImage(path=str(path), label="ab"[number % 2], sha256=digest))
    dataset = ImageDataset(images, ("a", "b"), Preprocessing(size=32))
    loader = BatchLoader(recipe_of(tmp_path), dataset)
    tracemalloc.start()
    if how == "rows":
        batch = prepare_rows(dataset, range(40))
    elif how == "loader":
        batch = np.concatenate(list(loader.prepared(ordered_batches(40))))
    else:
        batch = prepared(dataset.pixels if how == "all" else dataset.pixels[:40], Preprocessing(size=32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.shape == (40, 32, 32, 3) and [int(one.mean()) for one in batch] == list(range(40))
    assert peak < 5 * 900 * 1350 * 3
