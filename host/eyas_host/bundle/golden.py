"""Golden images: which ones a bundle carries, and their reference predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eyas_device.preprocess import Pixels


def golden_rows(probabilities: npt.NDArray[np.floating], count: int) -> list[int]:
    """Images spread evenly from the least to the most confident answer; the very closest calls are left out."""
    order = np.argsort(np.sort(probabilities, axis=1)[:, -1])
    places = np.linspace(len(order) // 10, len(order) - 1, min(count, len(order))).astype(int)
    return [int(order[place]) for place in dict.fromkeys(places)]


def write_golden(path: Path, frames: Sequence[Pixels], answers: Mapping[str, npt.NDArray[np.floating]]) -> None:
    """Write decoded frames and the probabilities [n, classes] of every artefact as `golden.npz`."""
    arrays: dict[str, npt.NDArray[np.generic]] = {f"frame_{n:02d}": frame for n, frame in enumerate(frames)}
    arrays |= {f"p.{name}": np.asarray(p, dtype=np.float32) for name, p in answers.items()}
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
