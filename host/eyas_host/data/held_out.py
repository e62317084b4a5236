"""The seal of the test part: nobody reads it before the bundle is packed, and every opening is written down."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import msgspec

from eyas_host.pipeline.runner import BUNDLE_STAGES, StageRecord, read_stage_record
from eyas_host.support.errors import DataError

LEDGER = Path("sealed") / "ledger.jsonl"
"""Below the run's folder; it outlives the split."""


class TestAccess(msgspec.Struct, frozen=True):
    """A line of the ledger."""

    time: float
    reason: str
    models: str = ""
    """sha256 over everything that the finished stages had written."""
    early: bool = False
    """Opened on purpose before the bundle was packed: nothing may be chosen by it."""


def open_test_set(root: Path, reason: str, *, early: bool) -> None:
    """Write an opening of the run at `root` into its ledger. Raises `DataError` if it comes `early` and must not."""
    records = {stage: record for stage in BUNDLE_STAGES if (record := read_stage_record(root / stage)) is not None}
    why = _too_early(records)
    if why and not early:
        raise DataError(
            f"{root}: the test part is sealed until the bundle is packed, and {why}; choose by validation, "
            "`eyas report RECIPE` opens the test part at the end"
        )
    digest = hashlib.sha256()
    for record in records.values():
        digest.update(msgspec.json.encode(record.outputs, order="deterministic"))
    line = TestAccess(time=time.time(), reason=reason, models=digest.hexdigest(), early=bool(why))
    ledger = root / LEDGER
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("ab") as stream:
        stream.write(msgspec.json.encode(line) + b"\n")


def test_accesses(root: Path) -> list[TestAccess]:
    """The ledger of the run at `root` so far."""
    path = root / LEDGER
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=TestAccess) for line in lines]


def _too_early(records: dict[str, StageRecord]) -> str:
    """Why the bundle is not packed from what is there now; empty if it is."""
    for stage in BUNDLE_STAGES:
        if stage not in records:
            return f"stage {stage!r} has not finished"
    now = {name: digest for record in records.values() for name, digest in record.outputs.items()}
    for stage, record in records.items():
        if any(now.get(name) != digest for name, digest in record.inputs.items()):
            return f"stage {stage!r} has not run on what is there now"
    return ""
