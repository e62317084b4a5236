"""The verdict of `verify`: metrics, parity, latency, refused artefacts, and what each runtime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


MIN_SPEEDUP = 1.05
"""Smallest speed-up over fp32 that counts. Where code and data happen to lie in memory shifts a program's time by some
percent for as long as it runs, which turns within one process cannot show (Mytkowicz et al., "Producing Wrong Data
Without Doing Anything Obviously Wrong!", 2009)."""


class Latency(msgspec.Struct, frozen=True, omit_defaults=True):
    """Latency of one image at one thread, milliseconds."""

    p50: float
    p90: float
    turns: tuple[float, ...] = ()
    """Median of each turn; variants that were measured together took turns in the same order."""


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
    """Choose the fastest artefact that passed for each runtime, with the reason.

    int8 and int16 run only where they beat fp32 beyond the scatter of the measurement (see `speedup`). Raises
    `GateError` if a runtime is left without any artefact.
    """
    use: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for runtime in dict.fromkeys(artefact.runtime for artefact in artefacts):
        own = {a.precision: a.name for a in artefacts if a.runtime == runtime}
        passed = {precision: name for precision, name in own.items() if name not in refused}
        if not passed:
            problems = "; ".join(f"{precision}: {refused[name]}" for precision, name in own.items())
            raise GateError(f"{runtime}: no artefact passes the gates: {problems}")
        gains = {p: speedup(latency[name], latency[own["fp32"]]) for p, name in own.items() if p != "fp32"}
        candidates = [p for p in passed if p == "fp32" or "fp32" not in passed or gains[p].counts]
        best = min(candidates, key=lambda precision: (precision == "fp32", latency[passed[precision]].p50))
        if len(passed) == 1:
            why = "nothing else passed"
        elif best == "fp32":
            why = f"{' and '.join(p for p in passed if p != 'fp32')} not faster beyond the scatter"
        else:
            why = f"{best} is the fastest"
        figures = ", ".join(f"{precision} {latency[name].p50:.2f} ms" for precision, name in own.items())
        scatter = "; ".join(f"{precision} {gain}" for precision, gain in gains.items())
        out = [precision for precision in own if precision not in passed]
        refusals = f"; refused: {', '.join(out)}" if out else ""
        reasons[runtime] = (
            f"{why}: {figures} at one thread on this machine ({scatter}; faster counts from {MIN_SPEEDUP} x, in nine "
            f"tenths of the turns){refusals}"
        )
        use[runtime] = passed[best]
    return use, reasons


class Speedup(NamedTuple):
    """How many times faster a variant is than fp32, turn by turn: median and outer tenths."""

    low: float
    median: float
    high: float

    @property
    def counts(self) -> bool:
        """Whether it is faster beyond the scatter: in nine tenths of the turns, and by `MIN_SPEEDUP` in the median."""
        return self.low > 1 and self.median >= MIN_SPEEDUP

    def __str__(self) -> str:
        return f"{self.median:.2f} x, {self.low:.2f} to {self.high:.2f} in the middle eight tenths"


def speedup(latency: Latency, fp32: Latency) -> Speedup:
    """Compare two variants that were measured in turns: a busy moment slows both, so their ratio scatters less."""
    if not latency.turns or len(latency.turns) != len(fp32.turns):
        raise ValueError("speedup: the variants were not measured in the same turns")
    return Speedup(*np.quantile(np.divide(fp32.turns, latency.turns), (0.1, 0.5, 0.9)).tolist())
