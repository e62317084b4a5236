"""The shape of `report.json`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from eyas_host.compress.quantize.sensitivity import Sensitivity
from eyas_host.evaluate.cost import CostFigures
from eyas_host.evaluate.metrics import Bin, Scores
from eyas_host.evaluate.parity import Parity
from eyas_host.evaluate.verdict import Latency
from eyas_host.export.sizes import ArtefactSize, LayerSize
from eyas_host.report.curves import Curve


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the comparison from the teacher to an artefact; null means not measured, and `notes` says why."""

    name: str
    runtime: str
    """`torch`, `litert`, `openvino` or `onnx`."""
    precision: str
    """`fp32` or `int8`."""
    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    f1: float
    auc: float
    pr_auc: float | None = None
    cost: float | None = None
    """Mean cost of an image, as the bundle decides; null without a cost table."""
    agreement: float | None = None
    """With the network it was made from."""
    size_bytes: int | None = None
    latency_ms: Latency | None = None
    threads: int | None = None
    split: str
    notes: str = ""


class Mistake(msgspec.Struct, frozen=True):
    """An image that the shipped artefact got wrong, and how sure it was."""

    path: str
    label: str
    answer: str
    confidence: float
    cost: float | None = None


class Signal(msgspec.Struct, frozen=True):
    """One reason for or against shipping."""

    level: Literal["green", "yellow", "red"]
    """green: good; yellow: look before you ship; red: do not ship."""
    text: str


class StageLine(msgspec.Struct, frozen=True):
    """What a stage cost and said."""

    name: str
    seconds: float
    peak_rss_mb: float
    summary: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`."""

    name: str
    version: str
    created: str
    labels: tuple[str, ...]
    machine: dict[str, str]
    versions: dict[str, str]
    variants: tuple[Variant, ...]
    """On the sealed test part."""
    validation_variants: tuple[Variant, ...]
    """The same on validation, where all choices were made."""
    shipped: str
    """The variant that the first runtime of the bundle runs."""
    scores: dict[str, Scores]
    """Variant -> all figures on test of its likeliest labels, confusion matrix included."""
    decided: Scores | None = None
    """The shipped variant's figures on test for the answers that the bundle gives, where those weigh costs."""
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    """Shipped variant and teacher -> figure -> 95 % bootstrap interval on test; the shipped one's as it decides."""
    cost: CostFigures | None = None
    curves: tuple[Curve, ...] = ()
    signals: tuple[Signal, ...] = ()
    """Why to ship or not, the gravest first."""
    warnings: tuple[str, ...] = ()
    """Of the split and of the recipe."""
    hashes: dict[str, str] = {}
    """What was made of what: sha256 of data, split, recipe, bundle and its parent."""
    strategy: str = ""
    """How the images were divided, in words."""
    divided_by: str = ""
    """stratified, group or time."""
    parity: dict[str, Parity]
    reliability: dict[str, tuple[Bin, ...]]
    """`before` and `after` temperature scaling, of the shipped variant on test."""
    mistakes: tuple[Mistake, ...]
    """Of the shipped variant on test, the dearest first, then the surest."""
    histories: dict[str, list[dict[str, Any]]]
    """Training -> epochs: `epoch`, `loss`, `seconds`, `metrics` (objective, balanced_accuracy, auc, loss), `stage`."""
    stages: tuple[StageLine, ...]
    use: dict[str, str]
    reasons: dict[str, str]
    refused: dict[str, str]
    temperature: float
    weights: dict[str, str]
    """Network -> where its first weights came from: hub, packaged or random."""
    pruning: dict[str, Any]
    """method, macs_before, macs_after, parameters_before, parameters_after; `front` and latencies where it was pruned
    to a latency."""
    exact_int8_agreement: float
    """Agreement of exact int8 arithmetic with the QAT model on validation: what no backend can be asked to exceed."""
    layers: tuple[LayerSize, ...] = ()
    """Bytes of each layer in fp32 and in int8."""
    artefact_parts: dict[str, ArtefactSize] = {}
    """Artefact -> bytes of its constants and of the rest."""
    quantization: dict[str, Any] = {}
    """method, preset, layers that were kept float."""
    sensitivity: Sensitivity | None = None
    """What int8 costs layer by layer, if `eyas sensitivity` measured it for this model."""
    test_openings: int
    counts: dict[str, dict[str, int]]
    recipe: dict[str, Any]
    notices: tuple[str, ...]
