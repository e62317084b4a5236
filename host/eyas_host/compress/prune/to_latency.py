"""Prune to a latency target, with block times measured on this machine or read from the recipe's table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eyas_device.bench.blocks import BlockTimes
from eyas_device.bundle import Bundle, Precision
from eyas_host.compress.prune.latency_model import FITTED_TO, LatencyModel, layer_shapes, read_table
from eyas_host.compress.prune.magnitude import channel_plan
from eyas_host.compress.prune.rounds import IterativePruner, MeasureFraction
from eyas_host.data.split import Split
from eyas_host.evaluation.latency import Stopwatch
from eyas_host.models.factory import PixelClassifier
from eyas_host.models.pruned import PrunePlan
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.errors import CompressError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import DistillationTask
from eyas_host.train.view_cache import ViewCache

BLOCKS = "blocks.json"
"""Block times of the dense student, in the stage's folder."""
_CALIBRATION_IMAGES = 4
_BUSY_RATIO = 1.2
"""Sum of the block times over the latency of the full network above which the machine counts as busy."""


def prune_to_latency(
    context: RunContext, student: PixelClassifier, task: DistillationTask
) -> tuple[PixelClassifier, PrunePlan, list[Epoch], dict[str, Any]]:
    """Prune and recover in rounds until the latency target is met.

    Returns the network, its plan, the epochs of the last recovery and the facts for the stage's record. Raises
    `CompressError` if the target cannot be reached.
    """
    settings, size = context.recipe.prune, context.recipe.image.size
    dense = layer_shapes(student, size=size)
    with open_stopwatch(context) as stopwatch:
        measure: MeasureFraction | None = None
        if settings.table:
            times = read_table(Path(settings.table), context.recipe.compile.runtimes)
            latency = LatencyModel(times, dense, source=f"[prune] table {settings.table}")
        else:
            times, measure = _measure_here(context, student, stopwatch)
            latency = LatencyModel(times, dense)
        pruned = IterativePruner(
            student,
            task,
            latency,
            _target_fraction(settings.ms, settings.keep, latency.dense_ms),
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
            "fraction": pruned.front[-1].fraction,
            "measured": measure is not None,
            "model_fitted_to": FITTED_TO,
        },
    }
    return pruned.model, plan, list(pruned.history), facts


def measure_speedup(context: RunContext, dense: PixelClassifier, sparse: PixelClassifier) -> dict[str, float]:
    """Speed-up of the sparse network over the dense one for each precision, measured here in turns."""
    speedup: dict[str, float] = {}
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    with open_stopwatch(context) as stopwatch:
        for precision in precisions:
            built = [stopwatch.build(network, precision) for network in (dense, sparse)]
            before, after = stopwatch.medians(built)
            speedup[precision] = before / after
    return speedup


def open_stopwatch(context: RunContext) -> Stopwatch:
    """A stopwatch for the recipe's first runtime, which is what the device will run."""
    rows = np.arange(_CALIBRATION_IMAGES) % len(Split.load(context.root).train)
    images = ViewCache(context.folder("distill")).pixels(np.zeros_like(rows), rows)
    return Stopwatch(context.recipe.compile.runtimes[0], context.recipe.image.preprocessing(), images)


def _measure_here(
    context: RunContext, student: PixelClassifier, stopwatch: Stopwatch
) -> tuple[BlockTimes, MeasureFraction]:
    """Block times of the dense student (kept for a resumed run), and a function that times another network.

    That function returns the network's latency as a fraction of the dense one's, both measured in the same minute.
    """
    path = context.folder("prune") / BLOCKS

    @cache
    def dense() -> Bundle:
        return stopwatch.build(student)

    def fraction(model: PixelClassifier) -> float:
        before, after = stopwatch.medians([dense(), stopwatch.build(model)])
        return after / before

    try:
        times = msgspec.json.decode(path.read_bytes(), type=BlockTimes)
    except (OSError, msgspec.DecodeError):
        say("  measuring the dense student block by block")
        times = stopwatch.blocks(dense())
        write_bytes(path, msgspec.json.format(msgspec.json.encode(times), indent=1))
    if times.sum_ms > _BUSY_RATIO * times.whole.p50:
        say(
            "  [yellow]the machine is busy: block times scatter and may mislead the search; "
            "the full network is timed in processor time[/yellow]"
        )
    return times, fraction


def _target_fraction(ms: float, keep: float, dense_ms: float) -> float:
    """The latency target as a fraction of the dense latency. Raises `CompressError` if there is nothing to prune."""
    if ms >= dense_ms:
        raise CompressError(
            f"[prune] ms = {ms:g}: the dense student already takes only {dense_ms:.3f} ms, so there is nothing to "
            "prune; set method = 'none' or ask for fewer milliseconds"
        )
    return ms / dense_ms if ms else keep
