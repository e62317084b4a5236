"""Pack what passed into the bundle that goes to devices."""

from __future__ import annotations

import shutil
import time

from eyas_device import __version__
from eyas_device.bundle import (
    GOLDEN,
    REFERENCE,
    SCHEMA,
    Bundle,
    Confidence,
    Governance,
    Lineage,
    Manifest,
    sha256,
)
from eyas_host.bundle.card import bundle_readme, model_card
from eyas_host.bundle.golden import golden_rows, write_golden
from eyas_host.bundle.reference import fit_reference, write_reference
from eyas_host.data.split import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.split import Split, data_hash
from eyas_host.evaluate.metrics import softmax
from eyas_host.evaluate.verdict import load_verdict, validation_logits
from eyas_host.export.build import requested_artefacts
from eyas_host.export.manifest import artefacts_of, file_entry, write_manifest
from eyas_host.pipeline.runner import BUNDLE, RunContext, StageResult
from eyas_host.support.files import write_bytes


def pack_bundle(context: RunContext) -> StageResult:
    """Write the bundle to a neighbouring folder, open it as a device would, and put it in place."""
    verdict = load_verdict(context)
    spec = context.recipe.image.preprocessing()
    split = Split.load(context.root, spec)
    final = context.root / BUNDLE
    fresh = context.root / f".{BUNDLE}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    packed = []
    for artefact in artefacts_of(context.folder("compile"), requested_artefacts(context.recipe.compile)):
        if verdict.packed(artefact.name):
            packed.append(artefact)
            for file in artefact.files:
                shutil.copyfile(context.folder("compile") / file.path, fresh / file.path)
    probabilities = {name: softmax(v / verdict.temperature) for name, v in validation_logits(context).items()}
    rows = golden_rows(probabilities["qat"], context.recipe.pack.golden)
    frames = [split.validation.pixels[row] for row in rows]
    answers = {a.name: probabilities[a.name][rows] for a in packed}
    write_golden(fresh / GOLDEN, frames, answers)
    write_reference(fit_reference(split.train.pixels, split.validation.pixels, spec), fresh / REFERENCE)
    manifest = Manifest(
        schema=SCHEMA,
        name=context.recipe.run.name,
        version=context.recipe.pack.version,
        labels=split.labels,
        preprocessing=spec,
        artefacts=tuple(packed),
        use=verdict.use,
        reasons=verdict.reasons,
        confidence=Confidence(temperature=verdict.temperature, threshold=context.recipe.pack.threshold),
        decision=verdict.decision,
        lineage=Lineage(
            data=data_hash(split.manifest),
            split=sha256(context.root / SPLIT_MANIFEST),
            recipe=sha256(context.root / "recipe.json"),
        ),
        evidence={name: verdict.evidence(name) for name in (a.name for a in packed)},
        golden=file_entry(fresh / GOLDEN, fresh),
        reference=file_entry(fresh / REFERENCE, fresh),
        governance=Governance(images=context.recipe.pack.images),
        notices=split.manifest.notices,
        min_agent_version=__version__,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    write_manifest(manifest, fresh)
    card = model_card(manifest, training=_training(context), strategy=split.manifest.strategy)
    write_bytes(fresh / "CARD.md", card.encode())
    write_bytes(fresh / "README.md", bundle_readme(manifest).encode())
    if manifest.notices:
        write_bytes(fresh / "NOTICE", "\n".join(manifest.notices).encode() + b"\n")
    packed_bundle = Bundle.open(fresh)
    packed_bundle.golden()
    packed_bundle.reference()
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    size = sum(file.size_bytes for artefact in packed for file in artefact.files)
    used = ", ".join(f"{runtime} runs {name}" for runtime, name in verdict.use.items())
    return StageResult(f"{len(packed)} artefacts, {size / 1e6:.1f} MB; {used}", {"size_bytes": size})


def _training(context: RunContext) -> dict[str, str]:
    """What each stage said of itself, for the card."""
    titles = {"split": "Split", "teach": "Teacher", "distill": "Student", "prune": "Pruning", "qat": "Quantization"}
    records = {title: context.record(stage) for stage, title in titles.items()}
    return {title: record.summary for title, record in records.items() if record is not None}
