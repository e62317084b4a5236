"""Figures that compare models over several trainings, and Eyas with other tools by one measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_1samp

from common import Figure

Logits = npt.NDArray[np.float32]
"""float32 [n, classes]."""

FOLD_BOUND_NOTE = "one-sided 95 % over trainings: Student's t of the folds' losses"
MANY = 0.05
"""A peer's disagreements above which those of Eyas may be at most half as many."""


def fold_bound(losses: Sequence[float]) -> float | None:
    """One-sided 95 % upper bound on the mean loss of a training, from the loss of each fold; None for a single fold.

    Each fold has a training and test images of its own, so its loss varies with both. A bootstrap of the pooled images
    would know nothing of the trainings. Folds share most of their training images: the bound is still somewhat low.
    """
    if len(losses) < 2:
        return None
    if len(set(losses)) == 1:
        return losses[0]
    return float(ttest_1samp(losses, 0.0, alternative="less").confidence_interval(0.95).high)


def disagreements(logits: Sequence[Logits], reference: Sequence[Logits]) -> list[float]:
    """Fraction of each fold's images whose label is not that of the reference."""
    return [float((one.argmax(1) != other.argmax(1)).mean()) for one, other in zip(logits, reference, strict=True)]


def compared_by_disagreements(
    eyas: tuple[str, Sequence[Logits], str],
    peer: tuple[str, Sequence[Logits], str],
    *,
    fp32: Sequence[Logits],
    qat: Sequence[Logits],
) -> dict[str, Figure]:
    """Disagreements of Eyas and of another tool with the same float network, over all folds.

    Each side is its name, its logits by fold and a note. Where the peer disagrees on more than `MANY` of the images,
    Eyas may on half as many.
    """
    (name, logits, note), (peer_name, peer_logits, peer_note) = eyas, peer
    own, theirs = disagreements(logits, fp32), disagreements(peer_logits, fp32)
    sizes = [len(fold) for fold in fp32]
    mean, peer_mean = float(np.average(own, weights=sizes)), float(np.average(theirs, weights=sizes))
    trained = 100 * float(np.average(disagreements(logits, qat), weights=sizes))
    rule = f"half of the other tool's where it disagrees on more than {100 * MANY:.0f} %"
    return {
        f"{peer_name}: disagreements with fp32": Figure(
            value=100 * peer_mean, unit="%", spread=_percent(theirs), note=peer_note
        ),
        f"{name} beside {peer_name}: disagreements with fp32": Figure(
            value=100 * mean,
            unit="%",
            bound=50 * peer_mean if peer_mean > MANY else None,
            better="lower",
            spread=_percent(own),
            note=f"{rule}; with the QAT model, which fine-tuning moved away from fp32: {trained:.2f} %; {note}",
        ),
    }


def _percent(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)
