"""Does a bundle answer here as on the host? Golden pictures through every artefact whose runtime is installed."""

from __future__ import annotations

import time
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from eyas_device.bundle import Artefact, Bundle, Golden
from eyas_device.errors import BundleError, RuntimeUnavailable
from eyas_device.predict import softmax
from eyas_device.preprocess import prepare
from eyas_device.runtimes import RUNTIMES, load, open_runtime

_ROUNDS = 3


class Checked(msgspec.Struct, frozen=True):
    """What the golden pictures said of one artefact."""

    artefact: str
    runtime: str
    precision: str
    status: Literal["ok", "failed", "not checked"]
    max_dp: float | None = None
    """Largest absolute difference of a probability from the recorded one."""
    agreement: float | None = None
    """Part of the golden pictures with the recorded label."""
    latency_ms: float | None = None
    """Median of preprocessing and inference of one picture."""
    note: str = ""
    """Why it failed or was not checked."""


def check(bundle: Bundle, *, runtime: str | None = None, threads: int = 1) -> list[Checked]:
    """Compare every artefact (of `runtime`, if given) with the answers recorded in the bundle.

    An artefact is ok if no probability differs by more than the manifest's `golden_tolerance`. One whose runtime is not
    installed is not checked, unless that runtime was asked for. Raises `RuntimeUnavailable` if nothing can be checked,
    and `BundleError` if the bundle has no golden pictures, no artefact for `runtime`, or a model that does not load.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise RuntimeUnavailable(f"runtime {runtime!r} is not known; allowed are {', '.join(RUNTIMES)}")
    wanted = [a for a in bundle.manifest.artefacts if runtime in (None, a.runtime)]
    if not wanted:
        raise BundleError(f"{bundle.root}: no artefact for runtime {runtime}")
    golden = bundle.golden()
    checked = [_check(bundle, artefact, golden, threads) for artefact in wanted]
    if all(result.status == "not checked" for result in checked):
        raise RuntimeUnavailable(f"{bundle.root}: nothing can be checked: {checked[0].note}")
    return checked


def _check(bundle: Bundle, artefact: Artefact, golden: Golden, threads: int) -> Checked:
    unchecked = Checked(artefact.name, artefact.runtime, artefact.precision, "not checked")
    try:
        load(artefact.runtime)
    except RuntimeUnavailable as error:
        return replace(unchecked, note=str(error))
    recorded = golden.probabilities.get(artefact.name)
    if recorded is None:
        return replace(unchecked, status="failed", note="no answers are recorded for it; pack the bundle again")
    manifest = bundle.manifest
    logits = np.zeros(recorded.shape, dtype=np.float32)
    times = []
    with open_runtime(bundle, artefact.runtime, artefact.name, threads=threads) as runtime:
        for _ in range(_ROUNDS):
            for row, frame in enumerate(golden.frames):
                started = time.perf_counter()
                logits[row] = runtime.infer(prepare(frame, manifest.preprocessing))
                times.append(1000 * (time.perf_counter() - started))
    probabilities = softmax(logits, manifest.confidence.temperature)
    max_dp = float(np.abs(probabilities - recorded).max())
    good = max_dp <= manifest.golden_tolerance  # false for NaN, too
    return replace(
        unchecked,
        status="ok" if good else "failed",
        max_dp=max_dp,
        agreement=float((probabilities.argmax(axis=1) == recorded.argmax(axis=1)).mean()),
        latency_ms=float(np.median(times)),
        note="" if good else f"a probability differs by more than {manifest.golden_tolerance:g} from the recorded one",
    )
