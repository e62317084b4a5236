"""Batches of images, loaded ahead of the network by worker processes; only a few batches are in memory.

A view depends only on (seed, row), not on the number of workers or the order of the rows. Workers are forked: they
share the decoded images (`data.dataset`), use no GPU, and die with the process that reads from them.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eyas_device.board.limits import usable_cores, usable_memory
from eyas_device.errors import EyasError
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.transforms import Augmenter, Batch, prepared
from eyas_host.pipeline.distributed import local_world_size
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import TrainError
from eyas_host.support.progress import warn

Rows = npt.NDArray[np.int64]
"""Indices of images in their data set, int64 [n]."""

BATCH = 64
"""Images of a batch that no setting chooses."""
_PREFETCH = 2
"""Batches that each worker loads ahead."""
_MAX_WORKERS_CPU, _MAX_WORKERS_GPU = 4, 16
_WORKER_BYTES = 500e6
"""Memory of a worker beside what it shares."""
_SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1  # Linux, include/uapi/linux/prctl.h


class BatchLoader:
    """Batches of a data set, as augmented views or as the device prepares them.

    The caller chooses the batches: each of several processes may load its shard of them.
    """

    def __init__(self, recipe: Recipe, images: ImageDataset) -> None:
        self.augmenter = Augmenter(recipe.augment, recipe.image.preprocessing())
        self._pixels = images.pixels
        self._pixels.open_cache()
        largest = max(BATCH, recipe.teacher.batch, recipe.student.batch)
        self.workers = worker_count(recipe.run, batch_bytes=largest * 3 * recipe.image.size**2)
        self._prefetch = Prefetcher(self._load, self.workers)

    def views(
        self, batches: Sequence[Rows], seed: tuple[int, ...], *, strength: float = 1.0, mixed: bool = True
    ) -> Iterator[Batch]:
        """One view per row for each batch of rows, uint8 [rows, size, size, 3], as `Augmenter.views`."""
        options = {"seed": seed, "strength": strength, "mixed": mixed}
        return (batch.numpy() for batch in self._prefetch([(rows, options) for rows in batches]))

    def prepared(self, batches: Sequence[Rows]) -> Iterator[Batch]:
        """Images as the device prepares them for each batch of rows, uint8 [rows, size, size, 3]."""
        return (batch.numpy() for batch in self._prefetch([(rows, None) for rows in batches]))

    def _load(self, item: tuple[Rows, dict[str, Any] | None]) -> Batch:
        rows, options = item
        if options is not None:
            return self.augmenter.views(self._pixels, rows=rows, **options)
        return prepared(self._pixels.rows(rows), self.augmenter.spec)


def ordered_batches(count: int, batch: int = BATCH) -> list[Rows]:
    """All rows in order, in batches."""
    return [np.arange(start, min(start + batch, count)) for start in range(0, count, batch)]


def worker_count(run: RunSection, *, batch_bytes: int = 0) -> int:
    """`[run] workers`; for `auto` one per free core, up to the number that one training can use and the memory holds.

    Fewer, with one warning, where their batches of `batch_bytes` do not fit into shared memory: what does not fit
    ends a worker with a bus error.
    """
    workers = _free_cores(run.device) if run.workers == "auto" else run.workers
    if workers and batch_bytes:
        fitting = int(_free_shared_bytes() / local_world_size() / ((_PREFETCH + 1) * batch_bytes))
        if fitting < workers:
            _warn_of_shared_memory(workers, fitting)
            return fitting
    return workers


def _free_cores(device: str) -> int:
    """Workers that cores and memory allow."""
    most = _MAX_WORKERS_GPU if device != "cpu" and torch.cuda.is_available() else _MAX_WORKERS_CPU
    cores = usable_cores() // local_world_size()
    memory = int(usable_memory() / local_world_size() / _WORKER_BYTES)
    return max(0, min(most, cores - 1, memory))


def _free_shared_bytes() -> int:
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return 0


@cache
def _warn_of_shared_memory(workers: int, fitting: int) -> None:
    warn(
        f"{_SHARED_MEMORY}: {_free_shared_bytes() / 1e6:.0f} MB are free, too little for the batches of {workers} "
        f"loader processes, so there are {fitting}; docker run --shm-size 2g gives a container more"
    )


class Prefetcher:
    """Computes `load(item)` for one list of items after the other, ahead of the reader.

    `workers` processes (0: this one) start with the first list and are kept for the next ones. `load` returns an array
    or a tuple of arrays, which arrive as tensors, in pinned memory where there is a GPU.
    """

    def __init__(self, load: Callable[[Any], Any], workers: int) -> None:
        self.workers = workers
        self._items = _Items()
        self._loader = DataLoader(
            _ItemDataset(load),
            batch_size=None,
            sampler=self._items,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_init_worker if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # for the workers' seed, so that training's random state is not used
        )

    def __call__(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yield `load(item)` of each item in order; a list that is not read to its end may be followed by another.

        Raises any `EyasError` that `load` raises, and `TrainError` if a worker is killed.
        """
        self._items.items = items
        try:
            with _own_sigchld():
                batches = iter(self._loader)
            for batch in batches:
                if isinstance(batch, EyasError):
                    raise batch
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise TrainError(
                "a loader process was killed (too little memory, or shared memory in a container?); set a "
                f"smaller [run] workers than {self.workers}, or 0"
            ) from None


class _Items(Sampler[Any]):
    """The items of the list that is read at present."""

    items: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class _ItemDataset(Dataset[Any]):
    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._load(item)
        except EyasError as error:  # re-raised by the reader: the DataLoader would wrap it into a traceback
            return error


@contextmanager
def _own_sigchld() -> Iterator[None]:
    """Keep this process's SIGCHLD handler: torch's raises at any point, even long after the last batch, and crashed.

    It ran on a signal stack left behind by a compiler's library (SIGSEGV in `waitpid` of a later stage). A dead worker
    is still detected: torch polls every five seconds while it waits for a batch.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _init_worker(_: int) -> None:
    """Die with the parent, whose lock on the run's folder a fork would keep; use one thread."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cv2.setNumThreads(0)
