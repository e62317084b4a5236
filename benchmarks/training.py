"""Training, measured: `python benchmarks/training.py [--quick] [--json FILE]`.

- Distillation from cached views and answers, beside a plain loop that draws its views and runs the teacher at every
  step: images a second and, over three seeds, what both reach on validation.
- Stage 1 (the head) on cached features, beside the same on images.
- Stage 2 on drawn views, beside the same on tensors that are there already: what the input pipeline costs.
- Memory of a long table and of an epoch over it, which must not grow with the images.
- The same rates on a GPU, where there is one.

The sides take turns; rates are medians of the turns. `--quick` leaves out the three seeds and draws a short table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe
from eyas_host.support.machine import cpu_pressure
from sides.lessons import Bench, Turn, rates, take_turns
from sides.noise import gap

RECIPE = Path("models/solar-cells/recipe.toml")
WORK = Path("runs/benchmark/training")
SEEDS = 3
LARGER = "resnet50"
"""A teacher of a usual size."""


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rates and a short table (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    before = cpu_pressure()
    torch.set_num_threads(1)
    quick = ["data.limit=640", "student.views=2"] if arguments.quick else ["student.views=2"]
    bench = Bench(_recipe("cpu", "run.device=cpu", *quick), WORK / "cpu", steps=4)
    figures = cpu_figures(bench, rounds=4 if arguments.quick else 12)
    if arguments.quick:
        figures["validation_gap"] = Figure(value=None, unit="points", note="three seeds: without --quick")
    else:
        figures |= gap(_recipe("seeds", "run.device=cpu"), WORK / "seeds", seeds=SEEDS)
    figures |= memory_figures(*((1000, 5000) if arguments.quick else (5000, 100_000)))
    figures |= gpu_figures()
    finish(figures, before, arguments.json)


def cpu_figures(bench: Bench, rounds: int) -> dict[str, Figure]:
    """The ratios on this processor, one training thread."""
    student = take_turns(
        {
            "cached": bench.student(),
            "plain": bench.student(bench.teacher),
            "alone": bench.student(bench.teacher, workers=0),
        },
        rounds,
        "student",
    )
    larger = take_turns(
        {"cached": bench.student(), "plain": bench.student(bench.larger_teacher(LARGER))}, rounds // 2, "student"
    )
    blocks = take_turns(
        {"views": bench.blocks(synthetic=False), "tensors": bench.blocks(synthetic=True)}, rounds, "stage 2"
    )
    head = take_turns({"features": bench.head(cached=True), "images": bench.head(cached=False)}, rounds, "stage 1")
    recipe, drawn = bench.recipe, f"{bench.stream.workers} worker draws"
    at, teacher = f"{recipe.image.size} px, 1 thread", recipe.teacher.model
    plain = f"the plain loop's rate: {recipe.student.model}, batch {recipe.student.batch}, {at}"
    return {
        "cached_student": _ratio(student["cached"], student["plain"], bound=2.5, note=f"{plain}, {teacher}, {drawn}"),
        "cached_student_processor_time": _processor_time(student["plain"], student["cached"]),
        "cached_student_no_worker": _ratio(student["cached"], student["alone"], note="the plain loop draws itself"),
        "cached_student_no_worker_processor_time": _processor_time(student["alone"], student["cached"]),
        "cached_student_larger_teacher": _ratio(
            larger["cached"], larger["plain"], bound=2.5, note=f"the same with {LARGER} as the teacher, {drawn}"
        ),
        "head_on_features": _ratio(
            head["features"],
            head["images"],
            bound=10,
            note=f"the rate on images: an epoch, {teacher}, {at}, {drawn}",
        ),
        "head_whole_stage": _whole_stage(bench, head),
        "views_against_tensors": _ratio(
            blocks["views"], blocks["tensors"], bound=0.9, note=f"{teacher}, all blocks, {at}, {drawn}"
        ),
        "views_against_tensors_processor_time": _processor_time(blocks["tensors"], blocks["views"]),
    }


def memory_figures(few: int, many: int) -> dict[str, Figure]:
    """Indexing, dividing and one epoch over a table of drawn images, each in a process of its own."""
    small, large = (_indexed(count) for count in (few, many))
    index = large["split_mb"] - large["before_mb"]
    grown = (large["epoch_mb"] - large["split_mb"]) - (small["epoch_mb"] - small["split_mb"])
    note = f"{many:,} images; indexed in {large['index_s']:.0f} s, divided in {large['split_s']:.0f} s"
    return {
        "index_peak_rss": Figure(
            value=large["split_mb"], unit="MB", bound=24_000, better="lower", note=note, spread=f"{index:.0f} MB of it"
        ),
        "epoch_rss_growth": Figure(
            value=grown, unit="MB", bound=20, better="lower", note=f"an epoch over {many:,} images against {few:,}"
        ),
    }


def gpu_figures() -> dict[str, Figure]:
    """Rates in half precision at 224 px, and their share of the rate on ready tensors."""
    names = {
        "gpu_teacher": "images/s",
        "gpu_teacher_against_tensors": "",
        "gpu_distill": "images/s",
        "gpu_cached_student": "x",
    }
    if not torch.cuda.is_available():
        return {name: Figure(value=None, unit=unit, note="no GPU here") for name, unit in names.items()}
    settings = ["run.device=cuda", "image.size=224", "student.model=mobilenetv3_large_100", "student.views=2"]
    bench = Bench(_recipe("gpu", *settings, "teacher.batch=64", "student.batch=64"), WORK / "gpu", steps=12)
    note = f"{torch.cuda.get_device_name()}, bf16, 224 px, batch 64, {bench.stream.workers} workers"
    blocks = take_turns(
        {"views": bench.blocks(synthetic=False), "tensors": bench.blocks(synthetic=True)}, 10, "GPU: stage 2"
    )
    student = take_turns({"cached": bench.student(), "plain": bench.student(bench.teacher)}, 10, "GPU: student")
    return {
        "gpu_teacher": _rate(blocks["views"], note=f"{bench.recipe.teacher.model}; {note}"),
        "gpu_teacher_against_tensors": _ratio(blocks["views"], blocks["tensors"], note=note),
        "gpu_distill": _rate(student["cached"], note=f"{bench.recipe.student.model}; {note}"),
        "gpu_cached_student": _ratio(student["cached"], student["plain"], note=note),
    }


def _whole_stage(bench: Bench, head: dict[str, list[Turn]]) -> Figure:
    """Stage 1 as a whole, from the measured rates: the features are made three times, the validation's once."""
    epochs, rounds = bench.recipe.teacher.head_epochs, 3
    features, images = (float(np.median(rates(head[side]))) for side in ("features", "images"))
    held_out = len(bench.split.validation) / len(bench.split.train)
    slow = epochs * (1 + held_out) / images
    fast = (rounds + held_out) / images + epochs * (1 + held_out) / features
    return Figure(
        value=slow / fast,
        unit="x",
        note=f"{epochs} epochs with their validation, the making of the features included; from the rates above",
    )


