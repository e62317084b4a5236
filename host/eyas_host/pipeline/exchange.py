"""Sums and all-gathers over the processes of one machine, in microseconds.

A collective operation of gloo wakes three threads, which takes a millisecond or two where a waiting processor is
halted, and copies through the network stack; BatchNorm needs seventy sums a step. Here each process sends a few numbers
to all others over Unix sockets and polls for theirs: the processes compute in step, so that they are nearly there. More
than a few go through memory that all of them map.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

CHUNK = 1 << 22
"""Bytes that a process shows the others at a time."""
_BUFFERS = 2
"""A process writes into one while others may still read the other."""
_SPIN_S = 0.02
"""A peer that is later than that is waited for without polling."""
_CONNECT_S = 60.0


class Exchange:
    """Connections of process `rank` to all others of `count`, through sockets in the folder `place`.

    Listens at once; `connect` needs all others to listen. All processes call the same methods in the same order, and
    all methods raise `RuntimeError` if another process has ended.
    """

    def __init__(self, rank: int, count: int, place: Path) -> None:
        self.rank, self.count, self._place = rank, count, place
        self._peers: dict[int, socket.socket] = {}
        self._windows: list[list[Array]] = []
        """The memory of each process, uint8 [CHUNK], for each buffer."""
        self._turn = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path(rank)))
        self._listener.listen(count)

    def connect(self) -> None:
        """Connect to all others: to those before this one, and from those behind it."""
        for other in range(self.rank):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(self._path(other)))
            peer.sendall(bytes([self.rank]))
            self._peers[other] = peer
        self._listener.settimeout(_CONNECT_S)
        while len(self._peers) < self.count - 1:
            peer, _ = self._listener.accept()
            peer.setblocking(True)
            self._peers[peer.recv(1)[0]] = peer
        self._listener.close()
        self._map_memory()
        for peer in self._peers.values():
            peer.setblocking(False)

    def sum(self, values: Floats) -> Floats:
        """Sum of the values [n] of all processes, the same everywhere to the bit; all give the same number of them.

        A few thousand values at most: they have to fit into the buffers of a socket.
        """
        content = np.ascontiguousarray(values, dtype=np.float64)
        self._send(content)
        total: Floats | None = None
        for number in range(self.count):
            part = content if number == self.rank else self._receive(number, np.empty_like(content))
            total = part if total is None else total + part
        assert total is not None
        return total

    def sum_in_place(self, values: Array) -> None:
        """Replace contiguous values [n] by their sum over all processes, the same everywhere to the bit."""
        if self.count == 1:
            return
        own = _bytes(values)
        for first in range(0, len(own), CHUNK):
            part = own[first : first + CHUNK]
            windows = [window[: len(part)].view(values.dtype) for window in self._show(part)]
            total = part.view(values.dtype)
            np.add(windows[0], windows[1], out=total)
            for window in windows[2:]:
                total += window

    def gather(self, values: Array, sizes: Sequence[int]) -> list[Array]:
        """The contiguous arrays [sizes[rank], ...] of all processes, which differ in their first dimension only."""
        gathered = [np.empty((size, *values.shape[1:]), dtype=values.dtype) for size in sizes]
        targets = [_bytes(array) for array in gathered]
        own = _bytes(values)
        for first in range(0, max(map(len, targets)), CHUNK):
            for target, window in zip(targets, self._show(own[first : first + CHUNK]), strict=True):
                part = target[first : first + CHUNK]
                part[:] = window[: len(part)]
        return gathered

    def close(self) -> None:
        """Close all connections."""
        for peer in (*self._peers.values(), self._listener):
            peer.close()
        self._peers, self._windows = {}, []

    def _path(self, rank: int) -> Path:
        return self._place / f"{rank}.sock"

    def _map_memory(self) -> None:
        """Map the memory that process 0 makes; it has no name and ends with the last process."""
        size = self.count * _BUFFERS * CHUNK
        if self.rank == 0:
            memory = os.memfd_create("eyas-exchange")
            os.truncate(memory, size)
            for peer in self._peers.values():
                socket.send_fds(peer, [b"m"], [memory])
        elif self.count > 1:
            _, (memory, *_), _, _ = socket.recv_fds(self._peers[0], 1, 1)
        whole = np.frombuffer(mmap.mmap(memory, size), dtype=np.uint8).reshape(_BUFFERS, self.count, CHUNK)
        os.close(memory)
        self._windows = [list(buffer) for buffer in whole]

    def _show(self, content: Array) -> list[Array]:
        """Show at most CHUNK bytes to all others, and see theirs, by rank; valid until the next call.

        Who writes into a buffer again knows from the call between that all others are done with it.
        """
        windows = self._windows[self._turn]
        self._turn = (self._turn + 1) % _BUFFERS
        windows[self.rank][: len(content)] = content
        self._send(_SIGN)
        for number in self._peers:
            self._receive(number, np.empty_like(_SIGN))
        return windows

    def _send(self, content: Array) -> None:
        """Send to all others."""
        message = content.data.cast("B")
        for peer in self._peers.values():
            left = message
            while left:
                try:
                    left = left[peer.send(left) :]
                except BlockingIOError:
                    select.select([], [peer], [])
                except OSError:
                    raise RuntimeError("another training process has ended") from None

    def _receive(self, rank: int, target: Array) -> Array:
        """Fill `target` with what a process sent."""
        peer = self._peers[rank]
        left, begun = target.data.cast("B"), time.monotonic()
        while left:
            with suppress(BlockingIOError, ConnectionResetError):
                got = peer.recv_into(left)
                if not got:
                    raise RuntimeError("another training process has ended")
                left = left[got:]
                continue
            if time.monotonic() - begun < _SPIN_S:
                os.sched_yield()
            else:
                select.select([peer], [], [])
        return target


_SIGN = np.zeros(1, dtype=np.uint8)


def _bytes(values: Array) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8)
