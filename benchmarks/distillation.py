"""Does distillation earn its time: `python benchmarks/distillation.py [--data SET] [--quick] [--json FILE]`.

The recipe's student, at full size throughout, beside others: from labels alone, in as many epochs and in as much time
as teacher and student take together; progressive resizing; a third of the learning rate; without features; DIST;
standardised logits; two teachers' mean answers; answers averaged over mirror images and turns; a patient schedule of
twice the views and three times the epochs; a teacher whose blocks are all trained. On the demonstration in five folds
(every image is predicted once, by networks that never saw it) or, with `--data fashion`, on a thousand images of
Fashion-MNIST (`apt-get install dataset-fashion-mnist`, or unpacked below `--root`) over three seeds.

Differences are those of pairs: both sides predict the same images. Their interval is Student's t over folds or seeds,
so that it holds for another training. Time is that of a processor. Two trainings run beside each other, each in one
process; all is resumable. `--quick` trains the first three ways on 600 images for two epochs, in a folder of its own;
`--finished` trains nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish, mean
from eyas_host.evaluation.metrics import auc, balanced_mean, softmax
from eyas_host.recipe import Recipe
from eyas_host.support.machine import cpu_pressure
from sides.distilled import (
    NEEDED,
    Fold,
    Way,
    make_fold_views,
    outcome_of,
    predictions,
    prepare_process,
    student_is_done,
    train_fold_student,
    train_fold_teacher,
    views_folder,
)
from sides.fashion import fashion_recipe

RUNS = Path("runs/benchmark/distillation")
DEMONSTRATION = Path("models/solar-cells/recipe.toml")
FOLDS, SEEDS = 5, 3
CLASSES = {"solar-cells": 2, "fashion": 10}
RECIPE, LABELS, EQUAL_TIME = "recipe", "labels", "labels-equal-time"


def ways(recipe: Recipe) -> dict[str, Way]:
    """The ways beside a recipe's own; the first three are always needed."""
    epochs, views, rate = recipe.student.epochs, recipe.student.views, recipe.student.rate
    patient = (f"student.epochs={3 * epochs}", f"student.views={2 * views}")
    longer = (f"student.epochs={round(2.2 * epochs)}",)
    return {
        RECIPE: Way("the recipe at full size: KL and features of the same views"),
        LABELS: Way("labels alone, as many epochs", teacher=None),
        EQUAL_TIME: Way("labels alone, as much time as teacher and student", longer, teacher=None),
        "gentle": Way("a third of the learning rate", (f"student.rate={rate / 3:g}",)),
        "larger-batch": Way("batches of twice the images", (f"student.batch={2 * recipe.student.batch}",)),
        "mixup": Way("half of the views blended with another image", ("augment.mixup=0.5",)),
        "cutmix": Way("half of the views with a patch of another image", ("augment.cutmix=0.5",)),
        "no-features": Way("no feature loss", ("student.feature_loss=0",)),
        "both-teachers": Way("two teachers' mean answers and both features", teacher="both"),
        "turned": Way("answers averaged over mirror images and turns", teacher="turned"),
        "dist": Way("DIST in place of KL", ("student.kd=dist",)),
        "standardised": Way("standardised logits", standardised=True, classes=3),
        "progressive-teacher": Way("a teacher with progressive resizing", teacher="progressive"),
        "whole-teacher": Way("a teacher of which all blocks are trained", teacher="whole"),
        "progressive": Way("half of the epochs on smaller views", ("student.progressive=0.5",)),
        "patient": Way("three times the epochs, twice the views", patient),
    }


class Step(NamedTuple):
    """Something to do in a process of its own, after others."""

    name: str
    do: Callable[..., None]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("solar-cells", "fashion"), default="solar-cells", help="which images")
    parser.add_argument("--quick", action="store_true", help="two epochs of three ways in one fold (minutes)")
    parser.add_argument("--finished", action="store_true", help="figures of what is finished; train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--folds", type=int, default=FOLDS, help=f"how many of the {FOLDS} folds (default all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds of Fashion-MNIST (default {SEEDS})")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="only these ways beside the first three")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where Debian's packages are unpacked")
    arguments = parser.parse_args()
    before = cpu_pressure()
    folds = _folds(parser, arguments)
    chosen = {
        key: way
        for number, (key, way) in enumerate(ways(folds[0].load()).items())
        if number < 3 or not (arguments.quick or (arguments.only and key not in arguments.only))
    }
    if not arguments.finished:
        _work(steps(folds, chosen, CLASSES[arguments.data]))
    figures = set_figures(arguments.data, folds, chosen)
    finish(figures, before, arguments.json)


