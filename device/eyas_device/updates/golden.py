"""Golden check: compare predictions on a bundle's golden images, and its settings, with those recorded on the host."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from eyas_device import __version__
from eyas_device.bundle import MANIFEST, Artefact, Bundle, Golden, PredictionSettings
from eyas_device.errors import BundleError, CheckFailed, RuntimeUnavailable
from eyas_device.predict import Classifier, labels_of
from eyas_device.runtimes import artefact_runtime, choose, load, open_runtime
from eyas_device.updates.records import short_reason

_ROUNDS = 3
_MAX_SHOWN = 100


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


NOTICE = "packed by an early version: labels and settings that were edited in manifest.json go unnoticed; pack it again"


def check_contents(bundle: Bundle) -> Golden:
    """Check everything in an open bundle that no model is needed for, and return its golden images.

    The manifest's labels and settings must be those that the golden images were packed with, and must turn the recorded
    probabilities into the recorded labels. That proves integrity, not authenticity: whoever writes both files can
    change both. Golden images of an early version recorded no settings: see `NOTICE`.

    Raises:
        CheckFailed: The manifest, or this agent, would predict something else.
        BundleError: The golden images or the OOD reference are missing or malformed.

    """
    golden, manifest = bundle.golden(), bundle.manifest
    bundle.reference()
    if golden.settings is None:
        return golden
    current = PredictionSettings.of(manifest)
    changed = [f for f in current.__struct_fields__ if getattr(current, f) != getattr(golden.settings, f)]
    if changed:
        raise CheckFailed(
            f"{bundle.root / MANIFEST}: not what the golden images were packed with: "
            f"{'; '.join(_difference(f, golden.settings, current) for f in changed)}; copy the bundle again"
        )
    for name, recorded in golden.probabilities.items():
        labels, uncertain = labels_of(recorded, manifest)
        if (tuple(labels), tuple(uncertain)) != (golden.labels[name], golden.uncertain[name]):
            raise CheckFailed(
                f"{bundle.root}: this agent ({__version__}) derives other predictions from the probabilities recorded "
                f"for {name} than were recorded: pack the bundle again with this version"
            )
    return golden


def unproven(bundle: Bundle) -> str:
    """What the golden images cannot prove; empty if everything."""
    return "" if bundle.golden().settings is not None else NOTICE


def check_bundle(bundle: Bundle, *, runtime: str | None = None, threads: int = 1) -> list[GoldenResult]:
    """Check the contents and every artefact of a bundle (that `runtime` runs, if given).

    An artefact is ok if no probability differs from the recorded one by more than the manifest's `golden_tolerance`,
    and failed if it cannot be loaded. Without its runtime, an artefact is not checked. Raises `RuntimeUnavailable` if
    nothing can be checked, `BundleError` without an artefact for `runtime`, and what `check_contents` raises.
    """
    artefacts = [
        a for a in bundle.manifest.artefacts if runtime is None or (a.known and a.runtime == artefact_runtime(runtime))
    ]
    if not artefacts:
        raise BundleError(f"{bundle.root}: no artefact for runtime {runtime}")
    golden = check_contents(bundle)
    results = [_check_artefact(bundle, artefact, golden, runtime, threads) for artefact in artefacts]
    if all(result.status == "not checked" for result in results):
        notes = dict.fromkeys(result.note for result in results)
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be checked: {'; '.join(notes)}")
    return results


def check_loaded(classifier: Classifier, golden: Golden, *, max_latency_ms: float | None = None) -> GoldenResult:
    """Check a loaded model against the recorded probabilities, before it goes live.

    Raises `CheckFailed` if a probability differs too much or the median latency is above `max_latency_ms`.
    """
    result = compare_to_golden(classifier, golden)
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
    unchecked = GoldenResult(artefact.name, artefact.runtime, artefact.precision, "not checked")
    try:
        chosen = choose(bundle, runtime, artefact.name)
        load(chosen.runtime)
    except RuntimeUnavailable:
        note = _unavailable(runtime or artefact.runtime) if artefact.known else artefact.unknown
        return replace(unchecked, note=note)
    try:
        loaded = open_runtime(bundle, chosen.runtime, artefact.name, threads=threads)
        with Classifier(bundle, loaded, artefact) as classifier:
            return compare_to_golden(classifier, golden)
    except Exception as error:  # runtimes raise whatever they like; the other artefacts may be right
        return replace(unchecked, status="failed", note=short_reason(error))


def _unavailable(runtime: str) -> str:
    """Why a runtime cannot be used here and how to install it."""
    try:
        load(runtime)
    except RuntimeUnavailable as error:
        return str(error)
    return f"runtime {runtime} cannot be used"


def _difference(name: str, recorded: PredictionSettings, current: PredictionSettings) -> str:
    """One setting that differs, with both values, shortened."""
    if name == "reference":
        return "another reference"
    old, new = (msgspec.json.encode(getattr(settings, name)).decode() for settings in (recorded, current))
    return f"{name} {new[:_MAX_SHOWN]} in place of {old[:_MAX_SHOWN]}"
