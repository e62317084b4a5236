"""Record what a file system writes to its disk, and when it asks the disk to keep it; then cut the power anywhere.

A small FUSE file system holds one file, the disk, which the kernel mounts through a loop device. Every write of a block
and every flush is noted in order. A disk keeps what was written before a flush that it has answered; of the rest it may
have kept any part. `states_after_cuts` builds what such a disk may hold.

`python -m tests.support.block_log FOLDER IMAGE LOG` is the process that serves the file. All of it needs root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT
from tests.support.system_parts import find, unavailable

ATOMIC = 4096
"""Bytes that a disk writes whole or not at all: a block of the file system, which itself relies on that."""
_RECORD = struct.Struct("<cQI")
_WRITE, _FLUSH = b"W", b"F"


class Write(NamedTuple):
    """Bytes that were written to the disk."""

    offset: int
    data: bytes


Epoch = list[Write]
"""The writes between two flushes, in order."""


class Cut(NamedTuple):
    """What a disk may hold after its power was cut."""

    flushes: int
    """Flushes that it had answered."""
    kept: str
    """Which of the later writes it has kept, for people."""
    writes: list[Write]


class RecordedDisk:
    """A disk that is mounted at `folder` and recorded; `image` holds what it begins with and stays as it is."""

    def __init__(self, image: Path, folder: Path, scratch: Path, *, options: str = "") -> None:
        for path in (folder, scratch):
            path.mkdir(parents=True, exist_ok=True)
        self.folder, self._log, self._served = folder, scratch / "blocks.log", scratch / "served"
        self._served.mkdir()
        self._log.touch()
        command = [sys.executable, "-m", "tests.support.block_log", self._served, image, self._log]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "device", ROOT / "host", ROOT)))}
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 60
        while not (self._served / "disk").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                unavailable("a FUSE file system cannot be mounted here (needs root)")
            time.sleep(0.02)
        _mount(self._served / "disk", folder, options)

    def position(self) -> int:
        """How many flushes the disk has answered so far."""
        return len(read_log(self._log)) - 1

    def close(self) -> list[Epoch]:
        """Unmount it in order, and return all that was written."""
        subprocess.run(["umount", self.folder], check=True)
        subprocess.run(["umount", self._served], check=True)
        self._process.wait(30)
        return read_log(self._log)


def make_image(path: Path, size_mb: int = 16) -> Path:
    """An empty ext4 file system."""
    make = find("mkfs.ext4")
    if make is None or os.geteuid():
        unavailable("a file system cannot be made here (needs root and mkfs.ext4)")
    path.write_bytes(b"")
    os.truncate(path, size_mb << 20)
    subprocess.run([make, "-q", "-F", "-b", str(ATOMIC), path], check=True)
    return path


@contextmanager
def mounted(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """The file system in `image`, mounted at `folder`: its journal is replayed, as after a power cut."""
    folder.mkdir(exist_ok=True)
    _mount(image, folder, options)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _mount(image: Path, folder: Path, options: str) -> None:
    words = ",".join(word for word in ("loop", options) if word)
    done = subprocess.run(["mount", "-o", words, image, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())


def read_log(path: Path) -> list[Epoch]:
    """What was written: one list for each flush, and one for what came after the last."""
    epochs: list[Epoch] = [[]]
    with path.open("rb") as stream:
        while len(head := stream.read(_RECORD.size)) == _RECORD.size:
            kind, offset, size = _RECORD.unpack(head)
            if kind == _FLUSH:
                epochs.append([])
            else:
                epochs[-1].append(Write(offset, stream.read(size)))
    return epochs


def states_after_cuts(epochs: list[Epoch], *, subsets: int = 5, every: int = 1, seed: int = 0) -> Iterator[Cut]:
    """What the disk may hold if the power is cut after each flush, or each `every`-th.

    Behind each flush: nothing of what followed, all of it, and random parts of it. In a random part each write is kept
    whole, not at all, or up to a block within it; a later one may be kept where an earlier one is not.
    """
    rng = random.Random(seed)
    settled: list[Write] = []
    for flushes, epoch in enumerate(epochs):
        if flushes % every == 0:
            yield Cut(flushes, "nothing", list(settled))
            if epoch:
                yield Cut(flushes, "everything", settled + epoch)
            for number in range(subsets if epoch else 0):
                yield Cut(flushes, f"part {number + 1}", settled + _part(epoch, rng))
        settled += epoch


def _part(epoch: Epoch, rng: random.Random) -> list[Write]:
    kept, likely = [], rng.choice((0.2, 0.5, 0.8))
    for offset, data in epoch:
        if rng.random() >= likely:
            continue
        torn = rng.random() < 0.2
        kept.append(Write(offset, data[: rng.randrange(0, len(data), ATOMIC)] if torn else data))
    return kept


def write_image(base: Path, cut: Cut, path: Path) -> Path:
    """Write what the disk holds after a cut to `path`."""
    content = bytearray(base.read_bytes())
    for offset, data in cut.writes:
        content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


# The server of the file, in the kernel's own protocol (linux/fuse.h)

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE_CALL, _STATFS = 1, 2, 3, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH_CALL, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = (
    *(18, 20, 25, 26, 27),
    *(29, 36, 38, 42),
)
_ROOT_NODE, _DISK_NODE = 1, 2
_HEAD, _REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_MAX_WRITE = 128 << 10
_KEPT_S = 3600


class _Server:
    def __init__(self, device: int, image: Path, log: Path) -> None:
        self._device, self._content = device, bytearray(image.read_bytes())
        self._log = log.open("ab", buffering=0)

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                raise
            _, operation, unique, node, *_ = _HEAD.unpack_from(request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            try:
                error, body = 0, self._answer(operation, node, memoryview(request)[_HEAD.size :])
            except OSError as refused:
                error, body = -(refused.errno or errno.EIO), b""
            with suppress(FileNotFoundError):  # who asked has gone
                os.write(self._device, _REPLY.pack(_REPLY.size + len(body), error, unique) + body)

    def _answer(self, operation: int, node: int, body: memoryview) -> bytes:
        if operation == _INIT:
            (readahead,) = struct.unpack_from("<I", body, 8)
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, readahead, 0, 12, 9, _MAX_WRITE, 1, 0, 0, 0)
        if operation == _GETATTR:
            return struct.pack("<QII", _KEPT_S, 0, 0) + self._attributes(node)
        if operation == _LOOKUP and bytes(body) == b"disk\0":
            return struct.pack("<QQQQII", _DISK_NODE, 0, _KEPT_S, _KEPT_S, 0, 0) + self._attributes(_DISK_NODE)
        if operation == _LOOKUP:
            raise OSError(errno.ENOENT, "")
        if operation in (_OPEN, _OPENDIR):
            return bytes(16)
        if operation == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return bytes(self._content[offset : offset + size])
        if operation == _WRITE_CALL:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = bytes(body[40 : 40 + size])
            self._log.write(_RECORD.pack(_WRITE, offset, size) + data)
            self._content[offset : offset + size] = data
            return struct.pack("<II", size, 0)
        if operation == _FSYNC:
            self._log.write(_RECORD.pack(_FLUSH, 0, 0))
            return b""
        if operation == _STATFS:
            return struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if operation in (_FLUSH_CALL, _RELEASE, _RELEASEDIR, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "")

    def _attributes(self, node: int) -> bytes:
        folder = node == _ROOT_NODE
        mode, size = (stat.S_IFDIR | 0o700, 0) if folder else (stat.S_IFREG | 0o600, len(self._content))
        return _ATTRIBUTES.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _main(folder: str, image: str, log: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None, use_errno=True).mount(b"eyas-disk", os.fsencode(folder), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _Server(device, Path(image), Path(log)).serve()


if __name__ == "__main__":
    _main(*sys.argv[1:])
