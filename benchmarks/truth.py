"""Right answers where they are known: `python benchmarks/truth.py [--quick] [--json FILE]`.

- Losses, probabilities, thresholds by cost and intervals, on simulated data with a known truth.
- The split: who moves when images are added, and cameras that look at one thing all day.
- Images of 12 megapixels: the chain's memory, and what a view costs beside decoding.
- How long `verify` and `report` take for 10,000 images with a ResNet50 as teacher.

`--quick` (minutes) repeats simulations less often, and takes fewer images of 12 megapixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import quiet_first  # noqa: F401 - before the heavy imports
import simulations
from common import Figure, finish, ratio
from eyas_device.board.limits import usable_cores
from eyas_host.recipe.types import LossName
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.progress import track
from sides.evaluation_time import candidate, dataset_of, estimate, networks_like_a_run
from sides.known_truth import (
    black_frames,
    easy_temperature,
    fraction_of_test,
    line_camera,
    moved_test_images,
    rare_class_gap,
)
from sides.large_images import chain_memory, loader_rate, view_times

WORK = Path("runs/benchmark/truth")
LOSSES: tuple[LossName, ...] = ("cross_entropy", "bce", "focal")
EVALUATED = 10_000


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and images (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    before, quick = cpu_pressure(), arguments.quick
    parts: list[Callable[[], dict[str, Figure]]] = [
        loss_figures,
        lambda: probability_figures(repetitions=50 if quick else 400),
        lambda: interval_figures(draws=300 if quick else 2_000),
        lambda: split_figures(seeds=5 if quick else 50),
        lambda: evaluation_figures(WORK, measured=256 if quick else 1_000),
        lambda: large_image_figures(WORK, count=60 if quick else 1_000),
    ]
    figures: dict[str, Figure] = {}
    for part in track(parts, "truth"):
        figures |= part()
    finish(figures, before, arguments.json)


def loss_figures() -> dict[str, Figure]:
    """Balanced accuracy lost at 1 % defects, with class weights and label smoothing."""
    note = "below the best balanced accuracy; 1 % defects, two classes four standard deviations apart"
    return {
        f"rare_class_{loss}": Figure(value=rare_class_gap(loss), unit="", bound=0.01, better="lower", note=note)
        for loss in LOSSES
    }


def probability_figures(repetitions: int) -> dict[str, Figure]:
    """Cost above that of the Bayes decision, and the temperature of an easy set."""
    return {
        "unbalanced_cost": Figure(
            value=100 * simulations.unbalanced_cost(repetitions=max(10, repetitions // 10)),
            unit="%",
            bound=3,
            better="lower",
            note="above the Bayes decision; priors .90/.08/.02, a network trained with class weights, 2,000 images",
        ),
        "threshold_regret": Figure(
            value=100 * simulations.threshold_regret(repetitions=repetitions),
            unit="%",
            bound=3,
            better="lower",
            note=f"above the Bayes threshold of the same probabilities; 5 % defects, 400 images, {repetitions} draws",
        ),
        "temperature_of_an_easy_set": Figure(
            value=easy_temperature(400), unit="", bound=0.5, note="fitted on 400 images that are all predicted right"
        ),
    }


def interval_figures(draws: int) -> dict[str, Figure]:
    """How often 95 % intervals hold the truth; those of a rare label and of a loss may be wider than they need be."""
    groups = 100 * simulations.grouped_coverage(draws)
    figures = {
        "coverage_of_groups": Figure(
            value=abs(groups - 95),
            unit="points",
            bound=2,
            better="lower",
            spread=f"{groups:.1f} %",
            note=f"off 95 %; 50 groups of 10 images, intraclass correlation .2; {draws} draws",
        )
    }
    for name, coverage, note in (
        ("rare_label", simulations.rare_coverage, "1,000 images, 1 % of the rare label"),
        ("paired_bound", simulations.bound_coverage, "one-sided 95 % bound on a loss of .5 %, 400 images"),
    ):
        figures[f"coverage_of_a_{name}"] = Figure(
            value=100 * coverage(draws), unit="%", bound=93, note=f"{note}; {draws} draws"
        )
    return figures


def split_figures(seeds: int) -> dict[str, Figure]:
    """Stability of the split, and cameras that look at one thing."""
    figures = {}
    for more in (1, 20, 100):
        moved = [moved_test_images(2_000, more, every=2, seed=seed) for seed in range(seeds)]
        figures[f"moved_by_{more}_more"] = Figure(
            value=float(sum(moved)),
            unit="images",
            bound=0,
            better="lower",
            note=f"test images that leave the test set when {more} of 2,000 are added; {seeds} seeds",
        )
    rare = [moved_test_images(2_000, 20, every=100, seed=seed) for seed in range(seeds)]
    figures["moved_with_a_rare_class"] = Figure(
        value=float(sum(rare)),
        unit="images",
        bound=0,
        better="lower",
        note=f"as with 20 more; 1 % of the images in the rare class; {seeds} seeds",
    )
    cameras = {"fixed_camera": line_camera(400), "black_frames": black_frames(40)}
    for name, frames in cameras.items():
        figures[f"{name}_test_fraction"] = Figure(
            value=fraction_of_test(frames),
            unit="",
            bound=0.1,
            note="of the images that the default split gives to the test set (15 % are asked for); 0.1 at least",
        )
    return figures


def evaluation_figures(work: Path, measured: int) -> dict[str, Figure]:
    """Estimated duration of `verify` and `report`."""
    figures = {}
    for size in (128, 224):
        bundle = candidate(work / f"candidate-{size}", work, size)
        dataset = dataset_of(work / "evaluated", measured, size)
        found = estimate(EVALUATED, bundle, networks_like_a_run("resnet50", size), dataset)
        figures[f"verify_and_report_{size}px"] = Figure(
            value=found.wall,
            unit="min",
            bound=10,
            better="lower",
            spread=f"{found.idle:.1f} min of processor time over the cores; {found.parts}",
            note=f"{EVALUATED:,} validation and {EVALUATED:,} test images at {size} px, ResNet50 as teacher, estimated "
            f"from {measured}; {usable_cores()} cores",
        )
    return figures


def large_image_figures(work: Path, count: int) -> dict[str, Figure]:
    """Memory of the chain over 12-megapixel images, and what a view costs."""
    memory = chain_memory(work, count)
    stages = ", ".join(f"{stage} {peak / 1000:.2f}" for stage, peak in memory.stages.items())
    return {
        "chain_peak_memory_12mp": Figure(
            value=memory.peak / 1000,
            unit="GB",
            bound=3,
            better="lower",
            spread=f"as each stage reports it, pages that processes share counted twice: {stages}",
            note=f"{count} images of 12 megapixels; proportional set size of all processes, sampled",
        ),
        "view_against_decoding_12mp": ratio_of_views(work),
        "loader_640x480": Figure(
            value=loader_rate(work, 512),
            unit="images/s",
            note=f"augmented views at 128 px from JPEGs; {usable_cores()} cores",
        ),
    }


def ratio_of_views(work: Path) -> Figure:
    """An augmented view of a 12-megapixel JPEG, decoding included, against decoding alone."""
    drawing, decoding = view_times(work)
    figure = ratio(drawing, decoding)
    return Figure(
        value=float(np.median(drawing) / np.median(decoding)),
        unit="x",
        bound=2,
        better="lower",
        spread=figure.spread,
        note="an augmented 128 px view of a 12-megapixel JPEG against decoding it",
    )


if __name__ == "__main__":
    main()
