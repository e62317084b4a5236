"""Access to the held-out test set: refused before the bundle is packed, and logged every time."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import msgspec

from eyas_host.pipeline.runner import BUNDLE_STAGES, StageRecord, read_stage_record
from eyas_host.support.errors import DataError

ACCESS_LOG = Path("test-set") / "access.jsonl"
"""Below the run's folder, outside the split's, so that it survives a new split."""


class TestAccess(msgspec.Struct, frozen=True):
    """A line of the access log."""

    time: float
    reason: str
    models: str = ""
    """sha256 over the outputs of all finished stages."""
    early: bool = False
    """Accessed on purpose before the bundle was packed: no choice may depend on it."""


def log_test_access(root: Path, reason: str, *, early: bool) -> None:
    """Append an access to the log of the run at `root`.

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
        digest.update(msgspec.json.encode(record.outputs, order="deterministic"))
    access = TestAccess(time=time.time(), reason=reason, models=digest.hexdigest(), early=bool(why))
    path = root / ACCESS_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(msgspec.json.encode(access) + b"\n")


def read_access_log(root: Path) -> list[TestAccess]:
    """All accesses to the test set of the run at `root`, oldest first."""
    path = root / ACCESS_LOG
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=TestAccess) for line in lines]


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
