"""The `pack` stage: pack the artefacts that passed the gates into a bundle."""

from __future__ import annotations

from eyas_host.bundle.pack import write_bundle
from eyas_host.pipeline.runner import RunContext, StageResult


def run(context: RunContext) -> StageResult:
    """Write `bundle/`."""
    manifest = write_bundle(context)
    size = sum(file.size_bytes for artefact in manifest.artefacts for file in artefact.files)
    used = ", ".join(f"{runtime} runs {name}" for runtime, name in manifest.use.items())
    return StageResult(f"{len(manifest.artefacts)} artefacts, {size / 1e6:.1f} MB; {used}", {"size_bytes": size})
