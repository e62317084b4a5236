"""The `report` stage: evaluate the packed models on the held-out test set, and write the report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import Bundle
from eyas_host.data.split import Split
from eyas_host.evaluation.cost import accepted_class
from eyas_host.evaluation.inference import pick_device
from eyas_host.evaluation.networks import all_logits, load_networks, reference_network
from eyas_host.evaluation.predictions import Predictions, targets_of, units_of
from eyas_host.evaluation.robustness import changed_examples, measure_run
from eyas_host.evaluation.verdict import Logits, load_verdict, validation_logits
from eyas_host.export.manifest import load_candidate
from eyas_host.pipeline.runner import REPORT, RunContext, StageResult
from eyas_host.report.collect import collect_report
from eyas_host.report.gradcam import explain_mistakes
from eyas_host.report.html import render_html
from eyas_host.report.model import Explanations, Report
from eyas_host.report.portable import portable
from eyas_host.report.table import comparison_table
from eyas_host.support.beside import beside, has_room_beside
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.progress import show

_PROCESS_BYTES = 1e9
"""What a process needs that measures robustness."""
TEST_LOGITS = Path("test-set") / "logits.npz"
"""Logits on the test set, in the run's folder."""


def run(context: RunContext) -> StageResult:
    """Write `report.json` and `report.html`, and print the comparison."""
    verdict = load_verdict(context)
    split = Split.load(context.root, context.recipe.image.preprocessing())
    costs = np.asarray(verdict.decision.costs) if verdict.decision is not None else None
    positive = accepted_class(context.recipe.accept, split.labels, costs)  # a mistake shows before the test set is read
    apart = has_room_beside(_PROCESS_BYTES)
    with beside("robustness", measure_run, context, verdict.shipped, apart=apart) as robustness:
        test = Predictions.of(
            test_logits(context, split), targets_of(split, "test"), units_of(split, "test"), split.labels, verdict
        )
        validation = Predictions.of_validation(
            validation_logits(context), split.validation.targets, split.validation.units, split.labels, verdict
        )
        report = collect_report(context, split, verdict, validation, test, robustness.result(), positive=positive)
    explanations = _explanations(context, report)
    shown = portable(report, (*split.sources, context.root.resolve()))
    files = {own.path: mistake.path for own, mistake in zip(shown.mistakes, report.mistakes, strict=True)}
    write_bytes(context.root / REPORT, msgspec.json.format(msgspec.json.encode(shown), indent=1))
    html = render_html(shown, explanations, changed_examples(split.validation.pixels), files)
    write_bytes(context.root / "report.html", html.encode())
    show(comparison_table(report))
    own = test.scores[report.shipped].balanced_accuracy
    teacher = test.scores.get("teacher")
    ratio = f", {own / teacher.balanced_accuracy:.0%} of the teacher's" if teacher is not None else ""
    return StageResult(
        f"{report.shipped}: balanced accuracy {own:.3f} on {sum(report.counts['test'].values())} held-out test images"
        f"{ratio}; {context.root / 'report.html'}"
    )


def test_logits(context: RunContext, split: Split) -> dict[str, Logits]:
    """Variant -> logits float32 [n, classes] on the test set.

    The test set is accessed once for a set of models; after that their stored logits are used.
    """
    path = context.root / TEST_LOGITS
    bundle = load_candidate(context)
    key = _models_digest(context, bundle)
    if path.exists():
        with np.load(path) as data:
            if str(data["key"]) == key:
                return {name: data[name] for name in data.files if name != "key"}
    images = split.open_test(f"report of {context.recipe.run.name} {context.recipe.pack.version}")
    logits = all_logits(
        load_networks(context, len(split.labels)), bundle, images.pixels, pick_device(context.recipe.run.device)
    )
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, key=np.array(key), **logits)  # type: ignore[arg-type]
    return logits


def _explanations(context: RunContext, report: Report) -> Explanations:
    """Grad-CAM overlay of each mistake, from the torch network that the shipped artefact was made from."""
    if not report.mistakes:
        return Explanations()
    network = reference_network(context, len(report.labels), report.shipped)
    device = pick_device(context.recipe.run.device)
    return explain_mistakes(network, report.mistakes, report.labels, context.recipe.image.preprocessing(), device)


def _models_digest(context: RunContext, bundle: Bundle) -> str:
    """Hash of all models that predict: the artefacts and the networks."""
    digest = hashlib.sha256()
    for artefact in bundle.manifest.artefacts:
        for file in artefact.files:
            digest.update(f"{file.path} {file.sha256}\n".encode())
    for stage in ("split", "teach", "distill", "prune", "qat"):
        record = context.record(stage)
        digest.update(msgspec.json.encode(record.content if record else {}, order="deterministic"))
    return digest.hexdigest()
