"""Write the bundle that goes to devices: the accepted artefacts with golden images, reference, manifest and card."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

from eyas_device.bundle import (
    GOLDEN,
    REFERENCE,
    SCHEMA,
    Artefact,
    Bundle,
    Governance,
    Lineage,
    Manifest,
    sha256,
)
from eyas_device.decision import decide
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import decode
from eyas_host.bundle.agent_version import min_agent_version
from eyas_host.bundle.card import bundle_readme, model_card
from eyas_host.bundle.reference import fit_reference, prediction_statistics, sub_populations, write_reference
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import data_hash
from eyas_host.data.split import Split
from eyas_host.evaluation.networks import all_logits
from eyas_host.evaluation.verdict import Verdict, load_verdict, validation_logits
from eyas_host.export.artefacts import requested_artefacts
from eyas_host.export.golden import golden_image, golden_rows, write_golden
from eyas_host.export.manifest import artefacts_of, file_entry, load_candidate, write_manifest
from eyas_host.pipeline.runner import BUNDLE, LINEAGE_RECIPE, LINEAGE_SPLIT, RECIPE, RunContext
from eyas_host.support.files import sync_files, write_bytes

_TITLES = {"split": "Split", "teach": "Teacher", "distill": "Student", "prune": "Pruning", "qat": "Quantization"}


def write_bundle(context: RunContext) -> Manifest:
    """Write the bundle to a temporary folder, open it as a device would, and move it into place.

    Recipe and split manifest are copied to `pack/`: the lineage names hashes of these copies, which stay when a later
    command writes the run's own ones again.
    """
    verdict = load_verdict(context)
    for source, copy in ((RECIPE, LINEAGE_RECIPE), (SPLIT_MANIFEST, LINEAGE_SPLIT)):
        write_bytes(context.root / copy, (context.root / source).read_bytes())
    split = Split.load(context.root, context.recipe.image.preprocessing())
    final = context.root / BUNDLE
    folder = context.root / f".{BUNDLE}.new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    artefacts = _copy_artefacts(context, verdict, folder)
    _write_reference(context, verdict, split, folder)
    manifest = _manifest(context, verdict, split, artefacts, folder)
    _write_golden(context, split, manifest, folder)
    manifest = msgspec.structs.replace(manifest, golden=file_entry(folder / GOLDEN, folder))
    write_manifest(manifest, folder)
    card = model_card(manifest, training=_training_summaries(context), strategy=split.manifest.strategy)
    write_bytes(folder / "CARD.md", card.encode())
    write_bytes(folder / "README.md", bundle_readme(manifest).encode())
    if manifest.notices:
        write_bytes(folder / "NOTICE", "\n".join(manifest.notices).encode() + b"\n")
    bundle = Bundle.open(folder)
    bundle.golden()
    bundle.reference()
    sync_files((path for path in folder.rglob("*") if path.is_file()), folder)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return manifest


def _copy_artefacts(context: RunContext, verdict: Verdict, folder: Path) -> list[Artefact]:
    """Copy the artefacts that passed the gates."""
    compiled = context.folder("compile")
    artefacts = artefacts_of(compiled, requested_artefacts(context.recipe.compile))
    packed = [artefact for artefact in artefacts if verdict.packed(artefact.name)]
    for artefact in packed:
        for file in artefact.files:
            shutil.copyfile(compiled / file.path, folder / file.path)
    return packed


def _write_golden(context: RunContext, split: Split, manifest: Manifest, folder: Path) -> None:
    """Write validation images as golden images, with what every artefact predicts for them as stored."""
    confidence, spec = manifest.confidence, manifest.preprocessing
    validation = calibrated_probabilities(validation_logits(context)["qat"], confidence)
    rows = golden_rows(validation, context.recipe.pack.golden)
    images = [golden_image(split.validation.pixels[row], spec, len(rows)) for row in rows]
    frames = [decode(image, spec=spec) for image in images]
    logits = all_logits({}, load_candidate(context), frames, torch.device("cpu"))
    probabilities = {a.name: calibrated_probabilities(logits[a.name], confidence) for a in manifest.artefacts}
    write_golden(folder / GOLDEN, images, probabilities, manifest)


def _write_reference(context: RunContext, verdict: Verdict, split: Split, folder: Path) -> None:
    """Write what the training images look like, with labels, strata and groups as sub-populations."""
    logits = validation_logits(context)["qat"]
    probabilities = calibrated_probabilities(logits, verdict.confidence[verdict.shipped])
    predicted = decide(logits, probabilities, split.labels, verdict.decision)
    reference = fit_reference(
        split.train.pixels,
        split.validation.pixels,
        context.recipe.image.preprocessing(),
        groups=(sub_populations(split.train.images), sub_populations(split.validation.images)),
        probabilities=probabilities,
        labels=split.train.targets,
        predictions=prediction_statistics(predicted, np.asarray(split.validation.targets), probabilities),
    )
    write_reference(reference, folder / REFERENCE)


def _manifest(context: RunContext, verdict: Verdict, split: Split, artefacts: list[Artefact], folder: Path) -> Manifest:
    recipe = context.recipe
    manifest = Manifest(  # all but `golden`, which records the rest
        schema=SCHEMA,
        name=recipe.run.name,
        version=recipe.pack.version,
        labels=split.labels,
        preprocessing=recipe.image.preprocessing(),
        artefacts=tuple(artefacts),
        use=verdict.use,
        reasons=verdict.reasons,
        confidence=verdict.confidence[verdict.shipped],
        decision=verdict.decision,
        lineage=Lineage(
            data=data_hash(split.manifest),
            split=sha256(context.root / LINEAGE_SPLIT),
            recipe=sha256(context.root / LINEAGE_RECIPE),
        ),
        evidence={artefact.name: verdict.evidence(artefact.name) for artefact in artefacts},
        reference=file_entry(folder / REFERENCE, folder),
        governance=Governance(images=recipe.pack.images),
        notices=split.manifest.notices,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    return msgspec.structs.replace(manifest, min_agent_version=min_agent_version(manifest))


def _training_summaries(context: RunContext) -> dict[str, str]:
    """Title -> one-line summary of each stage that made the model, for the card."""
    records = {title: context.record(stage) for stage, title in _TITLES.items()}
    return {title: record.summary for title, record in records.items() if record is not None}
