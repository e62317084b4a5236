"""Whether a bundle answers here as on the host: its golden images through every artefact that a runtime can run."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from eyas_device.bundle import Artefact, Bundle, Golden
from eyas_device.errors import BundleError, CheckFailed, RuntimeUnavailable
from eyas_device.predict import Classifier
from eyas_device.runtimes import choose, load, open_runtime, runs

_ROUNDS = 3


class Checked(msgspec.Struct, frozen=True):
    """What the golden images said of one artefact."""

    artefact: str
    runtime: str
    precision: str
    status: Literal["ok", "failed", "not checked"]
    max_dp: float | None = None
    """Largest absolute difference of a probability from the recorded one."""
    agreement: float | None = None
    """Part of the golden images with the recorded label."""
    latency_ms: float | None = None
    """Median of preprocessing and inference of one image."""
    note: str = ""
    """Why it failed or was not checked."""


def check(bundle: Bundle, *, runtime: str | None = None, threads: int = 1) -> list[Checked]:
    """Compare every artefact (that `runtime` runs, if given) with the answers recorded in the bundle.

    An artefact is ok if no probability differs by more than the manifest's `golden_tolerance`. One whose runtime is not
    installed is not checked, unless that runtime was asked for. Raises `RuntimeUnavailable` if nothing can be checked,
    and `BundleError` if the bundle has no golden images, no artefact for `runtime`, or a model that does not load.
    """
    wanted = [a for a in bundle.manifest.artefacts if runtime is None or a.runtime == runs(runtime)]
    if not wanted:
        raise BundleError(f"{bundle.root}: no artefact for runtime {runtime}")
    golden = bundle.golden()
    checked = [_check(bundle, artefact, golden, runtime, threads) for artefact in wanted]
    if all(result.status == "not checked" for result in checked):
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be checked: {checked[0].note}")
    return checked


def prove(classifier: Classifier, *, max_latency_ms: float | None = None) -> Checked:
    """Compare a loaded model with the answers recorded for it, before it goes live.

    Raises `CheckFailed` if it answers otherwise or, on the median golden image, slower than `max_latency_ms`.
    """
    checked = compare(classifier, classifier.bundle.golden())
    if checked.status != "ok":
        raise CheckFailed(f"{classifier.bundle.root}: {checked.artefact} is not fit to answer here: {checked.note}")
    if max_latency_ms is not None and checked.latency_ms is not None and checked.latency_ms > max_latency_ms:
        raise CheckFailed(
            f"{classifier.bundle.root}: {checked.artefact} takes {checked.latency_ms:.1f} ms an image here; "
            f"{max_latency_ms:g} ms are allowed (model.max_latency_ms)"
        )
    return checked


def compare(classifier: Classifier, golden: Golden) -> Checked:
    """Golden images through a loaded model, three rounds of them."""
    artefact, manifest = classifier.artefact, classifier.bundle.manifest
    unchecked = Checked(artefact.name, classifier.runtime.name, artefact.precision, "not checked")
    recorded = golden.probabilities.get(artefact.name)
    if recorded is None:
        return replace(unchecked, status="failed", note="no answers are recorded for it; pack the bundle again")
    predictions = [classifier.predict(frame) for _ in range(_ROUNDS) for frame in golden.frames]
    probabilities = np.stack([p.probabilities for p in predictions[-len(golden.frames) :]])
    max_dp = float(np.abs(probabilities - recorded).max())
    good = max_dp <= manifest.golden_tolerance  # false for NaN, too
    return replace(
        unchecked,
        status="ok" if good else "failed",
        max_dp=max_dp,
        agreement=float((probabilities.argmax(axis=1) == recorded.argmax(axis=1)).mean()),
        latency_ms=float(np.median([p.latency_ms for p in predictions])),
        note="" if good else f"a probability differs by more than {manifest.golden_tolerance:g} from the recorded one",
    )


def _check(bundle: Bundle, artefact: Artefact, golden: Golden, runtime: str | None, threads: int) -> Checked:
    try:
        chosen = choose(bundle, runtime, artefact.name)
        load(chosen.runtime)
    except RuntimeUnavailable as error:
        return Checked(artefact.name, artefact.runtime, artefact.precision, "not checked", note=str(error))
    with Classifier(
        bundle, open_runtime(bundle, chosen.runtime, artefact.name, threads=threads), artefact
    ) as classifier:
        return compare(classifier, golden)
