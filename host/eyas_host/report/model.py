"""Schema of `report.json`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from eyas_device.bundle import Confidence
from eyas_device.preprocess import Pixels
from eyas_host.compress.quantize.sensitivity import Sensitivity
from eyas_host.evaluation.cost import CostFigures
from eyas_host.evaluation.metrics import Bin, PairedLoss, Scores
from eyas_host.evaluation.parity import Parity
from eyas_host.evaluation.robustness import Robustness
from eyas_host.evaluation.verdict import Latency
from eyas_host.export.sizes import ArtefactSize, LayerSize
from eyas_host.report.curves import ScoreCurve


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the comparison from the teacher to an artefact; null is not measured, the reason is in `notes`."""

    name: str
    runtime: str
    """`torch`, `litert`, `openvino` or `onnx`."""
    precision: str
    """`fp32`, `int8` or `int16`."""
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    f1: float
    auc: float
    pr_auc: float | None = None
    cost: float | None = None
    """Mean cost per image under the bundle's decision rule; null without a cost table."""
    agreement: float | None = None
    """Fraction of the images with the same prediction as the network it was made from."""
    ece: float | None = None
    classwise_ece: float | None = None
    nll: float | None = None
    """Errors of the probabilities, calibrated on validation; on validation itself they are cross-fitted."""
    temperature: float | None = None
    bias: tuple[float, ...] = ()
    """The variant's own calibration: softmax(logits / temperature + bias)."""
    size_bytes: int | None = None
    latency_ms: Latency | None = None
    threads: int | None = None
    split: str
    """`validation` or `test`."""
    notes: str = ""


class Mistake(msgspec.Struct, frozen=True):
    """An image that the shipped artefact got wrong, and its confidence."""

    path: str
    label: str
    """The true label."""
    prediction: str
    confidence: float
    cost: float | None = None


class Explanations(msgspec.Struct, frozen=True):
    """What Grad-CAM shows of the mistakes."""

    overlays: dict[str, Pixels] = {}
    """Path of a mistake -> the image as the model sees it with the evidence, uint8 [side, side, 3] BGR."""
    reason: str = ""
    """Why there are none."""


class Signal(msgspec.Struct, frozen=True):
    """A remark on the model or its data, which does not change the verdict."""

    level: Literal["green", "yellow"]
    """green: good; yellow: worth a look."""
    text: str


Outcome = Literal["met", "open", "missed"]
"""Of a bound: the whole interval keeps it, the interval holds it, the whole interval breaks it."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One bound of `[accept]` against its figure on the held-out test set."""

    bound: str
    """The key of `[accept]`; empty for what no recipe has to ask for."""
    outcome: Outcome
    text: str


class Ship(msgspec.Struct, frozen=True, kw_only=True):
    """Whether to ship."""

    verdict: Literal["ship", "look", "do not ship"]
    reasons: tuple[str, ...]
    """What decided: the missed and open bounds, or all the met ones."""
    checks: tuple[Check, ...] = ()
    """Every check, missed ones first."""


class StageSummary(msgspec.Struct, frozen=True):
    """Time, memory and result of a stage."""

    name: str
    seconds: float
    peak_rss_mb: float
    summary: str
    machines: tuple[dict[str, str], ...] = ()
    """The machines that ran it; more than one if it was interrupted and went on elsewhere."""
    versions: dict[str, str] = {}
    """Library that it imports -> version."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`."""

    name: str
    version: str
    created: str
    labels: tuple[str, ...]
    machine: dict[str, str]
    """The machine that measured the latencies: that of the stage `verify`. Those of the trainings are in `stages`."""
    versions: dict[str, str]
    """Library -> version, of `verify`."""
    variants: tuple[Variant, ...]
    """On the held-out test set."""
    validation_variants: tuple[Variant, ...]
    """The same on validation, on which all choices were made."""
    shipped: str
    """The variant that the first runtime of the bundle runs."""
    scores: dict[str, Scores]
    """Variant -> all metrics on test of its own labels, confusion matrix included."""
    decided: Scores | None = None
    """The shipped variant's metrics on test under the bundle's decision rule; null without a cost table."""
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    """Shipped variant and teacher -> figure -> 95 % bootstrap interval over units on test, under the bundle's rule."""
    cost: CostFigures | None = None
    curves: tuple[ScoreCurve, ...] = ()
    ship: Ship | None = None
    """Whether to ship, by the recipe's `[accept]`."""
    positive_class: str = ""
    """The class whose recall `[accept] min_recall` bounds."""
    test_losses: dict[str, PairedLoss] = {}
    """Artefact -> balanced accuracy lost on test against the float network before quantization."""
    distillation: PairedLoss | None = None
    """Balanced accuracy that the student lost on test (negative: gained) against the same network from labels only."""
    facts: dict[str, str] = {}
    """In words: worst class, small classes, distillation, int8."""
    signals: tuple[Signal, ...] = ()
    """Remarks beside the verdict, those worth a look first."""
    warnings: tuple[str, ...] = ()
    """Warnings about the data and the recipe."""
    hashes: dict[str, str] = {}
    """Lineage: sha256 of data, split, recipe, bundle and its parent."""
    strategy: str = ""
    """How the images were split, as a sentence."""
    split_by: str = ""
    """stratified, group or time."""
    parity: dict[str, Parity]
    reliability: dict[str, tuple[Bin, ...]]
    """`before` and `after` calibration, of the shipped variant on test, which calibrated nothing."""
    mistakes: tuple[Mistake, ...]
    """Mistakes of the shipped variant on the test set, by cost, then by confidence."""
    histories: dict[str, list[dict[str, Any]]]
    """Training -> epochs: `epoch`, `loss`, `seconds`, `metrics` (combined, balanced_accuracy, auc, loss), `stage`."""
    stages: tuple[StageSummary, ...]
    use: dict[str, str]
    """Runtime -> artefact that it runs."""
    reasons: dict[str, str]
    """Runtime -> why it runs that artefact."""
    refused: dict[str, str]
    """Artefact -> why it is not in the bundle."""
    confidence: Confidence
    """Calibration of the shipped variant, as in the bundle."""
    weights: dict[str, str]
    """Network -> origin of its initial weights."""
    pruning: dict[str, Any]
    """method, macs_before, macs_after, parameters_before, parameters_after; `front` and latencies where it was pruned
    to a latency."""
    exact_int8_agreement: float
    """Agreement of exact int8 arithmetic with the QAT model on validation: the upper limit for any backend."""
    layers: tuple[LayerSize, ...] = ()
    """Bytes of each layer in fp32 and in int8."""
    artefact_sizes: dict[str, ArtefactSize] = {}
    """Artefact -> bytes of its constants and of the rest."""
    quantization: dict[str, Any] = {}
    """method, preset, float_layers."""
    sensitivity: Sensitivity | None = None
    """Sensitivity of each layer to int8, if `eyas sensitivity` measured it for this model."""
    robustness: Robustness | None = None
    """The shipped artefact on changed validation images: light, focus, dirt, view."""
    test_accesses: int
    """How often any run read the held-out test set, or another one with half of its images."""
    test_log: str = ""
    """Where these accesses are logged."""
    test_log_problems: tuple[str, ...] = ()
    """Lines of that log that were edited or removed."""
    """How often the test set was read, this report included."""
    counts: dict[str, dict[str, int]]
    """Split -> label -> images."""
    recipe: dict[str, Any]
    notices: tuple[str, ...]
