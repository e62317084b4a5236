"""The `prune` stage: the distilled student made smaller, recovered, and what it costs and takes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from eyas_device.bench.blocks import BlockTimes
from eyas_device.bundle import Bundle, Precision
from eyas_host.compress.prune.latency_model import LatencyModel, layers_of, read_table
from eyas_host.compress.prune.magnitude import ZeroKeeper, channel_plan, prune_channels, prune_evenly, prune_weights
from eyas_host.compress.prune.rounds import Measure, Rounds
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluate.inference import logits_of, pick_device
from eyas_host.evaluate.latency import Stopwatch
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.models.pruned import PrunePlan
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.support.errors import CompressError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.engine import validation_figures
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import DistillationTask
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache

BLOCKS = "blocks.json"
"""The dense student's block times, below the stage's folder."""
_IMAGES = 4
_BUSY = 1.2


def run(context: RunContext) -> StageResult:
    """Prune as the recipe says, and write `prune/`: the plan, the weights."""
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
        lesson = DistillationTask(context.recipe, split, ViewCache(context.folder("distill")), curves=curves)
        if settings.method == "channel" and settings.target == "latency":
            model, plan, history, facts = _to_latency(context, student, lesson)
        else:
            model, plan = _cut(context, student)
            if settings.method == "nncf":
                facts = {"measured_speed": _speed(context, student, model)}
            history = _recover(context, model, lesson)
    figures = _figures(context, split, model)
    write_bytes(context.root / checkpoints.PLAN, msgspec.json.encode(plan))
    save_tensors(context.root / checkpoints.PRUNED, model.cpu().state_dict())
    for checkpoint in context.folder("prune").glob("*.ckpt"):
        checkpoint.unlink()
    facts = {
        "method": plan.method,
        "target": settings.target if plan.method == "channel" else None,
        "macs_before": plan.macs_before,
        "macs_after": plan.macs_after,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "histories": {"pruned": msgspec.to_builtins(history)},
        **facts,
    }
    words = f"balanced accuracy {figures['balanced_accuracy']:.3f}, AUC {figures['auc']:.3f} on validation"
    return StageResult(f"{_summary(plan, facts)}: {words}", facts)


def _cut(context: RunContext, student: PixelClassifier) -> tuple[PixelClassifier, PrunePlan]:
    settings, size = context.recipe.prune, context.recipe.image.size
    if settings.method == "nncf":
        return prune_weights(student, sparsity=settings.sparsity, size=size)
    if settings.target == "ratio":
        return prune_evenly(student, keep=settings.keep, size=size)
    return prune_channels(student, mac_ratio=settings.keep, size=size)


def _recover(context: RunContext, model: PixelClassifier, lesson: DistillationTask) -> list[Epoch]:
    """Train `model` in place with the teacher's answers; zeros stay."""
    settings = context.recipe.prune
    if not settings.epochs:
        return []
    model = move(model, lesson.device)
    keeper = ZeroKeeper(model) if settings.method == "nncf" else None
    return lesson.train(
        model,
        epochs=settings.epochs,
        rate=settings.rate,
        ema=0.0 if keeper else context.recipe.student.ema,
        checkpoint=context.folder("prune") / "recovery.ckpt",
        title="pruned student",
        after_step=keeper,
    )


def _to_latency(
    context: RunContext, student: PixelClassifier, lesson: DistillationTask
) -> tuple[PixelClassifier, PrunePlan, list[Epoch], dict[str, Any]]:
    """Network, plan, history and facts of pruning to a latency, measured here unless the recipe has a table."""
    settings, size = context.recipe.prune, context.recipe.image.size
    dense = layers_of(student, size=size)
    with _stopwatch(context) as watch:
        if settings.table:
            times = read_table(Path(settings.table), context.recipe.compile.runtimes)
            latency = LatencyModel(times, dense, where=f"[prune] table {settings.table}")
            measure = None
        else:
            times, measure = _measured_here(context, student, watch)
            latency = LatencyModel(times, dense)
        pruned = Rounds(
            student,
            lesson,
            latency,
            _part(settings.ms, settings.keep, latency.dense_ms),
            settings=settings,
            folder=context.folder("prune"),
            measure=measure,
        ).run()
    plan = channel_plan(student, pruned.model, pruned.cuts, size=size)
    facts = {
        "front": msgspec.to_builtins(pruned.front),
        "latency": {
            "runtime": times.runtime,
            "board": times.board.model,
            "dense_ms": latency.dense_ms,
            "part": pruned.front[-1].part,
            "measured": measure is not None,
        },
    }
    return pruned.model, plan, list(pruned.history), facts


