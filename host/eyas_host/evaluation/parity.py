"""Parity of an artefact with the network it was made from, and the gates on it.

The images are camera-like uint8 ones that go through the device's own preprocessing and runtime. int8 and int16 are
compared with the QAT model, fp32 with the pruned student; accuracy drops always refer to the pruned student.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from eyas_device.bundle import Confidence
from eyas_device.predict import calibrated_probabilities
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.metrics import paired_loss
from eyas_host.recipe.export import GateSection


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact compared with the network it was made from, on validation."""

    reference: str
    """The network it was made from."""
    agreement: float
    """Fraction of the images with the same prediction."""
    class_agreement: tuple[float | None, ...]
    """Agreement on the images of each label, in the labels' order; None for a label without images."""
    mean_dp: float
    """Mean absolute difference of a probability."""
    max_dp: float
    mean_dlogit: float
    """Mean absolute difference of a logit."""
    max_dlogit: float
    drop: float
    """Balanced accuracy lost against the fp32 pruned student (negative: gained)."""
    drop_interval: tuple[float, float]
    """Its 95 % paired-bootstrap interval over units."""
    drop_bound: float
    """Its one-sided 95 % paired-bootstrap bound."""
    class_drop: tuple[float | None, ...]
    """Recall lost per label, in the labels' order; None for a label without images."""


def reference_of(artefact: str) -> str:
    """The variant that an artefact was made from: `pruned` for fp32, else `qat`."""
    return "pruned" if artefact.endswith("-fp32") else "qat"


def compare(
    logits: Mapping[str, Floats], name: str, targets: Ints, *, confidence: Confidence, units: Ints | None = None
) -> Parity:
    """Parity of the artefact `name`, from logits [n, classes] of all variants, true labels [n] and the units [n].

    Probabilities of both are those that a device reports if the artefact is shipped: calibrated by `confidence`.
    """
    reference = reference_of(name)
    own, theirs, before = (np.asarray(logits[variant], dtype=np.float64) for variant in (name, reference, "pruned"))
    gap = np.abs(calibrated_probabilities(own, confidence) - calibrated_probabilities(theirs, confidence))
    dlogit = np.abs(own - theirs)
    same = own.argmax(axis=1) == theirs.argmax(axis=1)
    lost = (before.argmax(axis=1) == targets).astype(np.float64) - (own.argmax(axis=1) == targets)
    labels = range(own.shape[1])
    loss = paired_loss(before, own, targets, units=units)
    return Parity(
        reference=reference,
        agreement=float(same.mean()),
        class_agreement=tuple(_mean(same[targets == label]) for label in labels),
        mean_dp=float(gap.mean()),
        max_dp=float(gap.max()),
        mean_dlogit=float(dlogit.mean()),
        max_dlogit=float(dlogit.max()),
        drop=loss.loss,
        drop_interval=loss.interval,
        drop_bound=loss.bound,
        class_drop=tuple(_mean(lost[targets == label]) for label in labels),
    )


def refusal(name: str, parity: Parity, gate: GateSection) -> str:
    """Why an artefact fails the recipe's gates; empty if it passes."""
    within = {
        f"agreement with {parity.reference} {parity.agreement:.3f} < {gate.min_agreement}": parity.agreement
        >= gate.min_agreement,
        f"mean |dp| {parity.mean_dp:.4f} > {gate.max_dp}": parity.mean_dp <= gate.max_dp,
        f"balanced accuracy drop {parity.drop:.3f} > {gate.max_drop}": parity.drop <= gate.max_drop,
    }
    return "; ".join(reason for reason, passed in within.items() if not passed)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None
