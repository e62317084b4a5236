"""The result of an evaluation on a second labelled set, as it is written to JSON."""

from __future__ import annotations

import msgspec

from eyas_host.evaluation.metrics import Bin
from eyas_host.evaluation.overlap import Overlap

SCHEMA = 1

Interval = tuple[float, float]


class LabelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one label against all others; null where the set has no image of it (or no other)."""

    label: str
    images: int
    recall: float | None
    recall_ci: Interval | None
    """95 % Wilson score interval (Wilson 1927), with as many images as their groups are worth."""
    precision: float | None
    """Null where the label was never predicted."""
    f1: float | None
    auc: float | None
    average_precision: float | None


class Unseen(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over images that the run did not train or validate on."""

    images: int
    balanced_accuracy: float
    balanced_accuracy_ci: Interval


class ArtefactFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one artefact on the set, for the labels that the bundle predicts: they weigh costs if it does.

    Intervals are 95 % bootstrap intervals over groups, if the set has some, and exact copies; else over images.
    """

    name: str
    runtime: str
    runtime_version: str
    precision: str
    accuracy: float
    accuracy_ci: Interval
    balanced_accuracy: float
    """Mean recall of the labels that the set has."""
    balanced_accuracy_ci: Interval
    f1: float
    """Mean of the labels' F1."""
    f1_ci: Interval
    auc: float | None
    """Area under the ROC curve, one-versus-rest mean; null unless the set has every label."""
    auc_ci: Interval | None
    pr_auc: float | None
    """Mean average precision of the labels; null unless the set has every label."""
    pr_auc_ci: Interval | None
    ece: float
    """Expected calibration error of the most likely label, 15 bins (Guo et al. 2017)."""
    classwise_ece: float
    """Expected calibration error of every label's probability, averaged over the labels (Kull et al. 2019)."""
    brier: float
    nll: float
    uncertain: float
    """Fraction of predictions whose confidence is below the bundle's threshold."""
    cost: float | None = None
    """Mean cost of an image; null without a cost table."""
    cost_ci: Interval | None = None
    confusion: tuple[tuple[int, ...], ...]
    """[true label][predicted label], images."""
    labels: tuple[LabelFigures, ...]
    """Labels in the bundle's order."""
    reliability: tuple[Bin, ...]
    unseen: Unseen | None = None
    """The same without images that the run trained or validated on; null if there are none, or nothing else is left."""
    packed_balanced_accuracy: float | None = None
    """What the bundle's evidence says, on the run's validation split."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact beside the main one, on the same images."""

    artefact: str
    reference: str
    agreement: float
    """Fraction of images with the same predicted label."""
    mean_dp: float
    """Mean absolute difference of a probability."""
    max_dp: float


class WrongPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """An image that the main artefact got wrong."""

    path: str
    label: str
    predicted: str
    confidence: float
    cost: float | None = None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle does on a labelled set."""

    schema: int = SCHEMA
    created: str
    bundle: str
    bundle_version: str
    bundle_sha256: str
    """Hash of the bundle's manifest."""
    source: str
    labels: tuple[str, ...]
    images: int
    counts: dict[str, int]
    """Images of each label that the set has."""
    missing_labels: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    """What was skipped, and why."""
    left_out: dict[str, int] = {}
    """Reason -> files of the source that are no images, or not meant as such."""
    main: str
    """The artefact that mistakes and parity refer to: what the first runtime runs on a device."""
    artefacts: tuple[ArtefactFigures, ...]
    unavailable: dict[str, str] = {}
    """Artefact -> why it cannot run here."""
    parity: tuple[Agreement, ...] = ()
    mistakes: tuple[WrongPrediction, ...] = ()
    """The costliest first, then the most confident; at most 48."""
    mistake_count: int = 0
    overlap: Overlap
    warnings: tuple[str, ...] = ()
    machine: dict[str, str] = {}
    bits: int = 16
    """Bits that images of 16 bits per channel use."""
