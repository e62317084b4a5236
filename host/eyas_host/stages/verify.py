"""The `verify` stage: run every artefact with the device's own preprocessing and runtimes on validation.

Each artefact is compared with the network it was made from (`evaluate.parity`); each runtime gets the fastest one that
passes. `exact-int8`, integer arithmetic in torch, shows how far two correct int8 implementations may differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from rich.markup import escape

from eyas_device.predict import calibrated_probabilities
from eyas_host.data.split import Split
from eyas_host.evaluation.calibration import Calibrations, calibrate, calibration_errors
from eyas_host.evaluation.cost import choose_decision, cost_matrix
from eyas_host.evaluation.inference import pick_device
from eyas_host.evaluation.metrics import score, softmax
from eyas_host.evaluation.networks import all_logits, load_networks, measure_latency
from eyas_host.evaluation.parity import compare, refusal
from eyas_host.evaluation.verdict import CONFIDENCE, LOGITS, VERDICT, Logits, ShippedConfidence, Verdict, choose
from eyas_host.export.manifest import write_candidate
from eyas_host.models import checkpoints
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.progress import say


def run(context: RunContext) -> StageResult:
    """Measure all variants, apply the gates, and choose the artefact for each runtime.

    Raises `GateError` if a runtime is left without any artefact.
    """
    split = Split.load(context.root, context.recipe.image.preprocessing())
    bundle = write_candidate(context, split.labels)
    networks = load_networks(context, len(split.labels))
    logits = all_logits(networks, bundle, split.validation.pixels, pick_device(context.recipe.run.device))
    with atomic_write(context.folder("verify") / LOGITS) as path, path.open("wb") as stream:
        np.savez(stream, **logits)  # type: ignore[arg-type]
    targets, units = split.validation.targets, split.validation.units
    recipe = context.recipe
    calibrated = calibrate(logits, targets, units, split.labels, threshold=recipe.pack.threshold)
    scores = {
        name: score(
            calibrated_probabilities(values, calibrated.confidence[name]),
            targets,
            predicted=values.argmax(axis=1),
            units=units,
            held_out=calibrated.held_out[name],
        )
        for name, values in logits.items()
    }
    artefacts = [a.name for a in bundle.manifest.artefacts]
    parity = {
        name: compare(logits, name, targets, confidence=calibrated.confidence[name], units=units) for name in artefacts
    }
    latency = measure_latency(networks, bundle, split.validation)
    sizes = {name: checkpoints.size_bytes(net) for name, net in networks.items() if name not in ("qat", "exact-int8")}
    sizes |= {a.name: sum(f.size_bytes for f in a.files) for a in bundle.manifest.artefacts}
    refused = {name: why for name in artefacts if (why := refusal(name, parity[name], recipe.gate))}
    use, reasons = choose(bundle.manifest.artefacts, refused, latency)
    verdict = Verdict(calibrated.confidence, scores, parity, latency, sizes, refused, use, reasons)
    confidence = _shipped_confidence(context, verdict, split, logits, calibrated)
    verdict = msgspec.structs.replace(verdict, decision=confidence.decision)
    for name, result in ((VERDICT, verdict), (CONFIDENCE, confidence)):
        write_bytes(context.folder("verify") / name, msgspec.json.format(msgspec.json.encode(result), indent=1))
    _report(verdict, calibrated.notice)
    lowest = min(parity[name].agreement for name in artefacts)
    exact = (logits["exact-int8"].argmax(1) == logits["qat"].argmax(1)).mean()
    passed = f"{len(artefacts) - len(refused)} of {len(artefacts)} artefacts pass"
    summary = f"{passed}; lowest agreement on validation {lowest:.3f}"
    return StageResult(
        f"{summary} (exact int8 arithmetic: {exact:.3f})",
        {"exact_int8_agreement": float(exact), "warnings": [calibrated.notice] if calibrated.notice else []},
    )


def _shipped_confidence(
    context: RunContext, verdict: Verdict, split: Split, logits: Mapping[str, Logits], calibrated: Calibrations
) -> ShippedConfidence:
    """Calibration, its errors and the decision rule of the shipped variant, all from cross-fitted probabilities."""
    name, section, targets = verdict.shipped, context.recipe.cost, split.validation.targets
    own, held_out = calibrated.confidence[name], calibrated.held_out[name]
    costs = cost_matrix(section, split.labels)
    return ShippedConfidence(
        variant=name,
        images=len(targets),
        temperature=own.temperature,
        bias=dict(zip(split.labels, own.bias, strict=False)),
        before=calibration_errors(softmax(logits[name]), targets),
        after=calibration_errors(held_out, targets),
        threshold=own.threshold,
        decision=choose_decision(costs, split.labels, held_out, targets, currency=section.currency),
        notice=calibrated.notice,
    )


def _report(verdict: Verdict, notice: str) -> None:
    for name, why in verdict.refused.items():
        say(f"  [red]{escape(name)} is not packed:[/red] {escape(why)}")
    for runtime, why in verdict.reasons.items():
        say(f"  {runtime} runs {verdict.use[runtime]}: {escape(why)}")
    if notice:
        say(f"  [yellow]{escape(notice)}[/yellow]")
    if verdict.decision is not None:
        say(f"  decision rule: {escape(str(verdict.decision))}")
