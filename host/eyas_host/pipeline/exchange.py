"""Sums of a few numbers over the processes of one machine, in microseconds.

A collective operation of gloo wakes three threads, which takes a millisecond or two where a waiting processor is
halted; BatchNorm needs seventy sums a step. Here each process sends its numbers to all others over Unix sockets and
polls for theirs: the processes compute in step, so that they are nearly there.
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SPIN_S = 0.02
"""A peer that is later than that is waited for without polling."""
_CONNECT_S = 60.0


class Exchange:
    """Connections of process `rank` to all others of `count`, through sockets in the folder `place`.

    Listens at once; `connect` needs all others to listen.
    """

    def __init__(self, rank: int, count: int, place: Path) -> None:
        self.rank, self.count, self._place = rank, count, place
        self._peers: dict[int, socket.socket] = {}
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
        for peer in self._peers.values():
            peer.setblocking(False)

    def sum(self, values: Floats) -> Floats:
        """Sum of the values [n] of all processes, the same everywhere to the bit; all give the same number of them.

        Raises `RuntimeError` if another process has ended. A few thousand values at most: they have to fit into the
        buffers of a socket.
        """
        content = np.ascontiguousarray(values, dtype=np.float64)
        received = {self.rank: content}
        for number, peer in self._peers.items():
            self._send(peer, content)
            received[number] = np.empty_like(content)
        for number, peer in self._peers.items():
            self._receive(peer, received[number])
        total: Floats = np.sum([received[number] for number in range(self.count)], axis=0)
        return total

    def close(self) -> None:
        """Close all connections."""
        for peer in (*self._peers.values(), self._listener):
            peer.close()
        self._peers = {}

    def _path(self, rank: int) -> Path:
        return self._place / f"{rank}.sock"

    @staticmethod
    def _send(peer: socket.socket, content: Floats) -> None:
        left = memoryview(content.data).cast("B")
        while left:
            try:
                left = left[peer.send(left) :]
            except BlockingIOError:
                select.select([], [peer], [])
            except OSError:
                raise RuntimeError("another training process has ended") from None

    @staticmethod
    def _receive(peer: socket.socket, target: Floats) -> None:
        left, begun = memoryview(target.data).cast("B"), time.monotonic()
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
