"""The verdict of `verify`: scores, parity, latency, what is refused, and what each runtime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Artefact
from eyas_device.decision import Decision
from eyas_host.evaluate.metrics import Scores
from eyas_host.evaluate.parity import Parity
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.errors import GateError, StageError

_LOGITS = "logits.npz"
_VERDICT = "verdict.json"
_CONFIDENCE = "confidence.json"

Logits = npt.NDArray[np.float32]


class Latency(msgspec.Struct, frozen=True):
    """One image's inference at one thread, milliseconds."""

    p50: float
    p90: float


class Verdict(msgspec.Struct, frozen=True):
    """`verify/verdict.json`."""

    temperature: float
    scores: dict[str, Scores]
    """Variant -> figures on validation."""
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
    images: int
    variant: str
    """The network whose logits the temperature was fitted on; the errors below are its."""
    ece_before: float
    """Expected calibration error, 15 bins, at temperature 1."""
    ece_after: float
    threshold: float
    """Below this confidence an answer is uncertain (`[pack] threshold`)."""
    decision: Decision | None


def load_verdict(context: RunContext) -> Verdict:
    """The finished stage's verdict. Raises `StageError` if it is missing."""
    try:
        return msgspec.json.decode((context.folder("verify") / _VERDICT).read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError) as error:
        raise StageError(f"{context.folder('verify')}: cannot be read ({error}); run with --from verify") from None


def validation_logits(context: RunContext) -> dict[str, Logits]:
    """Variant -> logits float32 [images, classes] on validation."""
    with np.load(context.folder("verify") / _LOGITS) as data:
        return {name: data[name] for name in data.files}


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
