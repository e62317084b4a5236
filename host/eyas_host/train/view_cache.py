"""The view cache: augmented views of the training images with labels and teacher's outputs, read every epoch.

Views and features are streamed between batches and files, so that a cache may be larger than the memory. Its size on
disk is printed and checked before anything is written.
"""

from __future__ import annotations

import math
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from torch import Tensor

from eyas_host.data.loader import BatchLoader, Rows, ordered_batches
from eyas_host.data.split import Split
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.models.frozen_features import frozen_features
from eyas_host.pipeline import distributed
from eyas_host.recipe import Recipe
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write
from eyas_host.support.progress import meter, say, warn
from eyas_host.train.precision import fast_gpu_math

Half = npt.NDArray[np.float16]


class ViewCache:
    """The views in one folder: `view-N.u8` (raw pixels, uint8 [n, s, s, 3]), their labels and the teacher's outputs.

    `logits` is float16 [views, n, classes], from `view-N.logits.npy`, and `labels` likewise: one class each, but for
    views mixed by CutMix and mixup the fractions of their classes. `features` is float16 [views, n, channels], read
    from `view-N.features.npy` row by row. The logits are written last: a view with logits is complete.
    """

    def __init__(self, root: Path) -> None:
        opened = ExitStack()
        weakref.finalize(self, opened.close)
        self.root = root
        paths = sorted(root.glob("view-*.logits.npy"), key=_number)
        try:
            self.logits: Half = np.stack([np.load(path) for path in paths])
            self.labels: Half = np.stack([np.load(_labels_of(path)) for path in paths])
            self.features = StackedArrays([np.load(_features_of(path), mmap_mode="r") for path in paths])
            self._files = [opened.enter_context(_pixels_of(path).open("rb", buffering=0)) for path in paths]
            count = self.logits.shape[1]
            sizes = {os.fstat(file.fileno()).st_size for file in self._files}
            self._bytes = sizes.pop() // count
            self._side = math.isqrt(self._bytes // 3)
            same = self.features.shape[1] == count and self.labels.shape == self.logits.shape
            if sizes or self._side**2 * 3 != self._bytes or not same:
                raise ValueError("files of different sizes")
        except (OSError, ValueError, EOFError) as error:
            raise StageError(
                f"{root}: the cached views cannot be read ({error}); run again with --from distill"
            ) from None

    def __len__(self) -> int:
        """Number of views per image."""
        return len(self._files)

    def pixels(self, views: Rows, rows: Rows) -> Batch:
        """Pixels uint8 [batch, s, s, 3] of view `views[i]` of image `rows[i]`."""
        batch = np.empty((len(rows), self._side, self._side, 3), dtype=np.uint8)
        for target, view, row in zip(batch, views, rows, strict=True):
            read_row(self._files[view], target, int(row))
        return batch

    @classmethod
    def make(cls, root: Path, recipe: Recipe, split: Split, teacher: PixelClassifier) -> ViewCache:
        """Write the views and the teacher's outputs; complete views of an interrupted run are kept.

        Each of several processes writes some of the views, and all have all of them at the end. Raises `StageError`
        before anything is written if the cache would exceed `[student] cache_gb` or the free disk space, and later if
        the disk is full all the same.
        """
        count = len(split.train)
        paths = [root / f"view-{number}.logits.npy" for number in range(recipe.student.views)]
        shapes = (count, recipe.image.size), (count, len(split.labels)), (count, teacher.pooled_channels)
        found = paths if distributed.is_main() else []
        missing = distributed.from_main([path for path in found if not _is_complete(path, *shapes)])
        if missing and distributed.is_main():
            output_bytes = 2 * (2 * len(split.labels) + teacher.pooled_channels)
            needed = check_views_fit(root, recipe, count, output_bytes=output_bytes, existing=len(paths) - len(missing))
            say(f"  cached views: {len(missing)} x {count:,} images, {format_gb(needed)} in {escape(str(root))}")
        device = pick_device(recipe.run.device)
        teacher = move(teacher, device).eval()
        own = missing[distributed.rank() :: distributed.world_size()]
        loader, batches = BatchLoader(recipe, split.train), ordered_batches(count)
        pooled_of = frozen_features(teacher, recipe.image.size, len(paths) * count)
        with fast_gpu_math(device), meter("views and the teacher's outputs", len(own) * len(batches)) as bar:
            for path in own:
                logits, seed = [], (recipe.run.seed, 5, _number(path))
                labels = loader.augmenter.labels(split.train.targets, len(split.labels), seed, range(count))
                with ExitStack() as files:
                    pixels = files.enter_context(files.enter_context(atomic_write(_pixels_of(path))).open("wb"))
                    features = files.enter_context(files.enter_context(atomic_write(_features_of(path))).open("wb"))
                    _write_header(features, (count, teacher.pooled_channels))
                    for views in loader.views(batches, seed):
                        batch_logits, pooled = _teacher_outputs(teacher, pooled_of(to_tensor(views, device)))
                        pixels.write(views.tobytes())
                        features.write(pooled.tobytes())
                        logits.append(batch_logits)
                        bar.advance()
                _save(_labels_of(path), labels)
                _save(path, np.concatenate(logits))
        distributed.wait_for_all()
        return cls(root)


class StackedArrays:
    """Memory-mapped arrays of one shape, one per view, indexed by [views, rows]."""

    def __init__(self, arrays: Sequence[Half]) -> None:
        if len({array.shape for array in arrays}) != 1:
            raise ValueError("files of different sizes")
        self._arrays = arrays
        self.shape = (len(arrays), *arrays[0].shape)

    def __getitem__(self, index: tuple[Rows, Rows]) -> Half:
        """Row `rows[i]` of view `views[i]`: float16 [batch, channels]."""
        return np.stack([self._arrays[view][row] for view, row in zip(*index, strict=True)])


def read_row(file: FileIO, target: npt.NDArray[Any], row: int) -> None:
    """Fill `target` from row `row` of a file of such rows, without a copy in between."""
    if os.preadv(file.fileno(), [target.reshape(-1).view(np.uint8).data], row * target.nbytes) != target.nbytes:
        raise StageError(f"{file.name}: shorter than when it was opened; run again with --from distill")


def check_views_fit(root: Path, recipe: Recipe, count: int, *, output_bytes: int = 0, existing: int = 0) -> int:
    """Check the space for the views of `count` images below `root`; returns the bytes still to be written.

    `output_bytes` are the labels and the teacher's outputs per view of an image, `existing` the number of views that
    are there. Raises `StageError` if all views exceed `[student] cache_gb`, or the missing ones the free disk space.
    """
    student, size = recipe.student, recipe.image.size
    one = count * (3 * size**2 + output_bytes)
    needed = (student.views - existing) * one
    views = f"[student] views = {student.views} of {count:,} images at {size} px"

    def advice(space: float, kept: int) -> str:
        fitting = kept + int(space // one)
        return f"take views = {fitting}" if fitting else "even one view is too large: take a smaller [image] size"

    check_space(root, views, existing * one, needed, student.cache_gb, advice, existing)
    return needed


def check_space(
    root: Path,
    what: str,
    used: int,
    needed: int,
    cache_gb: float,
    advice: Callable[[float, int], str],
    existing: int = 0,
) -> None:
    """Raise `StageError` if `needed` bytes below `root` exceed the free disk space, or with `used` ones `cache_gb`.

    `advice(space, existing)` names a setting that fits into so many bytes.
    """
    limit = cache_gb * 1e9
    if limit and used + needed > limit:
        raise StageError(
            f"{what} need {format_gb(used + needed)}, more than cache_gb = {cache_gb:g}; {advice(limit, 0)}, or raise "
            "cache_gb"
        )
    free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
    if needed > free:
        raise StageError(
            f"{root}: {what} need {format_gb(needed)} more and {format_gb(free)} are free; "
            f"{advice(free, existing)}, or free some space"
        )


def format_gb(size: float) -> str:
    """`1.25 GB`."""
    return f"{size / 1e9:,.3g} GB"


def _number(path: Path) -> int:
    return int(path.name.split(".")[0].partition("-")[2])


def _is_complete(path: Path, images: tuple[int, int], logits: tuple[int, int], features: tuple[int, int]) -> bool:
    """Whether a view (the path of its logits) has files of these sizes; a damaged one is reported and removed.

    `images` is the number and the side of its images, `logits` and `features` the shapes of these arrays. Raises
    `StageError` for a file that may not be removed.
    """
    if not os.path.lexists(path):
        return False
    files = (path, _labels_of(path), _features_of(path), _pixels_of(path))
    count, side = images
    try:
        shapes = [np.load(file, mmap_mode="r").shape for file in files[:3]]
        if shapes == [logits, logits, features] and files[3].stat().st_size == count * 3 * side**2:
            return True
        problem = "files of other sizes"
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        problem = " ".join((str(error) or type(error).__name__).split())[:120]
    warn(f"{path.parent}: view {_number(path)} is damaged ({problem}); it is made again")
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise StageError(f"{file}: cannot be removed ({error.strerror}); see to it by hand") from None
    return False


def _pixels_of(logits: Path) -> Path:
    return logits.with_name(f"view-{_number(logits)}.u8")


def _features_of(logits: Path) -> Path:
    return logits.with_name(f"view-{_number(logits)}.features.npy")


def _labels_of(logits: Path) -> Path:
    return logits.with_name(f"view-{_number(logits)}.labels.npy")


def _save(path: Path, values: npt.NDArray[np.floating[Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, values.astype(np.float16))


def _write_header(stream: BinaryIO, shape: tuple[int, int]) -> None:
    """Write the header of a float16 `.npy` file of this shape."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


@torch.inference_mode()
def _teacher_outputs(teacher: PixelClassifier, pooled: Tensor) -> tuple[Half, Half]:
    """Logits float16 [n, classes] and pooled features float16 [n, channels]."""
    return teacher.classify(pooled).half().cpu().numpy(), pooled.half().cpu().numpy()
