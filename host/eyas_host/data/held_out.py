"""When the held-out test set may be read: once the bundle is packed from the current outputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from eyas_host.pipeline.runner import BUNDLE_STAGES, StageRecord, read_stage_record
from eyas_host.support.errors import DataError


def check_test_access(root: Path, *, early: bool) -> tuple[str, bool]:
    """Hash of the outputs of all finished stages of the run at `root`, and whether it is too early for the test set.

    Raises `DataError` if the bundle is not packed from the current outputs, unless `early`.
    """
    records = {stage: record for stage in BUNDLE_STAGES if (record := read_stage_record(root / stage)) is not None}
    why = _why_too_early(records)
    if why and not early:
        raise DataError(
            f"{root}: the test set is held out until the bundle is packed, and {why}; select by validation, "
            "`eyas report RECIPE` evaluates the test set at the end"
        )
    digest = hashlib.sha256()
    for record in records.values():
        digest.update(msgspec.json.encode(record.content, order="deterministic"))
    return digest.hexdigest(), bool(why)


def _why_too_early(records: dict[str, StageRecord]) -> str:
    """Why no bundle is packed from the current outputs; empty if one is."""
    for stage in BUNDLE_STAGES:
        if stage not in records:
            return f"stage {stage!r} has not finished"
    current = {name: digest for record in records.values() for name, digest in record.outputs.items()}
    for stage, record in records.items():
        if any(current.get(name) != digest for name, digest in record.inputs.items()):
            return f"stage {stage!r} has not run on the current inputs"
    return ""
