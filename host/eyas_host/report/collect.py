"""Collect a run's report from its predictions, its verdict and the records of its stages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from eyas_device.bundle import MANIFEST, read_manifest, sha256
from eyas_host.compress.quantize.sensitivity import load_sensitivity
from eyas_host.data.split import Split
from eyas_host.evaluation.metrics import PairedLoss, paired_loss, reliability, score, softmax
from eyas_host.evaluation.predictions import Predictions, cost_figures, positive_label
from eyas_host.evaluation.robustness import Robustness
from eyas_host.evaluation.verdict import Latency, Verdict
from eyas_host.export.manifest import load_candidate
from eyas_host.export.sizes import ArtefactSize, LayerSize
from eyas_host.pipeline.runner import BUNDLE, BUNDLE_STAGES, RunContext
from eyas_host.report.curves import ScoreCurve, score_curves
from eyas_host.report.facts import key_facts
from eyas_host.report.model import Mistake, Report, StageSummary, Variant
from eyas_host.report.ship import decide
from eyas_host.report.signals import judge

_MAX_MISTAKES = 12
LABELS_ONLY = "student-labels-only"
"""The student's network trained from labels only."""

_SIMULATED = "size and latency not measured: int8 is only simulated in torch"
_NOTES = {
    LABELS_ONLY: "latency not measured: the same network as the student",
    "qat": _SIMULATED,
    "exact-int8": _SIMULATED + "; integer arithmetic as a backend would do it",
}


def collect_report(
    context: RunContext,
    split: Split,
    verdict: Verdict,
    validation: Predictions,
    test: Predictions,
    robustness: Robustness | None = None,
    *,
    positive: str = "",
) -> Report:
    """Everything that `report.json` and the page show, the verdict included.

    `positive` is the class whose recall the recipe bounds.
    """
    shipped, recipe, log = verdict.shipped, context.recipe, split.access_log()
    facts = {name: record.facts for name in BUNDLE_STAGES if (record := context.record(name)) is not None}
    precisions = {artefact.name: artefact.precision for artefact in load_candidate(context).manifest.artefacts}
    detailed = [name for name in dict.fromkeys((shipped, "teacher")) if name in test.probabilities]
    intervals = {name: test.intervals(name) for name in detailed}
    before, after = softmax(test.logits[shipped]), test.probabilities[shipped]
    parity = {name: parity.agreement for name, parity in verdict.parity.items()}
    decided = (
        score(after, test.targets, predicted=test.predicted(shipped), units=test.units) if verdict.decision else None
    )
    stages = _stages(context)
    report = Report(
        name=recipe.run.name,
        version=recipe.pack.version,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        labels=split.labels,
        machine=stages["verify"].machines[-1],
        versions=stages["verify"].versions,
        variants=variants_of(test, _agreement(test, verdict), verdict, precisions, "test"),
        validation_variants=variants_of(validation, parity, verdict, precisions, "validation"),
        shipped=shipped,
        scores=test.scores,
        decided=decided,
        intervals=intervals,
        cost=cost_figures(validation, test, shipped, intervals[shipped].get("cost")),
        curves=_curves(split, verdict, test, detailed, positive),
        positive_class=positive,
        test_losses={
            name: paired_loss(test.logits["pruned"], test.logits[name], test.targets, units=test.units)
            for name in verdict.parity
        },
        distillation=_distillation(test),
        parity=verdict.parity,
        reliability={
            "before": tuple(reliability(before, test.targets)),
            "after": tuple(reliability(after, test.targets)),
        },
        mistakes=mistakes_of(test, shipped, split),
        histories=_histories(facts),
        stages=tuple(stages.values()),
        use=verdict.use,
        reasons=verdict.reasons,
        refused=verdict.refused,
        confidence=verdict.confidence[shipped],
        weights={"teacher": facts["teach"]["weights"], "student": facts["distill"]["weights"]},
        pruning=_without_histories(facts["prune"]),
        exact_int8_agreement=facts["verify"]["exact_int8_agreement"],
        layers=msgspec.convert(facts["compile"]["layers"], tuple[LayerSize, ...]),
        artefact_sizes=msgspec.convert(facts["compile"]["artefact_sizes"], dict[str, ArtefactSize]),
        quantization=_without_histories(facts["qat"]),
        sensitivity=load_sensitivity(context),
        robustness=robustness,
        test_accesses=len(log.accesses),
        test_log=log.path,
        test_log_problems=log.problems,
        counts=split.manifest.counts,
        strategy=split.manifest.strategy,
        split_by=split.manifest.by,
        warnings=tuple(dict.fromkeys(line for stage in facts.values() for line in stage.get("warnings", ()))),
        hashes=_hashes(context),
        recipe=msgspec.to_builtins(recipe),
        notices=split.manifest.notices,
    )
    return msgspec.structs.replace(
        report, ship=decide(report, recipe.accept), facts=key_facts(report), signals=judge(report)
    )


