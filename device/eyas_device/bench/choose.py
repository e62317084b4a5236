"""Selection of the fastest runtime and artefact that passes the golden check."""

from __future__ import annotations

from eyas_device.bench.result import Bench, Result
from eyas_device.bench.show import differ
from eyas_device.errors import CheckFailed
from eyas_device.runtimes.selection import Measured, SavedSelection


def fastest(bench: Bench) -> SavedSelection:
    """Select the result with the smallest median latency of a whole frame among those that passed the golden check.

    An artefact in float is preferred to one in integers that is not faster beyond the spread. Raises `CheckFailed` if
    none passed.
    """
    timed = [r for r in bench.results if "total" in r.loop and r.loop["total"].p50 > 0]
    measured = tuple(
        Measured(runtime=r.runtime, artefact=r.artefact, latency_ms=r.loop["total"].p50, passed=r.passed is True)
        for r in timed
    )
    passed = [r for r in timed if r.passed]
    settings = bench.settings
    if not passed:
        raise CheckFailed(f"{settings.bundle} {settings.bundle_version}: no artefact passes the golden check here")
    best = min(passed, key=_median)
    as_fast = [r for r in passed if r.precision == "fp32" and not differ(r.loop["total"], best.loop["total"])]
    best = min(as_fast or [best], key=_median)
    return SavedSelection(
        name=settings.bundle,
        version=settings.bundle_version,
        manifest_sha256=settings.manifest_sha256,
        runtime=best.runtime,
        artefact=best.artefact,
        threads=settings.threads,
        latency_ms=_median(best),
        measured=measured,
        versions=bench.versions,
        time=bench.time,
    )


def _median(result: Result) -> float:
    """Milliseconds of a whole frame."""
    return result.loop["total"].p50
