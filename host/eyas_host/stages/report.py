"""The `report` stage: open the sealed test part once, and say everything that was found."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.markup import escape

from eyas_device.bundle import MANIFEST, Bundle, read_manifest, sha256
from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, prepare, read_image
from eyas_host.compress.quantize.sensitivity import load_sensitivity
from eyas_host.data.split import Split
from eyas_host.evaluate.metrics import reliability, score, softmax
from eyas_host.evaluate.networks import all_logits, load_networks, shipped_network
from eyas_host.evaluate.predictions import Predictions, cost_figures, positive_label, targets_of
from eyas_host.evaluate.verdict import Logits, load_verdict, validation_logits
from eyas_host.export.manifest import candidate
from eyas_host.export.sizes import ArtefactSize, LayerSize
from eyas_host.pipeline.runner import BUNDLE, BUNDLE_STAGES, RunContext, StageResult
from eyas_host.report.collect import mistakes_of, variants_of
from eyas_host.report.curves import curves_of
from eyas_host.report.gradcam import grad_cam, overlay
from eyas_host.report.html import render_html
from eyas_host.report.model import Report, StageLine
from eyas_host.report.signals import with_signals
from eyas_host.report.table import comparison_table
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.machine import machine, versions
from eyas_host.support.progress import say, show

_SEALED = Path("sealed") / "test-logits.npz"


def run(context: RunContext) -> StageResult:
    """Write `report.json` and `report.html`, and print the comparison."""
    torch.set_num_threads(1)
    verdict = load_verdict(context)
    split = Split.load(context.root, context.recipe.image.preprocessing())
    logits = sealed_logits(context, split)
    test = Predictions.of(logits, targets_of(split, "test"), split.labels, verdict)
    validation = Predictions.of(validation_logits(context), targets_of(split, "validation"), split.labels, verdict)
    shipped = verdict.shipped
    agreement = {
        name: float((p.argmax(1) == test.probabilities[verdict.parity[name].reference].argmax(1)).mean())
        for name, p in test.probabilities.items()
        if name in verdict.parity
    }
    facts = {name: record.facts for name in BUNDLE_STAGES if (record := context.record(name)) is not None}
    intervals = {name: test.intervals(name) for name in dict.fromkeys((shipped, "teacher")) if name in logits}
    positive = positive_label(split.labels, verdict.decision, split.manifest.counts)
    report = Report(
        name=context.recipe.run.name,
        version=context.recipe.pack.version,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        labels=split.labels,
        machine=machine(),
        versions=versions(),
        variants=variants_of(test, agreement, verdict, "test"),
        validation_variants=variants_of(
            validation, {n: p.agreement for n, p in verdict.parity.items()}, verdict, "validation"
        ),
        shipped=shipped,
        scores=test.scores,
        decided=score(test.probabilities[shipped], test.targets, answers=test.answers(shipped))
        if verdict.decision
        else None,
        intervals=intervals,
        cost=cost_figures(validation, test, shipped, intervals[shipped].get("cost")),
        curves=tuple(
            curve
            for name in dict.fromkeys((shipped, "teacher"))
            if name in logits
            for curve in curves_of(
                name, split.labels, test.probabilities[name], test.targets, positive=positive, each=name == shipped
            )
        ),
        parity=verdict.parity,
        reliability={
            "before": tuple(reliability(softmax(logits[shipped]), test.targets)),
            "after": tuple(reliability(test.probabilities[shipped], test.targets)),
        },
        mistakes=mistakes_of(test, shipped, split),
        histories={
            title: history
            for stage in facts.values()
            for title, history in stage.get("histories", {}).items()
            if history
        },
        stages=tuple(
            StageLine(name, record.seconds, record.peak_rss_mb, record.summary)
            for name in BUNDLE_STAGES
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
        test_openings=len(split.test_accesses()),
        counts=split.manifest.counts,
        strategy=split.manifest.strategy,
        divided_by=split.manifest.by,
        warnings=tuple(dict.fromkeys(line for stage in facts.values() for line in stage.get("warnings", ()))),
        hashes=_hashes(context),
        recipe=msgspec.to_builtins(context.recipe),
        notices=split.manifest.notices,
    )
    report = with_signals(report)
    write_bytes(context.root / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=1))
    write_bytes(context.root / "report.html", render_html(report, _looked_at(context, report)).encode())
    show(comparison_table(report))
    own = test.scores[shipped].balanced_accuracy
    share = f", {own / test.scores['teacher'].balanced_accuracy:.0%} of the teacher's" if "teacher" in logits else ""
    return StageResult(
        f"{shipped}: balanced accuracy {own:.3f} on the sealed test part{share}; {context.root / 'report.html'}"
    )


def _hashes(context: RunContext) -> dict[str, str]:
    """sha256 of what the bundle was made from, and of the bundle."""
    lineage = read_manifest(context.root / BUNDLE).lineage
    made = {name: getattr(lineage, name) or "" for name in ("data", "split", "recipe", "parent")}
    made["bundle manifest"] = sha256(context.root / BUNDLE / MANIFEST)
    return {name: digest for name, digest in made.items() if digest}


def _looked_at(context: RunContext, report: Report) -> dict[str, Pixels]:
    """Path -> the image as the model sees it, with where it looked for its wrong answer; without unreadable ones."""
    spec = context.recipe.image.preprocessing()
    images: dict[str, Pixels] = {}
    for mistake in report.mistakes:
        with contextlib.suppress(ImageError, ValueError):  # ValueError: a path with a null byte
            images[mistake.path] = prepare(read_image(Path(mistake.path), spec=spec), spec)
    if not images:
        return {}
    answers = {mistake.path: report.labels.index(mistake.answer) for mistake in report.mistakes}
    wanted = [answers[path] for path in images]
    network = shipped_network(context, len(report.labels), report.shipped)
    try:
        heat = grad_cam(network, np.stack(list(images.values())), wanted)
    except ValueError as error:
        say(f"  [yellow]no Grad-CAM: {escape(str(error))}[/yellow]")
        return {}
    return {path: overlay(image, one) for (path, image), one in zip(images.items(), heat, strict=True)}


def sealed_logits(context: RunContext, split: Split) -> dict[str, Logits]:
    """Every variant's logits on the test part: read once for a set of models, then from what was kept."""
    path = context.root / _SEALED
    bundle = candidate(context)
    key = _models_key(context, bundle)
    if path.exists():
        with np.load(path) as data:
            if str(data["key"]) == key:
                return {name: data[name] for name in data.files if name != "key"}
    part = split.open_test(f"report of {context.recipe.run.name} {context.recipe.pack.version}")
    logits = all_logits(load_networks(context, len(split.labels)), bundle, part)
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, key=np.array(key), **logits)  # type: ignore[arg-type]
    return logits


def _models_key(context: RunContext, bundle: Bundle) -> str:
    """A hash of everything that answers: the artefacts and the networks."""
    digest = hashlib.sha256()
    for artefact in bundle.manifest.artefacts:
        for file in artefact.files:
            digest.update(f"{file.path} {file.sha256}\n".encode())
    for stage in ("split", "teach", "distill", "prune", "qat"):
        record = context.record(stage)
        digest.update(msgspec.json.encode(record.outputs if record else {}, order="deterministic"))
    return digest.hexdigest()
