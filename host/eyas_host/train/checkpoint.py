"""Checkpoints from which a training resumes after any step as if it had not been interrupted."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from eyas_host.support.files import write_bytes
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
        """Restore the modules from the file and return the position; without a file, the beginning."""
        if not self.path.exists():
            return Position()
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(saved[name])
        return Position(
            history=[msgspec.json.decode(line, type=Epoch) for line in saved["history"]],
            losses=saved["losses"],
            seconds=saved["seconds"],
            best_state=saved["best_state"],
        )

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
