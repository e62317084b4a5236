"""Images in batches, drawn ahead of the network by processes of their own: what is in memory is a few batches.

A view follows from (seed, row) alone, so the number of processes and the order of the rows change nothing. Workers are
forked: they share what was decoded before (`data.part`), touch no GPU, and die with the process that reads from them.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from eyas_device.errors import EyasError
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.transforms import Augmenter, Batch, prepared
from eyas_host.pipeline.distributed import on_this_machine
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import TrainError
from eyas_host.support.machine import usable_cores

Rows = npt.NDArray[np.int64]
"""Places of images in their part, int64 [n]."""

_AHEAD = 2
"""Batches that each worker draws ahead."""
_MOST_BESIDE_CPU, _MOST_BESIDE_GPU = 4, 16
# No handler of torch's for SIGCHLD: it raises wherever the main process happens to be, long after the last batch too,
# and a signal stack that a compiler's library left behind made it crash (SIGSEGV in `waitpid` of a later stage). That a
# worker died shows all the same: torch looks every five seconds, and a batch is lost on its way.
signal_handling._SIGCHLD_handler_set = True
_PR_SET_PDEATHSIG = 1  # Linux, include/uapi/linux/prctl.h


class Stream:
    """The images of one part, as augmented views or as the device prepares them, batch by batch.

    The batches of an epoch are the caller's: several processes may each ask for a share of them.
    """

    def __init__(self, recipe: Recipe, part: ImageDataset) -> None:
        self.augmenter = Augmenter(recipe.augment, recipe.image.preprocessing())
        self.workers = worker_count(recipe.run)
        self._pixels = part.pixels
        self._pixels.share()

    def views(
        self, batches: Sequence[Rows], seed: tuple[int, ...], *, strength: float = 1.0, mixed: bool = True
    ) -> Iterator[Batch]:
        """For each batch of rows one view a row, uint8 [rows, size, size, 3]; `Augmenter.views` says the rest."""
        draw = partial(self.augmenter.views, self._pixels, seed, strength=strength, mixed=mixed)
        return draw_ahead(draw, batches, self.workers)

    def prepared(self, batches: Sequence[Rows]) -> Iterator[Batch]:
        """For each batch of rows the images as the device prepares them, uint8 [rows, size, size, 3]."""
        return draw_ahead(self._prepared, batches, self.workers)

    def _prepared(self, rows: Rows) -> Batch:
        return prepared((self._pixels[int(row)] for row in rows), self.augmenter.spec)


def in_turn(count: int, batch: int = 64) -> list[Rows]:
    """All rows in their order, in batches."""
    return [np.arange(start, min(start + batch, count)) for start in range(0, count, batch)]


def worker_count(run: RunSection) -> int:
    """`[run] workers`, or for `auto` one a free core, as many as the training beside them can use."""
    if run.workers != "auto":
        return run.workers
    beside_gpu = run.device != "cpu" and torch.cuda.is_available()
    cores = usable_cores() // on_this_machine()
    return max(0, min(_MOST_BESIDE_GPU if beside_gpu else _MOST_BESIDE_CPU, cores - 1))


def draw_ahead(draw: Callable[[Rows], Batch], batches: Sequence[Rows], workers: int) -> Iterator[Batch]:
    """What `draw` makes of each batch of rows, in order; drawn by `workers` processes, or here if there are none.

    Raises what `draw` raises of `EyasError`, and `TrainError` if a worker is killed.
    """
    loader = DataLoader(
        _Drawn(draw),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_begin_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from training's random state
    )
    try:
        for drawn in loader:
            if isinstance(drawn, EyasError):
                raise drawn
            yield drawn.numpy()
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise TrainError(
            "a process that draws views was killed (too little memory, or shared memory in a container?); set a "
            f"smaller [run] workers than {workers}, or 0"
        ) from None


class _Drawn(Dataset[torch.Tensor | EyasError]):
    def __init__(self, draw: Callable[[Rows], Batch]) -> None:
        self._draw = draw

    def __getitem__(self, rows: Rows) -> torch.Tensor | EyasError:
        try:
            return torch.from_numpy(self._draw(rows))
        except EyasError as error:  # raised where it is read: a loader would wrap it into a traceback
            return error


def _begin_worker(_: int) -> None:
    """Die with the parent, whose lock on the run's folder a fork would keep; no threads inside."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cv2.setNumThreads(0)
