"""The `distill` stage: cache augmented views with the teacher's logits, then train the student."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import msgspec
import torch

from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models import checkpoints
from eyas_host.models.factory import load_checkpoint
from eyas_host.models.weights import fit_to_images
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.recipe import Recipe
from eyas_host.recipe.warnings import student_warnings
from eyas_host.stages.estimate import LABELS_ONLY
from eyas_host.stages.summary import best_metrics, format_metrics
from eyas_host.support.beside import beside
from eyas_host.support.progress import warn
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.feature_distillation import BlockCache, check_feature_layers
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import train_student
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache


def run(context: RunContext) -> StageResult:
    """Train the student by distillation and, in a parallel process, the same network from labels only."""
    recipe, folder = context.recipe, context.folder("distill")
    torch.set_num_threads(training_threads(recipe))
    data = Split.load(context.root, context.recipe.image.preprocessing())
    if recipe.student.checkpoint:
        return _take_checkpoint(context, data) if distributed.is_main() else StageResult("")
    warnings = student_warnings(recipe, len(data.labels))
    for line in warnings[len(student_warnings(recipe)) :]:  # the others were shown before the run
        warn(line)
    teacher = checkpoints.load_teacher(context, len(data.labels))
    student = checkpoints.blank_student(context, len(data.labels))
    check_feature_layers(recipe.student.feature_layers, teacher, student, recipe.image.size)
    cache = ViewCache.make(folder, recipe, data, teacher)
    if recipe.student.feature_layers and distributed.is_main():
        BlockCache.make(cache, recipe, teacher)
    distributed.wait_for_all()
    data.train.release()
    labels_only = recipe.student.labels_only and distributed.is_main()
    with beside(LABELS_ONLY, _train_labels_only, recipe, context.root) if labels_only else nullcontext() as other:
        curves = Curves(recipe, context.root)
        model, origin, history = train_student(recipe, data, ViewCache(folder), folder, curves=curves)
        if not distributed.is_main():
            return StageResult("")
        save_tensors(context.root / checkpoints.STUDENT, model.cpu().state_dict())
        histories = {"student": history} | ({"labels-only": other.result()} if other is not None else {})
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    metrics = format_metrics(best_metrics(history, recipe.run.selection_metric))
    return StageResult(
        f"{recipe.student.model} ({origin} weights): {metrics} on validation",
        {
            "weights": origin,
            "warnings": [
                *warnings,
                *fit_to_images(model.backbone, recipe.student.model, origin, recipe.image).warnings,
            ],
            "histories": msgspec.to_builtins(histories),
        },
    )


def _take_checkpoint(context: RunContext, split: Split) -> StageResult:
    """Use the recipe's checkpoint as the student instead of training one."""
    settings = context.recipe.student
    model = load_checkpoint(
        settings.model, len(split.labels), Path(settings.checkpoint), activation=settings.activation
    )
    save_tensors(context.root / checkpoints.STUDENT, model.state_dict())
    pixels = prepared(split.validation.pixels, context.recipe.image.preprocessing())
    figures = validation_metrics(logits_of(model, pixels, pick_device("cpu")), split.validation.targets)
    return StageResult(f"{settings.model} as given: {format_metrics(figures)} on validation", {"weights": "checkpoint"})


def _train_labels_only(recipe: Recipe, root: Path) -> list[Epoch]:
    """Train the student without a teacher; runs in a child process."""
    distributed.leave()
    torch.set_num_threads(training_threads(recipe))
    folder = root / "distill"
    data = Split.load(root, recipe.image.preprocessing())
    model, _, history = train_student(
        recipe, data, ViewCache(folder), folder, teacher=False, curves=Curves(recipe, root)
    )
    save_tensors(root / checkpoints.LABELS_ONLY, model.cpu().state_dict())
    return history
