"""Checkpoints from which a training resumes after any step as if it had not been interrupted."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from eyas_host.models.weights import UNREADABLE
from eyas_host.pipeline import distributed
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import warn
from eyas_host.train.schedule import Epoch


@dataclass
class Position:
    """Progress of a training."""

    history: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Losses of the batches in the current epoch."""
    seconds: float = 0.0
    """Time spent in the current epoch before an interruption."""
    best_state: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch so far."""


class Checkpoint:
    """A checkpoint file of `modules`: anything with `state_dict` and `load_state_dict`, by name."""

    def __init__(self, path: Path, modules: Mapping[str, Any]) -> None:
        self.path = path
        self.modules = {name: module for name, module in modules.items() if module is not None}

    def load(self) -> Position:
        """Restore the modules from the file and return the position; without a usable file, the beginning."""
        saved = read_checkpoint(self.path)
        if saved is None:
            return Position()
        before = {name: copy.deepcopy(module.state_dict()) for name, module in self.modules.items()}
        try:
            position = Position(
                history=[msgspec.json.decode(line, type=Epoch) for line in saved["history"]],
                losses=saved["losses"],
                seconds=saved["seconds"],
                best_state=saved["best_state"],
            )
            for name, module in self.modules.items():
                module.load_state_dict(saved[name])
        except UNREADABLE as error:
            discard_checkpoint(self.path, error)
            for name, module in self.modules.items():
                module.load_state_dict(before[name])
            return Position()
        return position

    def save(self, position: Position) -> None:
        """Write the file atomically."""
        save_tensors(
            self.path,
            {name: module.state_dict() for name, module in self.modules.items()}
            | {
                "history": [msgspec.json.encode(epoch) for epoch in position.history],
                "losses": position.losses,
                "seconds": position.seconds,
                "best_state": position.best_state,
            },
        )


def save_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Atomically write tensors and plain values to a file that `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `save_tensors` wrote; None without the file, or if it is damaged: it is reported and removed then.

    Raises `StageError` if the file cannot be read at all, e.g. for want of permission.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (entry := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {entry}")
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        fix = "see to its permissions, or remove it to train from the stage's beginning"
        raise StageError(f"{path}: cannot be read ({error.strerror or error}); {fix}") from None
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        discard_checkpoint(path, error)
        return None
    return saved


def discard_checkpoint(path: Path, error: Exception) -> None:
    """Report in one line that a checkpoint cannot be used, and remove it."""
    if distributed.is_main():
        why = " ".join((str(error) or type(error).__name__).split())[:120]
        warn(f"{path}: damaged ({why}); its work is repeated")
    path.unlink(missing_ok=True)
