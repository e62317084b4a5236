"""Manifest entries for compiled files, and the candidate bundle that `verify` measures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eyas_device.bundle import (
    MANIFEST,
    SCHEMA,
    Artefact,
    Bundle,
    File,
    Manifest,
    Precision,
    RuntimeName,
    sha256,
)
from eyas_host.export.artefacts import artefact_files, artefact_name, requested_artefacts
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.files import write_bytes


def artefacts_of(folder: Path, variants: Sequence[tuple[RuntimeName, Precision]]) -> list[Artefact]:
    """Manifest entries for the compiled files in `folder`."""
    return [
        Artefact(
            name=artefact_name(runtime, precision),
            runtime=runtime,
            precision=precision,
            files=tuple(file_entry(path, folder) for path in artefact_files(folder, runtime, precision)),
        )
        for runtime, precision in variants
    ]


def file_entry(path: Path, root: Path) -> File:
    """A manifest entry for a file below `root`."""
    return File(path=path.relative_to(root).as_posix(), sha256=sha256(path), size_bytes=path.stat().st_size)


def write_candidate(context: RunContext, labels: Sequence[str]) -> Bundle:
    """Bundle all compiled artefacts, so that they can be measured as a device would run them."""
    folder = context.folder("compile")
    manifest = Manifest(
        schema=SCHEMA,
        name=context.recipe.run.name,
        version=context.recipe.pack.version,
        labels=tuple(labels),
        preprocessing=context.recipe.image.preprocessing(),
        artefacts=tuple(artefacts_of(folder, requested_artefacts(context.recipe.compile))),
        use={},
    )
    candidate = context.folder("verify") / "candidate"
    shutil.rmtree(candidate, ignore_errors=True)
    shutil.copytree(folder, candidate, ignore=shutil.ignore_patterns("*.json"))
    write_manifest(manifest, candidate)
    return Bundle.open(candidate)


def write_manifest(manifest: Manifest, root: Path) -> None:
    """Write `manifest.json` atomically, indented."""
    write_bytes(root / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def load_candidate(context: RunContext) -> Bundle:
    """Open the candidate bundle, which holds every compiled artefact."""
    return Bundle.open(context.folder("verify") / "candidate")
