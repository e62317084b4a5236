"""The fastest runtime and precision that answers rightly here."""

from __future__ import annotations

from eyas_device.bench.result import Bench
from eyas_device.errors import CheckFailed
from eyas_device.runtimes.selection import Measured, SavedSelection


def fastest(bench: Bench) -> SavedSelection:
    """The result with the smallest median of a whole frame among those that passed the golden check.

    Raises `CheckFailed` if none passed.
    """
    measured = tuple(
        Measured(runtime=r.runtime, artefact=r.artefact, latency_ms=r.loop["total"].p50, passed=r.passed is True)
        for r in bench.results
        if "total" in r.loop and r.loop["total"].p50 > 0
    )
    good = [candidate for candidate in measured if candidate.passed]
    settings = bench.settings
    if not good:
        raise CheckFailed(f"{settings.bundle} {settings.bundle_version}: no artefact answers here as on the host")
    best = min(good, key=lambda candidate: candidate.latency_ms)
    return SavedSelection(
        name=settings.bundle,
        version=settings.bundle_version,
        manifest_sha256=settings.manifest_sha256,
        runtime=best.runtime,
        artefact=best.artefact,
        threads=settings.threads,
        latency_ms=best.latency_ms,
        measured=measured,
        time=bench.time,
    )
