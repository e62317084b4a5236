"""Golden check: compare predictions on a bundle's golden images with those recorded on the host."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from eyas_device.bundle import Artefact, Bundle, Golden
from eyas_device.errors import BundleError, CheckFailed, RuntimeUnavailable
from eyas_device.predict import Classifier
from eyas_device.runtimes import artefact_runtime, choose, load, open_runtime

_ROUNDS = 3


class GoldenResult(msgspec.Struct, frozen=True):
    """Result of the golden check for one artefact."""

    artefact: str
    runtime: str
    precision: str
    status: Literal["ok", "failed", "not checked"]
    max_dp: float | None = None
    """Largest absolute difference between a probability and the recorded one."""
    agreement: float | None = None
    """Fraction of the golden images with the recorded label, 0..1."""
    latency_ms: float | None = None
    """Median latency of preprocessing and inference of one image."""
    note: str = ""
    """Why the artefact failed or was not checked."""


def check_bundle(bundle: Bundle, *, runtime: str | None = None, threads: int = 1) -> list[GoldenResult]:
    """Check every artefact of a bundle (that `runtime` runs, if given) against the recorded probabilities.

    An artefact is ok if no probability differs by more than the manifest's `golden_tolerance`. Without its runtime, an
    artefact is not checked, unless that runtime was requested. Raises `RuntimeUnavailable` if nothing can be checked,
    and `BundleError` if the bundle has no golden images, no artefact for `runtime`, or a model that does not load.
    """
    artefacts = [a for a in bundle.manifest.artefacts if runtime is None or a.runtime == artefact_runtime(runtime)]
    if not artefacts:
        raise BundleError(f"{bundle.root}: no artefact for runtime {runtime}")
    golden = bundle.golden()
    results = [_check_artefact(bundle, artefact, golden, runtime, threads) for artefact in artefacts]
    if all(result.status == "not checked" for result in results):
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be checked: {results[0].note}")
    return results


def check_loaded(classifier: Classifier, *, max_latency_ms: float | None = None) -> GoldenResult:
    """Check a loaded model against the recorded probabilities, before it goes live.

    Raises `CheckFailed` if a probability differs too much or the median latency is above `max_latency_ms`.
    """
    result = compare_to_golden(classifier, classifier.bundle.golden())
    if result.status != "ok":
        raise CheckFailed(f"{classifier.bundle.root}: {result.artefact} failed the golden check: {result.note}")
    if max_latency_ms is not None and result.latency_ms is not None and result.latency_ms > max_latency_ms:
        raise CheckFailed(
            f"{classifier.bundle.root}: {result.artefact} takes {result.latency_ms:.1f} ms an image here; "
            f"{max_latency_ms:g} ms are allowed (model.max_latency_ms)"
        )
    return result


def compare_to_golden(classifier: Classifier, golden: Golden) -> GoldenResult:
    """Predict the golden images three times with a loaded model and compare with the recorded probabilities."""
    artefact, manifest = classifier.artefact, classifier.bundle.manifest
    unchecked = GoldenResult(artefact.name, classifier.runtime.name, artefact.precision, "not checked")
    recorded = golden.probabilities.get(artefact.name)
    if recorded is None:
        return replace(unchecked, status="failed", note="no probabilities are recorded for it; pack the bundle again")
    predictions = [classifier.predict(frame) for _ in range(_ROUNDS) for frame in golden.frames]
    probabilities = np.stack([p.probabilities for p in predictions[-len(golden.frames) :]])
    max_dp = float(np.abs(probabilities - recorded).max())
    finite = all(prediction.finite for prediction in predictions)
    good = finite and max_dp <= manifest.golden_tolerance  # false for NaN, too
    return replace(
        unchecked,
        status="ok" if good else "failed",
        max_dp=max_dp,
        agreement=float((probabilities.argmax(axis=1) == recorded.argmax(axis=1)).mean()),
        latency_ms=float(np.median([p.latency_ms for p in predictions])),
        note=""
        if good
        else f"a probability differs by more than {manifest.golden_tolerance:g} from the recorded one"
        if finite
        else "logits are not finite numbers (NaN or infinity)",
    )


def _check_artefact(
    bundle: Bundle, artefact: Artefact, golden: Golden, runtime: str | None, threads: int
) -> GoldenResult:
    try:
        chosen = choose(bundle, runtime, artefact.name)
        load(chosen.runtime)
    except RuntimeUnavailable as error:
        return GoldenResult(artefact.name, artefact.runtime, artefact.precision, "not checked", note=str(error))
    with Classifier(
        bundle, open_runtime(bundle, chosen.runtime, artefact.name, threads=threads), artefact
    ) as classifier:
        return compare_to_golden(classifier, golden)
