"""Golden images of a bundle, and their reference probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels


def golden_rows(probabilities: npt.NDArray[np.floating], count: int) -> list[int]:
    """Rows spread evenly from low to high confidence; the least confident tenth is left out."""
    order = np.argsort(np.sort(probabilities, axis=1)[:, -1])
    ranks = np.linspace(len(order) // 10, len(order) - 1, min(count, len(order))).astype(int)
    return [int(order[rank]) for rank in dict.fromkeys(ranks)]


def write_golden(path: Path, frames: Sequence[Pixels], probabilities: Mapping[str, npt.NDArray[np.floating]]) -> None:
    """Write decoded frames and every artefact's probabilities [n, classes] as `golden.npz`."""
    arrays: dict[str, npt.NDArray[np.generic]] = {f"frame_{n:02d}": frame for n, frame in enumerate(frames)}
    arrays |= {f"p.{name}": np.asarray(p, dtype=np.float32) for name, p in probabilities.items()}
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
