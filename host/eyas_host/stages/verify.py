"""The `verify` stage: run every artefact with the device's own preprocessing and runtimes on validation.

Each artefact is compared with the network it was made from (`evaluate.parity`); each runtime gets the fastest one that
passes. `exact-int8`, integer arithmetic in torch, shows how far two correct int8 implementations may differ.
"""

from __future__ import annotations

import msgspec
import numpy as np
from rich.markup import escape

from eyas_host.data.split import Split
from eyas_host.evaluation.cost import choose_decision, cost_matrix
from eyas_host.evaluation.inference import pick_device
from eyas_host.evaluation.metrics import expected_calibration_error, fit_temperature, score, softmax
from eyas_host.evaluation.networks import all_logits, load_networks, measure_latency
from eyas_host.evaluation.parity import compare, refusal
from eyas_host.evaluation.verdict import CONFIDENCE, LOGITS, VERDICT, CalibratedConfidence, Verdict, choose
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
    targets = split.validation.targets
    temperature = fit_temperature(logits["qat"], targets)
    probabilities = {name: softmax(values / temperature) for name, values in logits.items()}
    scores = {name: score(p, targets) for name, p in probabilities.items()}
    artefacts = [a.name for a in bundle.manifest.artefacts]
    parity = {name: compare(logits, name, targets, temperature=temperature) for name in artefacts}
    latency = measure_latency(networks, bundle, split.validation)
    sizes = {name: checkpoints.size_bytes(net) for name, net in networks.items() if name not in ("qat", "exact-int8")}
    sizes |= {a.name: sum(f.size_bytes for f in a.files) for a in bundle.manifest.artefacts}
    refused = {name: why for name in artefacts if (why := refusal(name, parity[name], context.recipe.gate))}
    use, reasons = choose(bundle.manifest.artefacts, refused, latency)
    costs = cost_matrix(context.recipe.cost, split.labels)
    shipped = probabilities[next(iter(use.values()))]
    decision = choose_decision(costs, split.labels, shipped, targets, currency=context.recipe.cost.currency)
    verdict = Verdict(temperature, scores, parity, latency, sizes, refused, use, reasons, decision)
    confidence = CalibratedConfidence(
        temperature=temperature,
        images=len(targets),
        variant="qat",
        ece_before=expected_calibration_error(softmax(logits["qat"]), targets),
        ece_after=scores["qat"].ece,
        threshold=context.recipe.pack.threshold,
        decision=decision,
    )
    for name, result in ((VERDICT, verdict), (CONFIDENCE, confidence)):
        write_bytes(context.folder("verify") / name, msgspec.json.format(msgspec.json.encode(result), indent=1))
    for name, why in refused.items():
        say(f"  [red]{name} is not packed:[/red] {why}")
    for runtime, why in reasons.items():
        say(f"  {runtime} runs {use[runtime]}: {why}")
    if decision is not None:
        say(f"  decision rule: {escape(str(decision))}")
    lowest = min(parity[name].agreement for name in artefacts)
    exact = (probabilities["exact-int8"].argmax(1) == probabilities["qat"].argmax(1)).mean()
    summary = f"{len(artefacts) - len(refused)} of {len(artefacts)} artefacts pass; lowest agreement {lowest:.3f}"
    return StageResult(f"{summary} (exact int8 arithmetic: {exact:.3f})", {"exact_int8_agreement": float(exact)})