def variants_of(
    predictions: Predictions,
    agreement: Mapping[str, float],
    verdict: Verdict,
    precisions: Mapping[str, str],
    split: str,
) -> tuple[Variant, ...]:
    """Figures of every variant on one split: the networks from the teacher on, then the artefacts.

    `precisions` maps each artefact to its precision; torch networks are fp32 but for the QAT model.
    """
    return tuple(
        Variant(
            name=name,
            runtime=name.split("-")[0] if name in verdict.parity else "torch",
            precision=precisions.get(name, "int8" if name in ("qat", "exact-int8") else "fp32"),
            balanced_accuracy=scores.balanced_accuracy,
            balanced_accuracy_ci=scores.balanced_accuracy_ci,
            f1=scores.f1,
            auc=scores.auc,
            pr_auc=scores.pr_auc,
            cost=predictions.cost(name),
            agreement=agreement.get(name),
            size_bytes=verdict.sizes.get(name),
            latency_ms=_without_turns(verdict.latency_ms.get(name)),
            ece=scores.ece,
            classwise_ece=scores.classwise_ece,
            nll=scores.nll,
            temperature=verdict.confidence[name].temperature,
            bias=verdict.confidence[name].bias,
            threads=1 if name in verdict.latency_ms else None,
            split=split,
            notes=_NOTES.get(name, ""),
        )
        for name, scores in sorted(predictions.scores.items(), key=lambda item: item[0] in verdict.parity)
    )


def mistakes_of(test: Predictions, shipped: str, split: Split) -> tuple[Mistake, ...]:
    """The costliest, then most confident, wrong predictions of `shipped` on the test split."""
    predicted, targets, costs = test.predicted(shipped), test.targets, test.costs
    confidence = test.probabilities[shipped][np.arange(len(targets)), predicted]
    price = costs[targets, predicted] if costs is not None else np.zeros(len(targets))
    wrong = np.flatnonzero(predicted != targets)
    worst = wrong[np.lexsort((-confidence[wrong], -price[wrong]))][:_MAX_MISTAKES]
    images = split.manifest.test
    return tuple(
        Mistake(
            images[row].path,
            images[row].label,
            split.labels[predicted[row]],
            float(confidence[row]),
            float(price[row]) if costs is not None else None,
        )
        for row in worst
    )


def _without_turns(latency: Latency | None) -> Latency | None:
    return None if latency is None else msgspec.structs.replace(latency, turns=())


def _agreement(test: Predictions, verdict: Verdict) -> dict[str, float]:
    """Artefact -> fraction of test images on which it predicts the same label as its reference network."""
    labels = {name: logits.argmax(axis=1) for name, logits in test.logits.items()}
    return {name: float((labels[name] == labels[p.reference]).mean()) for name, p in verdict.parity.items()}


def _distillation(test: Predictions) -> PairedLoss | None:
    """The student against the same network trained from labels only; None if that was not trained."""
    if not {"student", LABELS_ONLY} <= set(test.logits):
        return None
    return paired_loss(test.logits[LABELS_ONLY], test.logits["student"], test.targets, units=test.units)


def _curves(
    split: Split, verdict: Verdict, test: Predictions, names: list[str], positive: str
) -> tuple[ScoreCurve, ...]:
    """ROC and precision-recall curves of these variants; those of single labels for the shipped one only."""
    positive = positive or positive_label(split.labels, verdict.decision, split.manifest.counts)
    return tuple(
        curve
        for name in names
        for curve in score_curves(
            name,
            split.labels,
            test.probabilities[name],
            test.targets,
            positive=positive,
            per_label=name == verdict.shipped,
        )
    )


def _histories(facts: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    histories = (item for stage in facts.values() for item in stage.get("histories", {}).items())
    return {title: history for title, history in histories if history}


def _stages(context: RunContext) -> dict[str, StageSummary]:
    records = ((name, context.record(name)) for name in BUNDLE_STAGES)
    return {
        name: StageSummary(name, r.seconds, r.peak_rss_mb, r.summary, r.machines, r.libraries)
        for name, r in records
        if r is not None
    }


def _without_histories(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "histories"}


def _hashes(context: RunContext) -> dict[str, str]:
    """sha256 of the bundle's manifest and of what the bundle was made from."""
    lineage = read_manifest(context.root / BUNDLE).lineage
    hashes = {name: getattr(lineage, name) or "" for name in ("data", "split", "recipe", "parent")}
    hashes["bundle manifest"] = sha256(context.root / BUNDLE / MANIFEST)
    return {name: digest for name, digest in hashes.items() if digest}
