"""The record of a finished run, and which of its files a version keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from eyas_device import __version__
from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.errors import BundleError
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import load_manifest
from eyas_host.pipeline.runner import (
    BUNDLE,
    BUNDLE_STAGES,
    LINEAGE_RECIPE,
    LINEAGE_SPLIT,
    RECIPE,
    RECORD,
    REPORT,
    SETTINGS,
    StageRecord,
    read_stage_record,
)
from eyas_host.versions.record import DataRevision, Figures, RegistryError, StoredFile, Tools, VersionRecord

_WEIGHTS = (".pt", ".safetensors")
_KEPT = (RECIPE, SETTINGS, REPORT, "report.html", str(SPLIT_MANIFEST), str(LINEAGE_RECIPE), str(LINEAGE_SPLIT))


class _Seen(msgspec.Struct, frozen=True):
    """What a record takes of `report.json`."""

    shipped: str = ""
    variants: tuple[dict[str, Any], ...] = ()
    ship: dict[str, Any] | None = None


def read_run(root: Path, *, now: float, by: str = "", note: str = "", parent: str = "") -> VersionRecord:
    """The record of a run whose bundle is packed; all files of the bundle are verified.

    Raises `RegistryError` where something is missing, and where the bundle is not of this run's present state: another
    command has changed it since.
    """
    stages = {name: record for name in BUNDLE_STAGES if (record := read_stage_record(root / name)) is not None}
    if missing := [name for name in BUNDLE_STAGES if name not in stages]:
        raise RegistryError(f"{root}: {', '.join(missing)} not finished; eyas distill RECIPE finishes it")
    try:
        manifest = Bundle.open(root / BUNDLE).manifest
    except BundleError as error:
        raise RegistryError(f"{root}: {error}") from None
    if manifest.origin:
        raise RegistryError(f"{root}: a reduced bundle; register the run that it was made in")
    for name, digest in stages["pack"].outputs.items():
        if sha256(root / name) != digest:
            raise RegistryError(f"{root / name}: changed since the bundle was packed; run eyas pack again")
    lineage = manifest.lineage
    for path, expected in ((LINEAGE_RECIPE, lineage.recipe), (LINEAGE_SPLIT, lineage.split)):
        if sha256(root / path) != expected:
            raise RegistryError(f"{root / path}: not that which the bundle was made from; run eyas pack again")
    split, report = load_manifest(root / LINEAGE_SPLIT), _report(root)
    files = {str(path.relative_to(root)): path for path in sorted(set(_files(root, stages)))}
    return VersionRecord(
        model=manifest.name,
        version=manifest.version,
        digest=sha256(root / BUNDLE / MANIFEST),
        created=manifest.created,
        added=now,
        added_by=by,
        note=note,
        parent=parent,
        labels=manifest.labels,
        recipe=lineage.recipe,
        data=DataRevision(
            data=lineage.data,
            split=lineage.split,
            strategy=split.strategy,
            counts=split.counts,
            notices=split.notices,
        ),
        tools=_tools(stages),
        shipped=report.shipped,
        figures=msgspec.convert({one["name"]: one for one in report.variants}, dict[str, Figures]),
        verdict=str((report.ship or {}).get("verdict", "")),
        files={name: StoredFile(sha256(path), path.stat().st_size) for name, path in files.items()},
    )


def _report(root: Path) -> _Seen:
    """What the run's report says; nothing without one, or where it is older than the bundle."""
    record = read_stage_record(root / "report")
    if record is None or record.inputs.get(f"{BUNDLE}/{MANIFEST}") != sha256(root / BUNDLE / MANIFEST):
        return _Seen()
    try:
        return msgspec.json.decode((root / REPORT).read_bytes(), type=_Seen)
    except (OSError, msgspec.MsgspecError) as error:
        raise RegistryError(f"{root / REPORT}: cannot be read ({error}); run eyas report again") from None


def _files(root: Path, stages: dict[str, StageRecord]) -> Iterator[Path]:
    """What a version keeps: bundle, report, recipe, split, records of the stages, and the networks' weights.

    Not the images, which the split names by their hashes, nor what can be computed again from all that: cached views,
    logits, checkpoints of unfinished epochs.
    """
    yield from (path for path in (root / BUNDLE).rglob("*") if path.is_file())
    yield from (root / name for name in _KEPT if (root / name).is_file())
    for name, record in stages.items():
        yield root / name / RECORD
        yield from (root / output for output in record.outputs if output.endswith(_WEIGHTS))


def _tools(stages: dict[str, StageRecord]) -> Tools:
    libraries: defaultdict[str, set[str]] = defaultdict(set)
    machines: list[dict[str, str]] = []
    for record in stages.values():
        for library, version in record.libraries.items():
            libraries[library].add(version)
        machines += [machine for machine in record.machines if machine not in machines]
    return Tools(
        eyas=__version__,
        code={name: record.code for name, record in stages.items()},
        libraries={library: " ".join(sorted(found)) for library, found in sorted(libraries.items())},
        machines=tuple(machines),
        seed=stages["split"].seed,
    )
