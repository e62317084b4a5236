"""Selection of the fastest runtime and artefact that passes the golden check."""

from __future__ import annotations

from eyas_device.bench.result import Bench
from eyas_device.errors import CheckFailed
from eyas_device.runtimes.selection import Measured, SavedSelection


def fastest(bench: Bench) -> SavedSelection:
    """Select the result with the smallest median latency of a whole frame among those that passed the golden check.

    Raises `CheckFailed` if none passed.
    """
    measured = tuple(
        Measured(runtime=r.runtime, artefact=r.artefact, latency_ms=r.loop["total"].p50, passed=r.passed is True)
        for r in bench.results
        if "total" in r.loop and r.loop["total"].p50 > 0
    )
    passed = [candidate for candidate in measured if candidate.passed]
    settings = bench.settings
    if not passed:
        raise CheckFailed(f"{settings.bundle} {settings.bundle_version}: no artefact passes the golden check here")
    best = min(passed, key=lambda candidate: candidate.latency_ms)
    return SavedSelection(
        name=settings.bundle,
        version=settings.bundle_version,
        manifest_sha256=settings.manifest_sha256,
        runtime=best.runtime,
        artefact=best.artefact,
        threads=settings.threads,
        latency_ms=best.latency_ms,
        measured=measured,
        versions=bench.versions,
        time=bench.time,
    )