def _recipe(name: str, *settings: str) -> Recipe:
    return load_recipe(RECIPE, [f"run.name=benchmark-{name}", *settings])


def _indexed(count: int) -> dict[str, float]:
    """What `sides/indexing.py` says."""
    side = Path(__file__).parent / "sides" / "indexing.py"
    folder = WORK / "images"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, side, folder, str(count)], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _rate(turns: Sequence[Turn], note: str) -> Figure:
    return Figure(value=float(np.median(rates(turns))), unit="images/s", spread=_quartiles(rates(turns)), note=note)


def _ratio(ours: Sequence[Turn], other: Sequence[Turn], *, bound: float | None = None, note: str) -> Figure:
    """Ratio of the median rates."""
    one, two = rates(ours), rates(other)
    spread = f"{_quartiles(one)} / {_quartiles(two)} images/s"
    return Figure(value=float(np.median(one) / np.median(two)), unit="x", bound=bound, spread=spread, note=note)


def _processor_time(slow: Sequence[Turn], fast: Sequence[Turn]) -> Figure:
    """The same ratio in processor time of the training process, which other processes do not stretch."""
    one, two = ([1000 * turn.cpu_s / turn.images for turn in side] for side in (slow, fast))
    spread = f"{_quartiles(one)} / {_quartiles(two)} ms an image"
    return Figure(
        value=float(np.median(one) / np.median(two)),
        unit="x",
        spread=spread,
        note="the same in processor time of the training process, without its workers'",
    )


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3g} ({low:.3g}..{high:.3g})"


if __name__ == "__main__":
    main()
