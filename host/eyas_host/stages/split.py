"""The `split` stage: index the images and split them into train, validation and test."""

from __future__ import annotations

from rich.markup import escape

from eyas_device.support.image_files import describe_left_out
from eyas_host.data.class_balance import balance, ratio, summary, warnings
from eyas_host.data.index import build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.sources import source_folders
from eyas_host.data.split import split_index
from eyas_host.evaluation.cost import accepted_class, cost_matrix
from eyas_host.pipeline.runner import IMAGE_TABLE, RunContext, StageResult
from eyas_host.support.progress import say, warn

_SHOWN = 20


def run(context: RunContext) -> StageResult:
    """Index the images, split them, and report the class balance."""
    data = context.recipe.data
    index = build_index(data, context.recipe.image.bits)
    costs = cost_matrix(context.recipe.cost, index.labels)  # a mistake shows now, not after the training
    accepted_class(context.recipe.accept, index.labels, costs)
    manifest = split_index(index, data, context.recipe.run.seed)
    save_split(manifest, context.root, index, source_folders(data))
    cautions = [*index.remarks, *warnings(manifest)]
    for line in (*manifest.notices, *cautions):
        warn(line)
    if index.left_out:
        say(f"  {escape(describe_left_out(index.left_out))}")
    for image in index.unreadable[:_SHOWN]:
        say(f"  left out: {escape(str(image))}")
    if len(index.unreadable) > _SHOWN:
        say(f"  left out: {len(index.unreadable) - _SHOWN:,} more, which {IMAGE_TABLE} names")
    return StageResult(
        summary(manifest),
        {
            "strategy": manifest.strategy,
            "counts": manifest.counts,
            "balance": balance(manifest),
            "ratio": ratio(manifest),
            "warnings": cautions,
            "labels": list(index.labels),
            "left_out": len(index.unreadable),
            "other_files": dict(index.left_out),
            "copies": manifest.copies,
            "near_duplicates": sum(map(len, manifest.clusters)),
            "set_aside": {why: len(images) for why, images in manifest.set_aside.items()},
        },
    )
