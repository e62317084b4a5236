"""Cheap hashes of a stage's other inputs: images, weight files, a latency table, records of earlier stages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from eyas_device.bundle import sha256
from eyas_host.data.sources import fingerprint
from eyas_host.models import pretrained
from eyas_host.pipeline.runner import BUNDLE_STAGES, RECORD, SENSITIVITY, RunContext
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.errors import DataError


def images(context: RunContext) -> dict[str, str]:
    """Hash of the images' names, sizes and times: cheap, and enough to notice a change."""
    data = context.recipe.data
    if not data.keep:
        return {"the images": fingerprint(data)}
    if Path(data.keep).resolve() == (context.folder("split") / "manifest.json").resolve():
        raise DataError(
            f"[data] keep = {data.keep}: is this run's own split, which is about to be replaced; copy it elsewhere or "
            "give the run another name"
        )
    return {"the images": fingerprint(data), "the kept split": _sha256(data.keep)}


def teacher_weights(context: RunContext) -> dict[str, str]:
    """Hash of the weights file that the teacher starts from."""
    return {"the teacher's weights": _sha256(_weights_file(context.recipe.teacher, trained=True))}


def student_weights(context: RunContext) -> dict[str, str]:
    """Hash of the weights file that the student starts from, or of its checkpoint."""
    student = context.recipe.student
    return {"the student's weights": _sha256(student.checkpoint or _weights_file(student, trained=False))}


def latency_source(context: RunContext) -> dict[str, str]:
    """Where the latency for pruning comes from: the table's hash, else the runtime; nothing if pruning needs none."""
    settings = context.recipe.prune
    if settings.method != "nncf" and (settings.method, settings.target) != ("channel", "latency"):
        return {}
    table = Path(settings.table)
    own = settings.table and table.is_file()
    return {"the latency's source": sha256(table) if own else context.recipe.compile.runtimes[0]}


def summaries(context: RunContext) -> dict[str, str]:
    """The summaries that the model card quotes."""
    records = {stage: context.record(stage) for stage in BUNDLE_STAGES[: BUNDLE_STAGES.index("compile")]}
    return {f"the summary of {stage}": _hash(record.summary) for stage, record in records.items() if record is not None}


def report_inputs(context: RunContext) -> dict[str, str]:
    """What the report shows of records and beside the chain: facts, times, machines and the layers' sensitivity."""
    hashes = {}
    for stage in BUNDLE_STAGES:
        if (record := context.record(stage)) is not None:
            shown = (
                record.summary,
                record.facts,
                record.seconds,
                record.peak_rss_mb,
                record.machines,
                record.libraries,
            )
            hashes[f"{stage}/{RECORD}"] = _hash(shown)
    return hashes | {SENSITIVITY: _sha256(str(context.root / SENSITIVITY))}


def _hash(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def _weights_file(section: TeacherSection | StudentSection, *, trained: bool) -> str:
    """Path of the initial weights: the recipe's file, or pretrained weights that ship with Eyas."""
    return section.weights_file or str(
        pretrained.pretrained_file(section.model, section.weights, trained=trained) or ""
    )


def _sha256(path: str) -> str:
    return sha256(Path(path)) if path and Path(path).is_file() else ""
