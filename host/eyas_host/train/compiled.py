"""Optional compilation of the networks that train, by `torch.compile`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eyas_host.support.errors import TrainError

BACKEND: str | Callable[..., Any] = "inductor"
_COMPILERS = ("c++", "g++", "clang++")


def compiled(forward: Callable[[Tensor], Tensor], enabled: bool) -> Callable[[Tensor], Tensor]:
    """`forward`, or with `enabled` a version that is compiled at its first call and again for other shapes.

    Raises `TrainError` if there is no C++ compiler, which torch needs on processors and GPUs.
    """
    if not enabled:
        return forward
    check_compiler()
    return torch.compile(forward, dynamic=False, backend=BACKEND)


def check_compiler() -> None:
    """Raise `TrainError` if there is no C++ compiler."""
    if not any(map(shutil.which, _COMPILERS)):
        raise TrainError("[run] compile = true needs a C++ compiler: apt-get install g++, or set it to false")
