"""One job in several processes, as `accelerate launch` and `torchrun` start it: the same command once a GPU.

Process 0 is the main one: it alone owns the run's folder, prints, evaluates and decides. The others take their share of
each batch, until the chain of stages is done. Without a launcher there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from eyas_host.recipe import Recipe
from eyas_host.support.errors import TrainError
from eyas_host.support.machine import usable_cores
from eyas_host.support.progress import console

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from accelerate import Accelerator
    from torch import Tensor, device, nn

Amp = Literal["no", "bf16", "fp16"]
_Value = TypeVar("_Value")
_Rows = TypeVar("_Rows", "Tensor", "npt.NDArray[np.int64]")

_TIMEOUT = timedelta(days=7)
"""How long a process waits for another: whole stages run in the main one alone."""
_OBJECT_GROUP: dict[str, Any] = {}
"""The group for what is not a tensor; waiting in it costs no GPU."""


_single_process = ContextVar("alone", default=False)


def world_size() -> int:
    """Processes that are at work on the same."""
    return 1 if _single_process.get() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process owns the run."""
    return rank() == 0


def local_world_size() -> int:
    """Processes that share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def single_process() -> Iterator[None]:
    """What the main process does while the others wait."""
    token = _single_process.set(True)
    try:
        yield
    finally:
        _single_process.reset(token)


def join(place: str) -> None:
    """Meet the other processes; `place` is `[run] device`. All but the main one are silent from here on."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    console.quiet = not is_main()
    PartialState._reset_state()  # one process may have trained here before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PartialState(cpu=place == "cpu" or not torch.cuda.is_available(), timeout=_TIMEOUT)
    _OBJECT_GROUP["group"] = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def leave() -> None:
    """Go on as a process of its own: behind the chain, or as a child that trains beside the others."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    if _OBJECT_GROUP:
        import torch
        from accelerate import PartialState

        torch.distributed.destroy_process_group()
        PartialState._reset_state()
        _OBJECT_GROUP.clear()


def accelerator(amp: Amp, place: device) -> Accelerator:
    """Accelerate's plumbing for one training. Raises `TrainError` if `place` cannot do that precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if amp == "fp16" and place.type != "cuda":
        raise TrainError("[run] amp = 'fp16' needs a GPU, and this training runs on the processor; take 'bf16' or 'no'")
    AcceleratorState._reset_state()  # its precision is fixed for a process, ours for a training
    return Accelerator(mixed_precision=amp, cpu=place.type == "cpu")


def from_main(value: _Value) -> _Value:
    """The main process's value, in all of them."""
    if world_size() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_OBJECT_GROUP["group"])
    return box[0]


def local_shard(rows: _Rows) -> _Rows:
    """The part of a batch [rows, ...] that is this process's; the parts differ by at most one row."""
    first, end = _shard_bounds(len(rows))[rank()] if world_size() > 1 else (0, len(rows))
    return rows[first:end]


def _shard_bounds(rows: int) -> list[tuple[int, int]]:
    """First row and end of each process's share."""
    small, larger = divmod(rows, world_size())
    firsts = [number * small + min(number, larger) for number in range(world_size() + 1)]
    return list(pairwise(firsts))


def all_gather(part: Tensor, rows: int) -> Tensor:
    """The batch float32 [rows, ...] of which `part` is this process's share; only its own part has a gradient.

    A loss of the whole batch is then the same in every process, however it weighs its rows, and the sum of the
    processes' gradients is exactly its gradient.
    """
    part = part.float()
    if world_size() == 1:
        return part
    import torch

    sizes = [end - first for first, end in _shard_bounds(rows)]
    padded = part.detach().new_zeros((max(sizes), *part.shape[1:]))
    padded[: len(part)] = part.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    others = [other[:size] for other, size in zip(parts, sizes, strict=True)]
    return torch.cat([part if number == rank() else other for number, other in enumerate(others)])


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if world_size() == 1:
        return
    import torch

    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def broadcast_parameters(*modules: nn.Module | None) -> None:
    """Give every process the main one's parameters and buffers."""
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
    """Torch threads of a training process."""
    if recipe.run.threads:
        return recipe.run.threads
    cores = usable_cores() // local_world_size()
    return 1 if recipe.image.size <= SINGLE_THREAD_SIZE else max(1, cores)
