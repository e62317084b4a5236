"""What is known of every image file: its hash, size, mode, perceptual hash and what it stores; read on all cores.

Few images are read by threads, many by processes: for small images Python's own work is the larger part, and threads
would take turns at it.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import cv2
import msgspec

from eyas_device.errors import ImageError
from eyas_device.preprocess import Preprocessing
from eyas_host.data.duplicates import perceptual_hash
from eyas_host.data.image_bytes import read_image_bytes
from eyas_host.data.stored_values import StoredValues, examine
from eyas_host.support.errors import DataError
from eyas_host.support.machine import decoding_threads
from eyas_host.support.processes import end_with_parent

_CHUNK = 128
"""Images that a thread or process reads at a time."""
_AHEAD = 4
"""Chunks submitted for each of them."""
MIN_FOR_PROCESSES = 5_000
"""Images from which processes, which take a moment to start, read faster than threads."""


class FileInfo(msgspec.Struct, frozen=True, gc=False):
    """Properties of an image file, without its pixels."""

    width: int
    """Pixels, as decoded (EXIF orientation applied)."""
    height: int
    mode: str
    """grey or colour, with `+alpha` where there is an alpha channel."""
    bits: int
    """Per channel, in the file; models see 8."""
    hash: bytes
    """Perceptual hash, 32 bytes."""
    values: StoredValues = StoredValues()
    """What it stores that is to be reported."""


class UnreadableImage(NamedTuple):
    """A file that is no whole image."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


Read = tuple[str, FileInfo] | UnreadableImage
"""sha256 and properties of a file, or why it cannot be read."""


def read_file_infos(paths: Sequence[str], bits: int = 0) -> Iterator[Read]:
    """Read each file, in order; `bits` is `[image] bits`. A few thousand results at most are held.

    Raises `DataError` if a reading process is killed.
    """
    shared: dict[StoredValues, StoredValues] = {}

    def share(result: Read) -> Read:
        """Keep one copy of what most images have in common: a million copies are 300 MB."""
        if isinstance(result, UnreadableImage):
            return result
        sha256, file = result
        values = shared.setdefault(file.values, file.values)
        return sha256, msgspec.structs.replace(file, mode=sys.intern(file.mode), values=values)

    read = partial(_read_chunk, spec=Preprocessing(size=1, bits=bits or 16))  # in full: the size plays no part
    workers = decoding_threads()
    with _executor(workers, processes=len(paths) >= MIN_FOR_PROCESSES and workers > 1) as executor:
        for results in _in_order(executor, read, paths, workers):
            yield from map(share, results)


def _executor(workers: int, *, processes: bool) -> Executor:
    if not processes:
        return ThreadPoolExecutor(workers)
    # forked, as the loader's processes: nothing is imported again, and a caller's script needs no main guard
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_init_process)


def _in_order(
    executor: Executor, read: Callable[[Sequence[str]], list[Read]], paths: Sequence[str], workers: int
) -> Iterator[list[Read]]:
    starts = iter(range(0, len(paths), _CHUNK))
    pending: deque[Future[list[Read]]] = deque()

    def submit(count: int) -> None:
        for _, start in zip(range(count), starts, strict=False):
            pending.append(executor.submit(read, paths[start : start + _CHUNK]))

    try:
        submit(_AHEAD * workers)
        while pending:
            results = pending.popleft().result()
            submit(1)
            yield results
    except BrokenProcessPool:
        raise DataError(
            "a process that reads images was killed (too little memory?); close other programs and run again"
        ) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _init_process() -> None:
    end_with_parent()
    cv2.setNumThreads(1)
    gc.freeze()  # the parent's objects stay shared: a collection here would copy every page of them


def _read_chunk(paths: Sequence[str], spec: Preprocessing) -> list[Read]:
    return [_read(path, spec) for path in paths]


def _read(path: str, spec: Preprocessing) -> Read:
    try:
        data = read_image_bytes(path)
        found = examine(data, spec, where=path)
    except ImageError as error:
        return UnreadableImage(path, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return UnreadableImage(path, f"cannot be read ({error.strerror})")
    height, width = found.pixels.shape[:2]
    hashed = perceptual_hash(found.pixels)
    return hashlib.sha256(data).hexdigest(), FileInfo(width, height, found.mode, found.bits, hashed, found.values)
