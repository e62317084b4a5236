"""The `prune` stage: make the distilled student smaller and let it recover."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from eyas_host.compress.prune.magnitude import ZeroKeeper, prune_channels, prune_evenly, prune_weights
from eyas_host.compress.prune.to_latency import measure_speedup, prune_to_latency
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.models.pruned import PrunePlan
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.stages.summary import format_metrics
from eyas_host.support.files import write_bytes
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import DistillationTask
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache


def run(context: RunContext) -> StageResult:
    """Prune as the recipe asks, and write the plan and the weights to `prune/`."""
    settings = context.recipe.prune
    if settings.method == "channel" and settings.target != "latency":
        return _run(context)
    if not distributed.is_main():
        return StageResult("")
    with distributed.single_process():
        return _run(context)


def _run(context: RunContext) -> StageResult:
    torch.set_num_threads(training_threads(context.recipe))
    settings = context.recipe.prune
    split = Split.load(context.root, context.recipe.image.preprocessing())
    student = checkpoints.load_student(context, len(split.labels))
    facts: dict[str, Any] = {}
    history: list[Epoch] = []
    if settings.method == "none":
        model, plan = student, PrunePlan("none")
    else:
        curves = Curves(context.recipe, context.root)
        task = DistillationTask(context.recipe, split, ViewCache(context.folder("distill")), curves=curves)
        if settings.method == "channel" and settings.target == "latency":
            model, plan, history, facts = prune_to_latency(context, student, task)
        else:
            model, plan = _prune(context, student)
            if settings.method == "nncf":
                facts = {"measured_speed": measure_speedup(context, student, model)}
            history = _recover(context, model, task)
    if not distributed.is_main():
        return StageResult("")
    device = pick_device(context.recipe.run.device)
    validation = prepared(split.validation.pixels, context.recipe.image.preprocessing())
    figures = validation_metrics(logits_of(move(model, device), validation, device), split.validation.targets)
    write_bytes(context.root / checkpoints.PLAN, msgspec.json.encode(plan))
    save_tensors(context.root / checkpoints.PRUNED, model.cpu().state_dict())
    for checkpoint in context.folder("prune").glob("*.ckpt"):
        checkpoint.unlink()
    facts = {
        "method": plan.method,
        "target": settings.target if plan.method == "channel" else None,
        "macs_target": settings.keep if (plan.method, settings.target) == ("channel", "macs") else None,
        "macs_before": plan.macs_before,
        "macs_after": plan.macs_after,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "histories": {"pruned": msgspec.to_builtins(history)},
        **facts,
    }
    return StageResult(f"{_summary(plan, facts)}: {format_metrics(figures)} on validation", facts)


def _prune(context: RunContext, student: PixelClassifier) -> tuple[PixelClassifier, PrunePlan]:
    """Prune in one step: single weights, every layer alike, or channels down to a fraction of the MACs."""
    settings, size = context.recipe.prune, context.recipe.image.size
    if settings.method == "nncf":
        return prune_weights(student, sparsity=settings.sparsity, size=size)
    if settings.target == "ratio":
        return prune_evenly(student, keep=settings.keep, size=size)
    return prune_channels(student, mac_ratio=settings.keep, size=size)


def _recover(context: RunContext, model: PixelClassifier, task: DistillationTask) -> list[Epoch]:
    """Fine-tune `model` in place by distillation; zeros of magnitude pruning stay zero."""
    settings = context.recipe.prune
    if not settings.epochs:
        return []
    model = move(model, task.device)
    keeper = ZeroKeeper(model) if settings.method == "nncf" else None
    return task.train(
        model,
        epochs=settings.epochs,
        rate=settings.rate,
        patience=settings.patience,
        ema=0.0 if keeper else context.recipe.student.ema,
        keep_start=True,
        checkpoint=context.folder("prune") / "recovery.ckpt",
        title="pruned student",
        after_step=keeper,
    )


def _summary(plan: PrunePlan, facts: dict[str, Any]) -> str:
    """`43% of the multiply-accumulates (45% allowed), 0.430 ms (0.50 of 0.860, measured here)`."""
    if plan.method == "none":
        return "not pruned"
    if plan.method == "nncf":
        zeros = 1 - plan.parameters_after / plan.parameters_before
        speed = ", ".join(f"{precision} {ratio:.2f} x" for precision, ratio in facts["measured_speed"].items())
        return f"{zeros:.0%} of the weights are zero; measured speed {speed}"
    summary = f"{plan.macs_after / plan.macs_before:.1%} of the multiply-accumulates"
    if facts["macs_target"] is not None:
        summary += f" ({facts['macs_target']:.1%} allowed)"
    if "latency" in facts:
        how = "measured here"
        if not facts["latency"]["measured"]:
            how = f"predicted from the table by a model fitted to {facts['latency']['model_fitted_to']}"
        last = facts["front"][-1]
        ms = last["predicted_ms"] if last["measured_ms"] is None else last["measured_ms"]
        summary += f", {ms:.3f} ms ({facts['latency']['fraction']:.2f} of {facts['latency']['dense_ms']:.3f}, {how})"
    return summary
