"""A training on disk: all that it takes to go on behind any step as if it had not been interrupted."""

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
    """How far a training has come."""

    history: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the batches of the epoch under way."""
    seconds: float = 0.0
    """Of the epoch under way, before it was interrupted."""
    best_state: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the best epoch so far."""


class Snapshot:
    """A checkpoint file of `parts`: whatever has `state_dict` and `load_state_dict`, by name."""

    def __init__(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.path = path
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def load(self) -> Position:
        """Put the parts where the file says; without a file they stay as they are, at the beginning."""
        if not self.path.exists():
            return Position()
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return Position(
            history=[msgspec.json.decode(line, type=Epoch) for line in saved["history"]],
            losses=saved["losses"],
            seconds=saved["seconds"],
            best_state=saved["best_state"],
        )

    def save(self, position: Position) -> None:
        """Write the file, whole or not at all."""
        save_tensors(
            self.path,
            {name: part.state_dict() for name, part in self.parts.items()}
            | {
                "history": [msgspec.json.encode(epoch) for epoch in position.history],
                "losses": position.losses,
                "seconds": position.seconds,
                "best_state": position.best_state,
            },
        )


def save_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file that `torch.load(weights_only=True)` reads, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())
