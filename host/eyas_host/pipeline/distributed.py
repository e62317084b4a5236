"""One job in several processes, as `accelerate launch` and `torchrun` start it: the same command once a GPU.

Process 0 is the main one: only it writes to the run's folder, prints and evaluates. The others process their shard of
each batch until the chain of stages is done. Without a launcher there is one process, and all of this is a no-op.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eyas_device.board.limits import usable_cores
from eyas_host.pipeline.exchange import Exchange
from eyas_host.recipe import Recipe
from eyas_host.support.progress import console

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

_Value = TypeVar("_Value")
_Rows = TypeVar("_Rows", "Tensor", "npt.NDArray[np.int64]", "npt.NDArray[np.uint8]")

_TIMEOUT = timedelta(days=7)
"""How long a process waits for another: entire stages run in the main process only."""
_OBJECT_GROUP: dict[str, Any] = {}
"""The gloo group for Python objects; waiting in it uses no GPU."""
_EXCHANGES: list[Exchange] = []
"""The faster way for what every step shares, where all processes are on this machine and use its processors."""


_single_process = ContextVar("alone", default=False)


def world_size() -> int:
    """Number of processes of this job."""
    return 1 if _single_process.get() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the main process."""
    return rank() == 0


def local_world_size() -> int:
    """Number of processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def single_process() -> Iterator[None]:
    """Work in the main process only, while the others wait."""
    token = _single_process.set(True)
    try:
        yield
    finally:
        _single_process.reset(token)


def join(device: str) -> None:
    """Join the process group; `device` is `[run] device`. All but the main process are silent from here on."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    console.quiet = not is_main()
    PartialState._reset_state()  # one process may have trained here before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_TIMEOUT)
    _OBJECT_GROUP["group"] = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def join_team(own_rank: int, count: int, place: Path) -> None:
    """Join `count` processes of this machine that meet in the folder `place`; they compute on processors."""
    import torch

    exchange = Exchange(own_rank, count, place)
    if name := _loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # whatever the host's name resolves to
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/rendezvous", rank=own_rank, world_size=count, timeout=_TIMEOUT
    )
    _OBJECT_GROUP["group"] = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    exchange.connect()  # all of them listen by now
    _EXCHANGES.append(exchange)
    numbers = {"RANK": own_rank, "LOCAL_RANK": own_rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in numbers.items()})


def _loopback() -> str:
    """Name of the loopback interface; empty where there is none."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "")


def leave() -> None:
    """Destroy the process group and continue single-process."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    while _EXCHANGES:
        _EXCHANGES.pop().close()
    if _OBJECT_GROUP:
        import torch
        from accelerate import PartialState

        torch.distributed.destroy_process_group()
        PartialState._reset_state()
        _OBJECT_GROUP.clear()


def from_main(value: _Value) -> _Value:
    """Broadcast the main process's value to all processes."""
    if world_size() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_OBJECT_GROUP["group"])
    return box[0]


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_OBJECT_GROUP["group"])


def local_shard(rows: _Rows) -> _Rows:
    """The shard of this process of a batch [rows, ...]; shards differ by at most one row."""
    first, end = _shard_bounds(len(rows))[rank()] if world_size() > 1 else (0, len(rows))
    return rows[first:end]


def _shard_bounds(rows: int) -> list[tuple[int, int]]:
    """First row and end of each process's shard."""
    small, larger = divmod(rows, world_size())
    firsts = [number * small + min(number, larger) for number in range(world_size() + 1)]
    return list(pairwise(firsts))


def all_gather(shard: Tensor, rows: int) -> Tensor:
    """All-gather a sharded batch float32 [rows, ...]; gradients flow through the local shard only.

    A loss over the full batch is then equal in all processes, however it weights its rows, and the sum of the
    processes' gradients is exactly its gradient.
    """
    shard = shard.float()
    if world_size() == 1:
        return shard
    import torch

    sizes = [end - first for first, end in _shard_bounds(rows)]
    own = shard.detach()
    if _EXCHANGES:
        gathered = map(torch.from_numpy, _EXCHANGES[-1].gather(own.contiguous().numpy(), sizes))
        return torch.cat([shard if number == rank() else other for number, other in enumerate(gathered)])
    padded = own.new_zeros((max(sizes), *shard.shape[1:]))
    padded[: len(own)] = own
    shards = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(shards, padded)
    others = [other[:size] for other, size in zip(shards, sizes, strict=True)]
    return torch.cat([shard if number == rank() else other for number, other in enumerate(others)])


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes in place."""
    if world_size() == 1:
        return
    import torch

    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if _EXCHANGES:
        _EXCHANGES[-1].sum_in_place(flat.numpy())
    else:
        torch.distributed.all_reduce(flat)
    summed = torch.split(flat, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [new.view_as(old) for new, old in zip(summed, gradients, strict=True)])


def sum_numbers(values: Tensor) -> Tensor:
    """Sum of a few numbers [n] over all processes, float64."""
    import torch

    values = values.double()
    if _EXCHANGES:
        return torch.from_numpy(_EXCHANGES[-1].sum(values.numpy()))
    torch.distributed.all_reduce(values)
    return values


def broadcast_parameters(*modules: nn.Module | None) -> None:
    """Broadcast the main process's parameters and buffers to all processes."""
    if world_size() == 1:
        return
    import torch

    for module in modules:
        for value in module.state_dict().values() if module is not None else ():
            sent = value.contiguous()
            torch.distributed.broadcast(sent, src=0)
            value.copy_(sent)


SINGLE_THREAD_SIZE = 160
"""Up to this side of the image one torch thread trains faster than two (small tensors, measured)."""


def training_threads(recipe: Recipe) -> int:
    """Number of torch threads of a training process."""
    if recipe.run.threads:
        return recipe.run.threads
    cores = usable_cores() // local_world_size()
    return 1 if recipe.image.size <= SINGLE_THREAD_SIZE else max(1, cores)
