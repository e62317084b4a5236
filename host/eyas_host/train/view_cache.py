"""The view cache: augmented views of the training images with the teacher's answers, made once, read every epoch.

Neither views nor features are ever held in memory: they go from batch to file and from file to batch, and a cache may
be larger than the machine's memory. How large it will be on the disk is said, and checked, before it is written.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from eyas_host.data.loader import BatchLoader, Rows, ordered_batches
from eyas_host.data.split import Split
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.recipe import Recipe
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write
from eyas_host.support.progress import meter, say

Half = npt.NDArray[np.float16]


class ViewCache:
    """The views in one folder: `view-N.u8` (raw pixels, uint8 [n, s, s, 3]) and the teacher's answers to them.

    `logits` is float16 [views, n, classes], from `view-N.logits.npy`; `features` float16 [views, n, channels], read
    from `view-N.features.npy` row by row. A view is whole when its logits are there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = sorted(root.glob("view-*.logits.npy"), key=_number)
        try:
            self.logits: Half = np.stack([np.load(path) for path in paths])
            self.features = Stacked([np.load(_features_of(path), mmap_mode="r") for path in paths])
            self._files = [_pixels_of(path).open("rb", buffering=0) for path in paths]
            count = self.logits.shape[1]
            sizes = {os.fstat(file.fileno()).st_size for file in self._files}
            self._bytes = sizes.pop() // count
            self._side = math.isqrt(self._bytes // 3)
            if sizes or self._side**2 * 3 != self._bytes or self.features.shape[1] != count:
                raise ValueError("files of different sizes")
        except (OSError, ValueError, EOFError) as error:
            raise StageError(
                f"{root}: the cached views cannot be read ({error}); run again with --from distill"
            ) from None

    def __len__(self) -> int:
        """Number of views of each image."""
        return len(self._files)

    def pixels(self, views: Rows, rows: Rows) -> Batch:
        """Pixels uint8 [batch, s, s, 3] of image `rows[i]` in view `views[i]`."""
        pieces = (
            os.pread(self._files[view].fileno(), self._bytes, int(row) * self._bytes)
            for view, row in zip(views, rows, strict=True)
        )
        joined = np.frombuffer(bytearray(b"".join(pieces)), dtype=np.uint8)
        return joined.reshape(len(rows), self._side, self._side, 3)

    @classmethod
    def make(cls, root: Path, recipe: Recipe, split: Split, teacher: PixelClassifier) -> ViewCache:
        """Draw the views and ask the teacher; views that a killed run left whole are kept.

        Raises `StageError` before anything is written if it would be larger than `[student] cache_gb` or the free
        disk, and when the disk is full all the same.
        """
        count = len(split.train)
        paths = [root / f"view-{number}.logits.npy" for number in range(recipe.student.views)]
        missing = [path for path in paths if not path.exists()]
        if missing:
            answers = 2 * (len(split.labels) + teacher.pooled_channels)
            needed = check_room(root, recipe, count, answers=answers, made=len(paths) - len(missing))
            say(f"  cached views: {len(missing)} x {count:,} images, {_gb(needed)} in {root}")
        device = pick_device(recipe.run.device)
        teacher = move(teacher, device).eval()
        stream, turns = BatchLoader(recipe, split.train), ordered_batches(count)
        with meter("views and the teacher's answers", len(missing) * len(turns)) as bar:
            for path in missing:
                logits = []
                with ExitStack() as files:
                    pixels = files.enter_context(files.enter_context(atomic_write(_pixels_of(path))).open("wb"))
                    features = files.enter_context(files.enter_context(atomic_write(_features_of(path))).open("wb"))
                    _write_header(features, (count, teacher.pooled_channels))
                    for views in stream.views(turns, (recipe.run.seed, 5, _number(path))):
                        answered, pooled = _answers(teacher, views, device)
                        pixels.write(views.tobytes())
                        features.write(pooled.tobytes())
                        logits.append(answered)
                        bar.advance()
                with atomic_write(path) as temporary, temporary.open("wb") as stream_of_logits:
                    np.save(stream_of_logits, np.concatenate(logits))
        return cls(root)


class Stacked:
    """Arrays of one shape that lie in files, one a view; indexed [views, rows] they give those rows from the disk."""

    def __init__(self, parts: Sequence[Half]) -> None:
        if len({part.shape for part in parts}) != 1:
            raise ValueError("files of different sizes")
        self._parts = parts
        self.shape = (len(parts), *parts[0].shape)

    def __getitem__(self, place: tuple[Rows, Rows]) -> Half:
        """Row `rows[i]` of view `views[i]`: float16 [batch, channels]."""
        return np.stack([self._parts[view][row] for view, row in zip(*place, strict=True)])


def check_room(root: Path, recipe: Recipe, count: int, *, answers: int = 0, made: int = 0) -> int:
    """Bytes that the views of `count` images still need below `root`, of which `made` views are there.

    `answers` are the teacher's bytes a view of an image. Raises `StageError` if all views together are larger than
    `[student] cache_gb`, or the missing ones larger than the free disk.
    """
    student, size = recipe.student, recipe.image.size
    one = count * (3 * size**2 + answers)
    whole_size, needed = student.views * one, (student.views - made) * one
    at = next(place for place in (root, *root.absolute().parents) if place.exists())
    free = shutil.disk_usage(at).free
    what = f"[student] views = {student.views} of {count:,} images at {size} px"
    bound = student.cache_gb * 1e9
    if bound and whole_size > bound:
        raise StageError(
            f"{what} need {_gb(whole_size)}, more than cache_gb = {student.cache_gb:g}; {_lower(bound, one)}, or raise "
            "cache_gb"
        )
    if needed > free:
        raise StageError(
            f"{root}: {what} need {_gb(needed)} more and {_gb(free)} are free; {_lower(free, one, made)}, or free some "
            "room"
        )
    return needed


def _lower(room: float, one: int, made: int = 0) -> str:
    views = made + int(room // one)
    return f"take views = {views}" if views else "even one view is too large: take a smaller [image] size"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def _number(path: Path) -> int:
    return int(path.name.split(".")[0].partition("-")[2])


def _pixels_of(logits: Path) -> Path:
    return logits.with_name(f"view-{_number(logits)}.u8")


def _features_of(logits: Path) -> Path:
    return logits.with_name(f"view-{_number(logits)}.features.npy")


def _write_header(stream: BinaryIO, shape: tuple[int, int]) -> None:
    """What precedes the rows of a float16 `.npy` file of this shape."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


@torch.inference_mode()
def _answers(teacher: PixelClassifier, pixels: Batch, device: torch.device) -> tuple[Half, Half]:
    """Logits float16 [n, classes] and pooled features float16 [n, channels]."""
    pooled = teacher.pooled(to_tensor(pixels, device))
    return teacher.classify(pooled).half().cpu().numpy(), pooled.half().cpu().numpy()
