"""The report stage: open the sealed test part once, and say everything that was found."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import Bundle
from eyas_host.compile.sizes import ArtefactSize, LayerSize
from eyas_host.compress.sensitivity import load_sensitivity
from eyas_host.data.split import Split
from eyas_host.files import whole, write_bytes
from eyas_host.machine import machine, versions
from eyas_host.progress import show
from eyas_host.report.html import render_html
from eyas_host.report.model import Mistake, Report, Rung, StageLine
from eyas_host.report.table import ladder_table
from eyas_host.stages import TO_THE_BUNDLE, Context, Outcome
from eyas_host.train.metrics import Floats, Ints, Scores, reliability, score, softmax
from eyas_host.verify import (
    Logits,
    Verdict,
    all_logits,
    candidate,
    load_networks,
    load_verdict,
)

_SEALED = Path("sealed") / "test-logits.npz"
_MISTAKES = 12


def write_report(context: Context) -> Outcome:
    """Write `report.json` and `report.html`, and print the ladder."""
    verdict = load_verdict(context)
    split = Split.load(context.root, context.recipe.picture.preprocessing())
    logits = sealed_logits(context, split)
    targets = np.array([split.labels.index(p.label) for p in split.manifest.test], dtype=np.int64)
    probabilities = {name: softmax(values / verdict.temperature) for name, values in logits.items()}
    scores = {name: score(p, targets) for name, p in probabilities.items()}
    agreement = {
        name: float((p.argmax(1) == probabilities[verdict.parity[name].reference].argmax(1)).mean())
        for name, p in probabilities.items()
        if name in verdict.parity
    }
    shipped = next(iter(verdict.use.values()))
    facts = {name: record.facts for name in TO_THE_BUNDLE if (record := context.record(name)) is not None}
    report = Report(
        name=context.recipe.run.name,
        version=context.recipe.pack.version,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        labels=split.labels,
        machine=machine(),
        versions=versions(),
        rungs=_rungs(scores, agreement, verdict, "test"),
        validation_rungs=_rungs(
            verdict.scores, {n: p.agreement for n, p in verdict.parity.items()}, verdict, "validation"
        ),
        shipped=shipped,
        scores=scores,
        parity=verdict.parity,
        reliability={
            "before": tuple(reliability(softmax(logits[shipped]), targets)),
            "after": tuple(reliability(probabilities[shipped], targets)),
        },
        mistakes=_mistakes(probabilities[shipped], targets, split),
        histories={
            title: history
            for stage in facts.values()
            for title, history in stage.get("histories", {}).items()
            if history
        },
        stages=tuple(
            StageLine(name, record.seconds, record.peak_rss_mb, record.summary)
            for name in TO_THE_BUNDLE
            if (record := context.record(name)) is not None
        ),
        use=verdict.use,
        reasons=verdict.reasons,
        refused=verdict.refused,
        temperature=verdict.temperature,
        weights={"teacher": facts["teach"]["weights"], "student": facts["distill"]["weights"]},
        pruning={k: v for k, v in facts["prune"].items() if k != "histories"},
        exact_int8_agreement=facts["verify"]["exact_int8_agreement"],
        layers=msgspec.convert(facts["compile"]["layers"], tuple[LayerSize, ...]),
        artefact_parts=msgspec.convert(facts["compile"]["parts"], dict[str, ArtefactSize]),
        quantization={k: v for k, v in facts["qat"].items() if k != "histories"},
        sensitivity=load_sensitivity(context),
        test_openings=len(split.openings()),
        counts=split.manifest.counts,
        recipe=msgspec.to_builtins(context.recipe),
        notices=split.manifest.notices,
    )
    write_bytes(context.root / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=1))
    write_bytes(context.root / "report.html", render_html(report).encode())
    show(ladder_table(report))
    own = scores[shipped].balanced_accuracy
    share = f", {own / scores['teacher'].balanced_accuracy:.0%} of the teacher's" if "teacher" in scores else ""
    return Outcome(
        f"{shipped}: balanced accuracy {own:.3f} on the sealed test part{share}; {context.root / 'report.html'}"
    )


def sealed_logits(context: Context, split: Split) -> dict[str, Logits]:
    """Every rung's logits on the test part: read once for a set of models, then from what was kept."""
    path = context.root / _SEALED
    bundle = candidate(context)
    key = _models_key(context, bundle)
    if path.exists():
        with np.load(path) as data:
            if str(data["key"]) == key:
                return {name: data[name] for name in data.files if name != "key"}
    part = split.open_test(f"report of {context.recipe.run.name} {context.recipe.pack.version}")
    logits = all_logits(load_networks(context, len(split.labels)), bundle, part)
    with whole(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, key=np.array(key), **logits)  # type: ignore[arg-type]
    return logits


def _models_key(context: Context, bundle: Bundle) -> str:
    """A hash of everything that answers: the artefacts and the networks."""
    digest = hashlib.sha256()
    for artefact in bundle.manifest.artefacts:
        for file in artefact.files:
            digest.update(f"{file.path} {file.sha256}\n".encode())
    for stage in ("split", "teach", "distill", "prune", "qat"):
        record = context.record(stage)
        digest.update(msgspec.json.encode(record.outputs if record else {}, order="deterministic"))
    return digest.hexdigest()


def _rungs(
    scores: Mapping[str, Scores], agreement: Mapping[str, float], verdict: Verdict, part: str
) -> tuple[Rung, ...]:
    return tuple(
        Rung(
            name=name,
            runtime=name.split("-")[0] if name in verdict.parity else "torch",
            precision="int8" if name.endswith("int8") or name == "qat" else "fp32",
            balanced_accuracy=found.balanced_accuracy,
            balanced_accuracy_ci=found.balanced_accuracy_ci,
            f1=found.f1,
            auc=found.auc,
            agreement=agreement.get(name),
            size_bytes=verdict.sizes.get(name),
            latency_ms=verdict.latency_ms.get(name),
            threads=1 if name in verdict.latency_ms else None,
            split=part,
            notes=_NOTES.get(name, ""),
        )
        for name, found in scores.items()
    )


_SIMULATED = "size and latency not measured: int8 is only simulated in torch"
_NOTES = {
    "student-labels-only": "latency not measured: the same network as the student",
    "qat": _SIMULATED,
    "exact-int8": _SIMULATED + "; integer arithmetic as a backend would do it",
}


def _mistakes(probabilities: Floats, targets: Ints, split: Split) -> tuple[Mistake, ...]:
    answers, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(answers != targets)
    worst = wrong[np.argsort(-confidence[wrong])][:_MISTAKES]
    pictures = split.manifest.test
    return tuple(
        Mistake(pictures[row].path, pictures[row].label, split.labels[answers[row]], float(confidence[row]))
        for row in worst
    )