def _folds(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Fold]:
    """The folds or seeds that are asked for; ends the program where Fashion-MNIST is not installed."""
    if arguments.data == "solar-cells":
        return _solar_cells(1 if arguments.quick else arguments.folds, quick=arguments.quick)
    if arguments.quick:
        parser.error("--quick is for solar cells")
    recipe = fashion_recipe(arguments.root, RUNS / "fashion")
    if recipe is None:
        parser.error("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    return _fashion(recipe, arguments.seeds)


def _solar_cells(folds: int, *, quick: bool) -> list[Fold]:
    """Folds of the demonstration; the quick ones train for two epochs."""
    own = ("teacher.epochs=1", "student.epochs=2", "student.views=2", "data.limit=600") if quick else ()
    prefix = "quick-" if quick else ""
    return [
        Fold(
            f"{prefix}solar-cells-fold{number}",
            DEMONSTRATION,
            (f"data.fold=[{number}, {FOLDS}]", *own),
            RUNS / f"{prefix}solar-cells-fold{number}",
        )
        for number in range(folds)
    ]


def _fashion(recipe: Path, seeds: int) -> list[Fold]:
    return [
        Fold(f"fashion-seed{seed}", recipe, (f"run.seed={seed}",), RUNS / f"fashion-seed{seed}")
        for seed in range(seeds)
    ]


def steps(folds: Sequence[Fold], chosen: dict[str, Way], classes: int) -> Iterator[Step]:
    """Teachers, views and students of each fold, in the order in which they are wanted."""
    for fold in folds:
        wanted = {
            key: way for key, way in chosen.items() if classes >= way.classes and not student_is_done(fold, key, way)
        }
        for teacher in dict.fromkeys(name for way in wanted.values() for name in NEEDED[way.teacher or "recipe"]):
            yield Step(f"{fold.name}: teacher {teacher}", train_fold_teacher, (fold, teacher))
        folders: dict[Path, str] = {}
        for key, way in wanted.items():
            teacher = way.teacher or "recipe"
            folder = views_folder(fold, teacher, way.settings)
            if folder not in folders:
                folders[folder] = f"{fold.name}: views {folder.name}"
                before = tuple(f"{fold.name}: teacher {own}" for own in NEEDED[teacher])
                yield Step(folders[folder], make_fold_views, (fold, teacher, way.settings), before)
            yield Step(f"{fold.name}: student {key}", train_fold_student, (fold, key, way), (folders[folder],))


def _work(todo: Iterator[Step]) -> None:
    """Do all steps, as many at once as there are cores; ends with the first that fails."""
    left, done, started = list(todo), set[str](), time.monotonic()
    count = len(left)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=prepare_process) as pool:
        running: dict[Future[None], Step] = {}
        while left or running:
            ready = [step for step in left if done.issuperset(step.after)]
            for step in ready[: (os.cpu_count() or 1) - len(running)]:
                left.remove(step)
                running[pool.submit(step.do, *step.arguments)] = step
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                done.add(running.pop(future).name)
            minutes = (time.monotonic() - started) / 60
            print(f"{len(done)} of {count} steps after {minutes:.1f} min; now {_names(running.values())}", flush=True)


def _names(running: Any) -> str:
    return ", ".join(step.name for step in running) or "nothing"


class Scored(NamedTuple):
    """Balanced accuracies and areas of one way, a value a fold."""

    accuracy: list[float]
    area: list[float]
    seconds: list[float]


def set_figures(name: str, folds: Sequence[Fold], chosen: dict[str, Way]) -> dict[str, Figure]:
    """Each way's accuracy in the folds in which it and the recipe's are finished, and its gain over labels alone."""
    figures: dict[str, Figure] = {}
    finished = [fold for fold in folds if outcome_of(fold, "students", RECIPE)]
    for trained in ("recipe", "progressive", "whole"):
        some = [fold for fold in finished if outcome_of(fold, "teachers", trained)]
        if some:
            scored = _scored(some, "teachers", trained)
            figures[f"{name}_teacher_{trained}"] = mean(scored.accuracy, note=_note(scored))
    for key, way in chosen.items():
        some = [fold for fold in finished if student_is_done(fold, key, way)]
        if not some:
            continue
        scored, teacher = _scored(some, "students", key), _scored(some, "teachers", "recipe")
        figures[f"{name}_{key}"] = mean(scored.accuracy, note=f"{way.title}; {_note(scored)}")
        if way.teacher is not None:
            share = [own / his for own, his in zip(scored.accuracy, teacher.accuracy, strict=True)]
            figures[f"{name}_{key}_share_of_teacher"] = mean(share, bound=0.97 if key == RECIPE else None)
        for other in _beside(key):
            if not all(outcome_of(fold, "students", other) for fold in some):
                continue
            beside = _scored(some, "students", other)
            gains = [100 * (own - his) for own, his in zip(scored.accuracy, beside.accuracy, strict=True)]
            figures[f"{name}_{key}_over_{other}"] = Figure(
                value=float(np.mean(gains)),
                unit="points",
                bound=1.0 if (key, other) == (RECIPE, EQUAL_TIME) else None,
                spread=", ".join(f"{gain:.1f}" for gain in gains),
                note=_interval(gains),
            )
    return figures


def _beside(key: str) -> tuple[str, ...]:
    """What a way is compared with."""
    if key in (LABELS, EQUAL_TIME):
        return ()
    return (EQUAL_TIME, LABELS) if key == RECIPE else (RECIPE,)


def _scored(folds: Sequence[Fold], kind: Any, name: str) -> Scored:
    accuracy, area, seconds = [], [], []
    for fold in folds:
        logits, targets = predictions(fold, kind, name)
        accuracy.append(balanced_mean(logits.argmax(1) == targets, targets))
        area.append(auc(softmax(logits), targets))
        outcome = outcome_of(fold, kind, name)
        seconds.append(outcome.processor_s if outcome else 0.0)
    return Scored(accuracy, area, seconds)


def _note(scored: Scored) -> str:
    return f"AUC {np.mean(scored.area):.3f}, {np.mean(scored.seconds) / 60:.1f} min of a processor each"


def _interval(gains: Sequence[float]) -> str:
    """95 % interval of the mean gain over trainings; folds share training images, so that it is somewhat narrow."""
    if len(gains) < 2:
        return "one training"
    low, high = ttest_1samp(gains, 0.0).confidence_interval(0.95)
    return f"95 % over {len(gains)} trainings: {low:.1f} to {high:.1f}"


if __name__ == "__main__":
    main()
