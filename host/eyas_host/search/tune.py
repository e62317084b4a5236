"""Hyperparameter search: trials, full trainings of the best settings (finals), result."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import optuna
import torch
from rich.markup import escape

from eyas_device.support.interrupts import resumable
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import pick_device
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext
from eyas_host.search.finals import Final, FullTraining, full_student_training, full_teacher_training, train_final
from eyas_host.search.result import PAGE, RESULT, finals_table, make_result, shown_trials, write_result
from eyas_host.search.space import What, grid_size, own_settings, space, with_settings
from eyas_host.search.study import (
    Method,
    database_errors,
    digest,
    identity,
    make_pruner,
    make_sampler,
    open_study,
    without_password,
)
from eyas_host.search.trials import StudentTrials, TeacherTrials, Training, finished, ranked, search
from eyas_host.support.errors import TuneError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say, show
from eyas_host.train.view_cache import ViewCache

DATABASE = "study.db"


class SearchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a search; None stands for the recipe's `[tune]` value."""

    what: What = "teacher"
    """Which network's settings are searched."""
    method: Method = "grid"
    trials: int | None = None
    """Finished trials in all."""
    epochs: int | None = None
    """Epochs of a trial."""
    finals: int | None = None
    """How many of the best settings are trained in full."""
    final_epochs: int | None = None
    storage: str | None = None
    """Database URL; a SQLite file in the run by default."""
    name: str | None = None
    """Name of the study; `<run>-<what>-<method>` by default."""


def tune(context: RunContext, settings: SearchSettings, json: Path | None = None) -> None:
    """Search, train the best settings in full, and show and write the result (also to `json`).

    Raises:
        TuneError: the study is of another recipe, the database cannot be opened or read, or no trial finished.

    """
    root = context.root / "tune"
    root.mkdir(parents=True, exist_ok=True)
    url = settings.storage or f"sqlite:///{root / DATABASE}"
    with database_errors(url):
        _tune(context, settings, url, root, json)


def _tune(context: RunContext, settings: SearchSettings, url: str, root: Path, json: Path | None) -> None:
    what, method = settings.what, settings.method
    recipe = context.recipe
    pick_device(recipe.run.device)
    torch.set_num_threads(training_threads(recipe))
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings print tracebacks
    split = Split.load(context.root, recipe.image.preprocessing())
    values, length = space(recipe.tune, what), settings.epochs or recipe.tune.epochs
    wanted = settings.trials or (grid_size(values) if method == "grid" else recipe.tune.trials)
    wanted = min(wanted, grid_size(values)) if method == "grid" else wanted
    own = identity(recipe, split.manifest, what, method, length)
    study = open_study(
        url,
        settings.name or f"{recipe.run.name}-{what}-{method}",
        own,
        make_sampler(method, values, recipe.run.seed, own_settings(recipe, values)),
        make_pruner(method, recipe.tune, length),
    )
    work = root / re.sub(r"[^A-Za-z0-9._-]", "_", study.study_name)
    work.mkdir(exist_ok=True)
    done = finished(study)
    say(f"  study {escape(study.study_name)} in {escape(without_password(url))}: {done} of {wanted} trials finished")
    training, full = _trainings(context, what, split, own, work, trials=done < wanted)
    if training is not None:
        with resumable("finished trials are kept; the same command goes on with the others"):
            search(study, training, recipe, values, method=method, trials=wanted, epochs=length, work=work)
    best = ranked(study)
    if not best:
        raise TuneError(
            f"{without_password(url)}: no trial of {study.study_name} ran to its end; try lower rates or more trials"
        )
    chosen = best[: recipe.tune.finals if settings.finals is None else settings.finals]
    final_epochs = settings.final_epochs or recipe.tune.final_epochs
    finals: list[Final] = []
    for trial in chosen:
        values_tried = dict(trial.params)
        entrant = with_settings(recipe, values_tried | ({f"{what}.epochs": final_epochs} if final_epochs else {}))
        folder = work / f"final-{trial.number}-{digest(own, getattr(entrant, what))}"
        finals.append(train_final(full, entrant, split, trial.number, values_tried, folder))
    metric = recipe.run.selection_metric
    result = make_result(study, what=what, method=method, metric=metric, storage=without_password(url), finals=finals)
    write_result(result, study, work)
    if json is not None:
        write_bytes(json, (work / RESULT).read_bytes())
    show(shown_trials(result))
    if finals:
        show(finals_table(result))
    say(f"  {escape(str(work / PAGE))}")
    top = f"validation {metric} {max(f.value for f in finals) if finals else best[0].value:.3f}"
    say(f"[bold]tune[/bold]     {len(result.trials)} trials, {top}: {escape(result.overrides)}")


def _trainings(
    context: RunContext, what: What, split: Split, own: dict[str, object], work: Path, *, trials: bool
) -> tuple[Training | None, FullTraining]:
    """Functions that train a trial (None if no trial is left to run) and a final."""
    recipe = context.recipe
    if what == "student":
        cache = ViewCache(context.folder("distill"))
        return StudentTrials(split, cache) if trials else None, full_student_training(split, cache)
    if not trials:
        return None, full_teacher_training(split)
    head = work / f"head-{digest(own)}"
    return TeacherTrials(recipe, split, head.with_suffix(".pt"), head), full_teacher_training(split)
