"""The `teach` stage: train the teacher by transfer learning."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from rich.markup import escape

from eyas_host.data.split import Split
from eyas_host.models import checkpoints
from eyas_host.models.weights import WeightsFit
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.recipe import Recipe
from eyas_host.recipe.warnings import label_warnings, teacher_warnings
from eyas_host.stages.summary import best_metrics, format_metrics
from eyas_host.support.progress import say, warn
from eyas_host.train.check import check_networks
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.teacher import best_stage, train_teacher
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import check_views_fit


def run(context: RunContext) -> StageResult:
    """Train the teacher's head, then its last blocks."""
    if context.recipe.student.checkpoint:
        return StageResult("not trained: the student comes from a checkpoint", {"weights": "none"})
    torch.set_num_threads(training_threads(context.recipe))
    data = Split.load(context.root, context.recipe.image.preprocessing())
    warnings = _show_warnings(context.recipe, data.labels, check_networks(context.recipe, len(data.labels)))
    views = context.folder("distill")  # too little disk space shows now, not after the training
    check_views_fit(views, context.recipe, len(data.train), existing=len(list(views.glob("view-*.u8"))))
    folder = context.folder("teach")
    curves = Curves(context.recipe, context.root)
    model, origin, histories = train_teacher(context.recipe, data, folder, curves=curves)
    if not distributed.is_main():
        return StageResult("")
    save_tensors(context.root / checkpoints.TEACHER, model.cpu().state_dict())
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    metric = context.recipe.run.selection_metric
    kept = best_stage(histories, metric)
    return StageResult(
        f"{context.recipe.teacher.model} ({origin} weights): {format_metrics(best_metrics(histories[kept], metric))} "
        "on validation",
        {"weights": origin, "kept": kept, "warnings": warnings, "histories": msgspec.to_builtins(histories)},
    )


def _show_warnings(recipe: Recipe, labels: Sequence[str], fits: Sequence[WeightsFit]) -> list[str]:
    """Show how well the weights of teacher and student suit the images; returns the warnings about the teacher.

    Warnings that follow from the recipe alone were shown before the run.
    """
    for role, fit in zip(("teacher", "student"), fits, strict=True):
        say(f"  {role} {escape(fit.note)}")
    about_labels = label_warnings(recipe, labels)
    for line in dict.fromkeys([*(line for fit in fits for line in fit.warnings), *about_labels]):
        warn(line)
    return [*teacher_warnings(recipe), *fits[0].warnings, *about_labels]