def _measured_here(context: RunContext, student: PixelClassifier, watch: Stopwatch) -> tuple[BlockTimes, Measure]:
    """The dense student's block times (kept for a resumed run), and how to compare another network with it."""
    path = context.folder("prune") / BLOCKS

    @cache
    def dense() -> Bundle:
        return watch.build(student)

    def part(model: PixelClassifier) -> float:
        before, after = watch.medians([dense(), watch.build(model)])
        return after / before

    if not path.exists():
        say("  measuring the dense student block by block")
        write_bytes(path, msgspec.json.format(msgspec.json.encode(watch.blocks(dense())), indent=1))

    times = msgspec.json.decode(path.read_bytes(), type=BlockTimes)
    if times.sum_ms > _BUSY * times.whole.p50:
        say(
            "  [yellow]the machine is busy: block times scatter and may mislead the search; "
            "the whole is measured in processor time[/yellow]"
        )
    return times, part


def _part(ms: float, keep: float, dense_ms: float) -> float:
    """The target as a part of the dense milliseconds. Raises `CompressError` if nothing is to be pruned."""
    if ms >= dense_ms:
        raise CompressError(
            f"[prune] ms = {ms:g}: the dense student takes {dense_ms:.3f} ms, nothing is to be pruned; "
            "take method = 'none' or fewer milliseconds"
        )
    return ms / dense_ms if ms else keep


def _speed(context: RunContext, dense: PixelClassifier, sparse: PixelClassifier) -> dict[str, float]:
    """Precision -> how many times as fast the network with zeros is, measured here in turns."""
    found: dict[str, float] = {}
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    with _stopwatch(context) as watch:
        for precision in precisions:
            before, after = watch.medians([watch.build(dense, precision), watch.build(sparse, precision)])
            found[precision] = before / after
    return found


def _stopwatch(context: RunContext) -> Stopwatch:
    """For what the device will run: the recipe's first runtime."""
    rows = np.arange(_IMAGES) % len(Split.load(context.root).train)
    images = ViewCache(context.folder("distill")).pixels(np.zeros_like(rows), rows)
    return Stopwatch(context.recipe.compile.runtimes[0], context.recipe.image.preprocessing(), images)


def _figures(context: RunContext, split: Split, model: PixelClassifier) -> dict[str, float]:
    device = pick_device(context.recipe.run.device)
    validation = prepared(split.validation.pixels, context.recipe.image.preprocessing())
    return validation_figures(logits_of(move(model, device), validation, device), split.validation.targets)


def _summary(plan: PrunePlan, facts: dict[str, Any]) -> str:
    """What was done, in a few words."""
    if plan.method == "none":
        return "not pruned"
    if plan.method == "nncf":
        zeros = 1 - plan.parameters_after / plan.parameters_before
        speed = ", ".join(f"{precision} {ratio:.2f} x" for precision, ratio in facts["measured_speed"].items())
        return f"{zeros:.0%} of the weights are zeros; measured speed {speed}"
    words = f"{plan.macs_after / plan.macs_before:.0%} of the multiply-accumulates"
    if "latency" in facts:
        how = "measured here" if facts["latency"]["measured"] else "predicted from the table"
        last = facts["front"][-1]
        ms = last["predicted_ms"] if last["measured_ms"] is None else last["measured_ms"]
        words += f", {ms:.3f} ms ({facts['latency']['part']:.2f} of {facts['latency']['dense_ms']:.3f}, {how})"
    return words
