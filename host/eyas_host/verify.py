"""Verify: every artefact through the device's own preprocessing and runtimes, on validation.

Each artefact is compared with the network it was made from (`compile.parity`); each runtime is given the fastest that
passed. How far two right int8 implementations may lie apart is measured too: `exact-int8` is integers in torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape

from eyas_device.bundle import Artefact, Bundle
from eyas_device.decision import Decision
from eyas_device.preprocess import prepare
from eyas_device.runtimes import open_runtime
from eyas_host.compile.parity import Parity, compare, reference_of, refusal
from eyas_host.data.split import Part, Split
from eyas_host.data.transforms import Batch, prepared
from eyas_host.models import checkpoints
from eyas_host.pipeline.runner import Context, Outcome
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.quant.qdq import exact_int8
from eyas_host.support.errors import GateError, StageError
from eyas_host.support.files import whole, write_bytes
from eyas_host.support.progress import meter, say
from eyas_host.train.cost import choose_decision, cost_matrix
from eyas_host.train.loop import logits_of
from eyas_host.train.metrics import Scores, expected_calibration_error, fit_temperature, score, softmax

NETWORKS = ("teacher", "student-labels-only", "student", "pruned", "qat", "exact-int8")
"""Rungs that are torch networks, in the order of the ladder."""

_LOGITS = "logits.npz"
_VERDICT = "verdict.json"
_CONFIDENCE = "confidence.json"
_ROUNDS = 30
_FRAMES_A_ROUND = 5

Logits = npt.NDArray[np.float32]


class Latency(msgspec.Struct, frozen=True):
    """One picture's inference at one thread, milliseconds."""

    p50: float
    p90: float


class Verdict(msgspec.Struct, frozen=True):
    """`verify/verdict.json`."""

    temperature: float
    scores: dict[str, Scores]
    """Rung -> figures on validation."""
    parity: dict[str, Parity]
    latency_ms: dict[str, Latency]
    sizes: dict[str, int]
    refused: dict[str, str]
    """Artefact -> why it is not packed."""
    use: dict[str, str]
    reasons: dict[str, str]
    decision: Decision | None = None
    """What mistakes cost and how an answer follows, if the recipe has a cost table."""

    @property
    def shipped(self) -> str:
        """The artefact that the bundle's first runtime runs."""
        return next(iter(self.use.values()))

    def packed(self, name: str) -> bool:
        """Whether the artefact passed."""
        return name not in self.refused

    def evidence(self, name: str) -> dict[str, float | str | None]:
        """What the manifest says of an artefact."""
        parity, latency = self.parity[name], self.latency_ms[name]
        return {
            "part": "validation",
            "balanced_accuracy": self.scores[name].balanced_accuracy,
            "agreement": parity.agreement,
            "mean_dp": parity.mean_dp,
            "latency_ms_p50": latency.p50,
            "latency_ms_p90": latency.p90,
        }


class CalibratedConfidence(msgspec.Struct, frozen=True, kw_only=True):
    """`verify/confidence.json`: how logits become a probability and an answer, fitted on validation."""

    temperature: float
    pictures: int
    rung: str
    """The network whose logits the temperature was fitted on; the errors below are its."""
    ece_before: float
    """Expected calibration error, 15 bins, at temperature 1."""
    ece_after: float
    threshold: float
    """Below this confidence an answer is unsure (`[pack] threshold`)."""
    decision: Decision | None


def verify_all(context: Context) -> Outcome:
    """Measure all rungs, apply the gates, choose what each runtime runs.

    Raises `GateError` if a runtime is left without any artefact.
    """
    from eyas_host.compile.bundle import write_candidate

    split = Split.load(context.root, context.recipe.picture.preprocessing())
    bundle = write_candidate(context, split.labels)
    networks = load_networks(context, len(split.labels))
    logits = all_logits(networks, bundle, split.validation)
    with whole(context.folder("verify") / _LOGITS) as path, path.open("wb") as stream:
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
        pictures=len(targets),
        rung="qat",
        ece_before=expected_calibration_error(softmax(logits["qat"]), targets),
        ece_after=scores["qat"].ece,
        threshold=context.recipe.pack.threshold,
        decision=decision,
    )
    for name, found in ((_VERDICT, verdict), (_CONFIDENCE, confidence)):
        write_bytes(context.folder("verify") / name, msgspec.json.format(msgspec.json.encode(found), indent=1))
    for name, why in refused.items():
        say(f"  [red]{name} is not packed:[/red] {why}")
    for runtime, why in reasons.items():
        say(f"  {runtime} runs {use[runtime]}: {why}")
    if decision is not None:
        say(f"  answer: {escape(str(decision))}")
    least = min(parity[name].agreement for name in artefacts)
    floor = (probabilities["exact-int8"].argmax(1) == probabilities["qat"].argmax(1)).mean()
    summary = f"{len(artefacts) - len(refused)} of {len(artefacts)} artefacts pass; least agreement {least:.3f}"
    return Outcome(f"{summary} (exact int8 arithmetic: {floor:.3f})", {"exact_int8_agreement": float(floor)})


def load_verdict(context: Context) -> Verdict:
    """The finished stage's verdict. Raises `StageError` if it is missing."""
    try:
        return msgspec.json.decode((context.folder("verify") / _VERDICT).read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError) as error:
        raise StageError(f"{context.folder('verify')}: cannot be read ({error}); run with --from verify") from None


