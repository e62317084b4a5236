"""The folder of a finished run, written in milliseconds: a real bundle, and records as the stages leave them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import SplitManifest, data_hash
from eyas_host.data.sources import LabelledImage
from eyas_host.pipeline.runner import BUNDLE, BUNDLE_STAGES, RECORD, REPORT, StageRecord
from tests.support.bundles import edit, record_settings
from tests.support.report_parts import complete

MACHINE = {"processor": "a processor", "cores": "2"}


def images(label: str, numbers: Iterable[int]) -> tuple[LabelledImage, ...]:
    """Images whose hash says which they are."""
    return tuple(LabelledImage(label=label, sha256=f"{number:064x}") for number in numbers)


def split_of(labels: tuple[str, ...], train: range, validation: range, test: range) -> SplitManifest:
    """A split whose images have the first label, numbered."""
    parts = {"train": train, "validation": validation, "test": test}
    split = SplitManifest(
        strategy="stratified by label",
        seed=0,
        fractions=(0.7, 0.15, 0.15),
        labels=labels,
        **{name: images(labels[0], numbers) for name, numbers in parts.items()},
        counts={name: {labels[0]: len(numbers)} for name, numbers in parts.items()},
    )
    return msgspec.structs.replace(split, data=data_hash(split))


def finish_run(
    root: Path,
    bundle: Path,
    version: str,
    *,
    split: SplitManifest | None = None,
    recipe: dict[str, object] | None = None,
    weights: bytes = b"weights",
    accuracy: float | None = 0.9,
    notices: tuple[str, ...] = (),
) -> Path:
    """Write a run at `root` whose bundle is a copy of `bundle` with another version.

    `accuracy` is that of the shipped artefact on test; without it the run has no report.
    """
    labels = Bundle.open(bundle).manifest.labels
    split = split or split_of(labels, range(70), range(70, 85), range(85, 100))
    split = msgspec.structs.replace(split, notices=notices)
    packed = shutil.copytree(bundle, root / BUNDLE)
    _write(root / SPLIT_MANIFEST, msgspec.json.encode(split))
    _write(root / "recipe.json", msgspec.json.encode(recipe or {"run": {"name": "x"}, "student": {"epochs": 30}}))
    for source, copy in (("recipe.json", "pack/recipe.json"), (str(SPLIT_MANIFEST), "pack/split.json")):
        _write(root / copy, (root / source).read_bytes())
    _write(root / "teach/teacher.pt", weights)
    _write(root / "teach/views.npy", b"computed again")
    lineage = {
        "data": split.data,
        "split": sha256(root / "pack/split.json"),
        "recipe": sha256(root / "pack/recipe.json"),
    }
    edit(packed, version=version, lineage=lineage)
    record_settings(packed)
    for stage in BUNDLE_STAGES:
        places = [root / stage, *([packed] if stage == "pack" else [])]
        _record(root, stage, [file for place in places for file in place.rglob("*") if file.is_file()])
    if accuracy is not None:
        report = complete(labels)
        shipped = [
            msgspec.structs.replace(one, balanced_accuracy=accuracy, balanced_accuracy_ci=(accuracy - 0.1, accuracy))
            if one.name == report.shipped
            else one
            for one in report.variants
        ]
        report = msgspec.structs.replace(report, version=version, variants=tuple(shipped))
        _write(root / REPORT, msgspec.json.encode(report))
        digest = {f"{BUNDLE}/{MANIFEST}": sha256(packed / MANIFEST)}
        _record(root, "report", [root / REPORT], inputs=digest)
    return root


def _record(root: Path, stage: str, outputs: list[Path], inputs: dict[str, str] | None = None) -> None:
    names = {str(path.relative_to(root)): path for path in outputs if path.name != RECORD}
    record = StageRecord(
        inputs=inputs or {},
        sources={},
        recipe={},
        seed=3,
        device="cpu",
        code=f"code of {stage}",
        libraries={"torch": "2.13.0"} if stage in ("teach", "distill") else {"numpy": "2.4.0"},
        stage=stage,
        outputs={name: sha256(path) for name, path in names.items()},
        sizes={name: path.stat().st_size for name, path in names.items()},
        times_ns={name: path.stat().st_mtime_ns for name, path in names.items()},
        code_version="0.1.0",
        finished=0.0,
        seconds=1.0,
        peak_rss_mb=1.0,
        machines=(MACHINE,),
        summary="",
        facts={},
    )
    _write(root / stage / RECORD, msgspec.json.encode(record))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
