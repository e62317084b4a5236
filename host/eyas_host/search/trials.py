"""The trials: short trainings of the teacher or the student, each with settings of its own, judged on validation."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from eyas_host.data.split import Split
from eyas_host.models.factory import build_student, build_teacher, move
from eyas_host.recipe import Recipe
from eyas_host.search.space import Value, applied, draw
from eyas_host.search.study import WORKER, Method, put_back_dead, worker
from eyas_host.support.errors import TrainError
from eyas_host.support.files import exclusive_lock
from eyas_host.support.progress import meter
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.engine import fit
from eyas_host.train.schedule import selection_value
from eyas_host.train.student import DistillationTask
from eyas_host.train.supervised import SupervisedTask
from eyas_host.train.teacher import train_teacher
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze
from eyas_host.train.view_cache import ViewCache

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
FIGURES = ("balanced_accuracy", "auc")
SECONDS, WHY = "seconds", "why"
"""A trial's attributes beside `FIGURES`: how long it took, and why it ended before its time."""

Judge = Callable[[dict[str, float]], None]
"""Is told the validation figures of each epoch; raises `optuna.TrialPruned` to end the training."""


class Training(Protocol):
    """Trains with the settings of a trial."""

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, judge: Judge) -> object:
        """`recipe` has the trial's settings; `checkpoint` is where training may save itself."""


class TeacherTrials:
    """Trains the teacher's blocks behind a head that was trained once: a trial's settings do not change that stage.

    `head` is the file of that head, written if it is not there; `work` is for its training.
    """

    def __init__(self, recipe: Recipe, split: Split, head: Path, work: Path) -> None:
        self._lesson = SupervisedTask(recipe, split)
        with exclusive_lock(head.with_suffix(".lock")):
            if not head.exists():
                only_head = applied(recipe, {"teacher.epochs": 0})
                trained, _, _ = train_teacher(only_head, split, work)
                save_tensors(head, trained.classifier.state_dict())
                shutil.rmtree(work)
        torch.manual_seed(recipe.run.seed)
        model, _ = build_teacher(recipe.teacher, len(split.labels))
        model.classifier.load_state_dict(torch.load(head, map_location="cpu", weights_only=True))
        self._model = move(model, self._lesson.device)
        self._begin = {name: value.clone() for name, value in self._model.state_dict().items()}

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, judge: Judge) -> object:
        """Train the blocks that the trial opens, all at once."""
        task, model, settings = self._lesson, self._model, recipe.teacher
        task.recipe = recipe
        model.load_state_dict(self._begin)
        return fit(
            model,
            unfreeze(model, msgspec.structs.replace(settings, unfreeze_by="once")),
            steps=lambda epoch: task.steps(model, epoch, settings.batch),
            evaluate=_told(task.evaluate, judge),
            schedule=task.schedule(epochs),
            steps_per_epoch=task.steps_per_epoch(settings.batch),
            checkpoint=checkpoint,
            title="trial",
            prepare=freeze_batch_norm,
        )


class StudentTrials:
    """Trains the student on the views and teacher's answers that `distill` left."""

    def __init__(self, split: Split, cache: ViewCache) -> None:
        self._split = split
        self._cache = cache

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, judge: Judge) -> object:
        """Distil it again."""
        task = _JudgedLesson(recipe, self._split, self._cache)
        task.judge = judge
        torch.manual_seed(recipe.run.seed)
        model, _ = build_student(recipe.student, len(self._split.labels))
        return task.train(
            move(model, task.device),
            epochs=epochs,
            rate=recipe.student.rate,
            ema=recipe.student.ema,
            checkpoint=checkpoint,
            title="trial",
        )


class _JudgedLesson(DistillationTask):
    """A task whose epochs are judged by somebody else too."""

    judge: Judge

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on validation."""
        return _told(super().evaluate, self.judge)(model)


def search(
    study: Study,
    training: Training,
    recipe: Recipe,
    values: Mapping[str, list[Value]],
    *,
    method: Method,
    trials: int,
    epochs: int,
    work: Path,
) -> None:
    """Run trials until `trials` of them are finished in the study, whoever ran them.

    A training that gives no numbers or does not fit into the GPU's memory ends its trial as a pruned one.
    """

    def objective(trial: Trial) -> float:
        trial.set_user_attr(WORKER, worker())
        started, best = time.monotonic(), -float("inf")
        settings = draw(trial, values, between=method == "tpe")
        checkpoint = work / f"trial-{trial.number}.ckpt"
        checkpoint.unlink(missing_ok=True)
        told = 0

        def judge(figures: dict[str, float]) -> None:
            nonlocal best, told
            told += 1
            value = selection_value(figures, recipe.run.selection_metric)
            if value > best:
                best = value
                for name in FIGURES:
                    trial.set_user_attr(name, figures[name])
            trial.set_user_attr(SECONDS, round(time.monotonic() - started, 3))
            trial.report(value, told)
            if told < epochs and trial.should_prune():
                trial.set_user_attr(WHY, f"behind after epoch {told}")
                raise optuna.TrialPruned

        try:
            training(applied(recipe, settings), epochs, checkpoint, judge)
        except TrainError as error:
            trial.set_user_attr(WHY, str(error))
            raise optuna.TrialPruned from None
        except torch.OutOfMemoryError:
            trial.set_user_attr(WHY, "the GPU's memory is too small for it")
            raise optuna.TrialPruned from None
        finally:
            checkpoint.unlink(missing_ok=True)
        return best

    with meter("trials", trials, done=min(trials, finished(study))) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        while (before := finished(study)) < trials:
            put_back_dead(study)
            study.optimize(objective, n_trials=1)
            for _ in range(finished(study) - before):
                bar.advance(_words(study))


def finished(study: Study) -> int:
    """Trials that ended, pruned ones included."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def ranked(study: Study) -> list[FrozenTrial]:
    """The trials that ran to their end, the best first; of equal ones the earlier."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (-float(trial.value or 0.0), trial.number))


def _told(evaluate: Callable[[nn.Module], dict[str, float]], judge: Judge) -> Callable[[nn.Module], dict[str, float]]:
    """The same evaluation, whose figures `judge` hears of."""

    def told(model: nn.Module) -> dict[str, float]:
        figures = evaluate(model)
        judge(figures)
        return figures

    return told


def _words(study: Study) -> str:
    best = ranked(study)
    return f"best so far: trial {best[0].number}, {best[0].value:.3f}" if best else ""