def validation_logits(context: Context) -> dict[str, Logits]:
    """Rung -> logits float32 [pictures, classes] on validation."""
    with np.load(context.folder("verify") / _LOGITS) as data:
        return {name: data[name] for name in data.files}


def load_networks(context: Context, classes: int) -> dict[str, torch.nn.Module]:
    """The torch rungs of the ladder, by name, those that exist."""
    networks: dict[str, torch.nn.Module] = {}
    if (context.root / checkpoints.TEACHER).exists():
        networks["teacher"] = checkpoints.load_teacher(context, classes)
    if (context.root / checkpoints.LABELS_ONLY).exists():
        networks["student-labels-only"] = checkpoints.load_student(context, classes, checkpoints.LABELS_ONLY)
    networks["student"] = checkpoints.load_student(context, classes)
    networks["pruned"] = checkpoints.load_pruned(context, classes)
    networks["qat"] = load_quantized(context, classes)
    networks["exact-int8"] = exact_int8(networks["qat"], input_size=context.recipe.picture.size)
    return {name: net.eval() for name, net in networks.items()}


def shipped_network(context: Context, classes: int, artefact: str) -> torch.nn.Module:
    """The torch network that an artefact was made from."""
    if reference_of(artefact) == "pruned":
        return checkpoints.load_pruned(context, classes)
    return load_quantized(context, classes)


def all_logits(networks: Mapping[str, torch.nn.Module], bundle: Bundle, part: Part) -> dict[str, Logits]:
    """Logits of every rung for the pictures of a part, prepared as the device prepares them."""
    spec = bundle.manifest.preprocessing
    pixels = prepared(part.pixels, spec)
    logits: dict[str, Logits] = {}
    with meter("answers of every rung", len(networks) + len(bundle.manifest.artefacts)) as bar:
        for name, network in networks.items():
            logits[name] = logits_of(network, pixels, torch.device("cpu"), batch=1 if name == "exact-int8" else 32)
            bar.advance(name)
        for artefact in bundle.manifest.artefacts:
            with open_runtime(bundle, artefact.runtime, artefact.name, threads=1) as runtime:
                answers = [runtime.infer(prepare(frame, spec)).copy() for frame in part.pixels]
            logits[artefact.name] = np.stack(answers)
            bar.advance(artefact.name)
    return logits


def choose(
    artefacts: Sequence[Artefact], refused: Mapping[str, str], latency: Mapping[str, Latency]
) -> tuple[dict[str, str], dict[str, str]]:
    """What each runtime should run, and why: the fastest artefact that passed, so int8 only where it beats fp32.

    Raises `GateError` if a runtime is left without any artefact.
    """
    use: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for runtime in dict.fromkeys(artefact.runtime for artefact in artefacts):
        own = {a.precision: a.name for a in artefacts if a.runtime == runtime}
        passed = {precision: name for precision, name in own.items() if name not in refused}
        if not passed:
            faults = "; ".join(f"{precision}: {refused[name]}" for precision, name in own.items())
            raise GateError(f"{runtime}: nothing may be packed: {faults}")
        best = min(passed, key=lambda precision: latency[passed[precision]].p50)
        figures = ", ".join(f"{precision} {latency[name].p50:.2f} ms" for precision, name in own.items())
        ratio = latency[own["fp32"]].p50 / latency[own["int8"]].p50
        figures += f" at one thread here (int8 {ratio:.2f} x)"
        out = [precision for precision in own if precision not in passed]
        why = f"{best} is the fastest" if len(passed) > 1 else "nothing else passed"
        if best == "fp32" and "int8" in passed:
            why = "int8 is not faster"
        refusals = f"; refused: {', '.join(out)}" if out else ""
        use[runtime], reasons[runtime] = passed[best], f"{why}: {figures}{refusals}"
    return use, reasons


def measure_latency(networks: Mapping[str, torch.nn.Module], bundle: Bundle, part: Part) -> dict[str, Latency]:
    """One picture at a time at one thread; all rungs take turns, so that a busy machine hits all alike."""
    spec = bundle.manifest.preprocessing
    pixels = prepared(part.pixels[:_FRAMES_A_ROUND], spec)
    calls: dict[str, Callable[[int], object]] = {}
    for name in ("teacher", "student", "pruned"):
        if name in networks:
            calls[name] = _torch_call(networks[name], pixels)
    runtimes = [open_runtime(bundle, a.runtime, a.name, threads=1) for a in bundle.manifest.artefacts]
    for artefact, runtime in zip(bundle.manifest.artefacts, runtimes, strict=True):
        calls[artefact.name] = lambda row, runtime=runtime: runtime.infer(pixels[row])  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    with meter("latency", _ROUNDS) as bar:
        for number in range(_ROUNDS + 1):
            for name, call in calls.items():
                for row in range(len(pixels)):
                    started = time.perf_counter()
                    call(row)
                    if number:  # the first round warms up
                        times[name].append(1000 * (time.perf_counter() - started))
            if number:
                bar.advance()
    for runtime in runtimes:
        runtime.close()
    return {name: Latency(*(float(q) for q in np.quantile(values, (0.5, 0.9)))) for name, values in times.items()}


def _torch_call(network: torch.nn.Module, pixels: Batch) -> Callable[[int], Any]:
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()

    def call(row: int) -> torch.Tensor:
        with torch.inference_mode():
            answer: torch.Tensor = network(tensors[row : row + 1])
        return answer

    return call


def candidate(context: Context) -> Bundle:
    """The bundle that was measured, with every artefact in it."""
    return Bundle.open(context.folder("verify") / "candidate")
