"""The verdict of `verify`: metrics, parity, latency, refused artefacts, and what each runtime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Artefact, Confidence
from eyas_device.decision import Decision
from eyas_host.evaluation.calibration import CalibrationErrors
from eyas_host.evaluation.metrics import Scores
from eyas_host.evaluation.parity import Parity
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.errors import GateError, StageError

LOGITS = "logits.npz"
VERDICT = "verdict.json"
CONFIDENCE = "confidence.json"

Logits = npt.NDArray[np.float32]
"""float32 [n, classes]."""


class Latency(msgspec.Struct, frozen=True):
    """Latency of one image at one thread, milliseconds."""

    p50: float
    p90: float


class Verdict(msgspec.Struct, frozen=True):
    """`verify/verdict.json`."""

    confidence: dict[str, Confidence]
    """Variant -> its calibration, fitted on validation."""
    scores: dict[str, Scores]
    """Variant -> metrics on validation; those of the probabilities are cross-fitted."""
    parity: dict[str, Parity]
    latency_ms: dict[str, Latency]
    sizes: dict[str, int]
    """Variant -> bytes."""
    refused: dict[str, str]
    """Artefact -> why it is not packed."""
    use: dict[str, str]
    """Runtime -> artefact that it runs."""
    reasons: dict[str, str]
    """Runtime -> why it runs that artefact."""
    decision: Decision | None = None
    """The cost-sensitive decision rule, if the recipe has a cost table."""

    @property
    def shipped(self) -> str:
        """The artefact that the bundle's first runtime runs."""
        return next(iter(self.use.values()))

    def packed(self, name: str) -> bool:
        """Whether the artefact passed the gates."""
        return name not in self.refused

    def evidence(self, name: str) -> dict[str, float | str | None]:
        """The evidence for an artefact in the bundle's manifest."""
        parity, latency = self.parity[name], self.latency_ms[name]
        return {
            "split": "validation",
            "balanced_accuracy": self.scores[name].balanced_accuracy,
            "agreement": parity.agreement,
            "mean_dp": parity.mean_dp,
            "ece": self.scores[name].ece,
            "classwise_ece": self.scores[name].classwise_ece,
            "latency_ms_p50": latency.p50,
            "latency_ms_p90": latency.p90,
        }


class ShippedConfidence(msgspec.Struct, frozen=True, kw_only=True):
    """`verify/confidence.json`: the shipped variant's calibration and decision rule, fitted on validation."""

    variant: str
    images: int
    temperature: float
    bias: dict[str, float]
    """Label -> bias; empty if validation is too small for one."""
    before: CalibrationErrors
    """Errors of the softmax of the logits."""
    after: CalibrationErrors
    """Errors of the calibrated probabilities, cross-fitted: each image by a calibration that did not see it."""
    threshold: float
    """A prediction below this confidence is uncertain (`[pack] threshold`)."""
    decision: Decision | None
    notice: str = ""
    """Why there is no bias."""


def load_verdict(context: RunContext) -> Verdict:
    """Read the verdict of the finished stage. Raises `StageError` if it is missing."""
    try:
        return msgspec.json.decode((context.folder("verify") / VERDICT).read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError) as error:
        raise StageError(f"{context.folder('verify')}: cannot be read ({error}); run with --from verify") from None


def validation_logits(context: RunContext) -> dict[str, Logits]:
    """Variant -> logits float32 [n, classes] on validation."""
    with np.load(context.folder("verify") / LOGITS) as data:
        return {name: data[name] for name in data.files}


def choose(
    artefacts: Sequence[Artefact], refused: Mapping[str, str], latency: Mapping[str, Latency]
) -> tuple[dict[str, str], dict[str, str]]:
    """Choose the fastest artefact that passed for each runtime (int8 only where it beats fp32), with the reason.

    Raises `GateError` if a runtime is left without any artefact.
    """
    use: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for runtime in dict.fromkeys(artefact.runtime for artefact in artefacts):
        own = {a.precision: a.name for a in artefacts if a.runtime == runtime}
        passed = {precision: name for precision, name in own.items() if name not in refused}
        if not passed:
            problems = "; ".join(f"{precision}: {refused[name]}" for precision, name in own.items())
            raise GateError(f"{runtime}: no artefact passes the gates: {problems}")
        best = min(passed, key=lambda precision: latency[passed[precision]].p50)
        figures = ", ".join(f"{precision} {latency[name].p50:.2f} ms" for precision, name in own.items())
        ratio = latency[own["fp32"]].p50 / latency[own["int8"]].p50
        figures += f" at one thread on this machine (int8 {ratio:.2f} x)"
        out = [precision for precision in own if precision not in passed]
        why = f"{best} is the fastest" if len(passed) > 1 else "nothing else passed"
        if best == "fp32" and "int8" in passed:
            why = "int8 is not faster"
        refusals = f"; refused: {', '.join(out)}" if out else ""
        use[runtime], reasons[runtime] = passed[best], f"{why}: {figures}{refusals}"
    return use, reasons
