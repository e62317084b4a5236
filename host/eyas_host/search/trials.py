"""The trials: short trainings of teacher or student with a trial's settings, evaluated on validation."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import optuna
import torch
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from eyas_host.data.split import Split
from eyas_host.models.factory import build_student, build_teacher, move
from eyas_host.recipe import Recipe
from eyas_host.search.space import Value, suggest_settings, with_settings
from eyas_host.search.study import SURPLUS, WORKER, Method, requeue_dead_trials, worker_id
from eyas_host.support.errors import TrainError
from eyas_host.support.files import exclusive_lock
from eyas_host.support.progress import meter
from eyas_host.train.checkpoint import read_checkpoint, save_tensors
from eyas_host.train.compiled import compiled
from eyas_host.train.engine import Hooks, Plan, fit
from eyas_host.train.progressive import side_of
from eyas_host.train.schedule import selection_value
from eyas_host.train.student import DistillationTask
from eyas_host.train.supervised import SupervisedTask
from eyas_host.train.teacher import train_teacher
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze
from eyas_host.train.view_cache import ViewCache

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
REPORTED_METRICS = ("balanced_accuracy", "auc")
SECONDS, WHY = "seconds", "why"
"""Further attributes of a trial: its duration, and why it ended early."""
_POLL_S = 1.0
"""Between two looks at what other workers do."""

EpochCallback = Callable[[dict[str, float]], None]
"""Receives the validation metrics of each epoch; raises `optuna.TrialPruned` to end the training."""


class Training(Protocol):
    """Trains with a trial's settings."""

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, on_epoch: EpochCallback) -> object:
        """`recipe` has the trial's settings; `checkpoint` is the path for checkpoints."""


class TeacherTrials:
    """Trains the teacher's blocks after a head that is trained once for all trials, with the recipe's own settings.

    `head` is the file of that head, written if missing; `work` is the folder for its training.
    """

    def __init__(self, recipe: Recipe, split: Split, head: Path, work: Path) -> None:
        self._task = SupervisedTask(recipe, split)
        with exclusive_lock(head.with_suffix(".lock")):
            weights = read_checkpoint(head)
            if weights is None:
                head_only = with_settings(recipe, {"teacher.epochs": 0})
                trained, _, _ = train_teacher(head_only, split, work)
                weights = trained.classifier.state_dict()
                save_tensors(head, weights)
                shutil.rmtree(work)
        torch.manual_seed(recipe.run.seed)
        model, _ = build_teacher(recipe.teacher, len(split.labels))
        model.classifier.load_state_dict(weights)
        self._model = move(model, self._task.device)
        self._initial_state = {name: value.clone() for name, value in self._model.state_dict().items()}

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, on_epoch: EpochCallback) -> object:
        """Train the trial's unfrozen blocks, all at once, as stage 2 of `eyas teach`."""
        task, model, settings = self._task, self._model, recipe.teacher
        task.recipe = recipe
        model.load_state_dict(self._initial_state)
        plan = Plan(
            title="trial",
            schedule=task.schedule(epochs, settings.patience),
            images=len(task.targets),
            batch=settings.batch,
            checkpoint=checkpoint,
        )
        forward = compiled(model, recipe.run.compile)
        return fit(
            model,
            unfreeze(model, msgspec.structs.replace(settings, unfreeze_by="once")),
            plan,
            steps=lambda epoch, first: task.steps(
                forward, epoch, first, side=side_of(epoch, settings.progressive, epochs, recipe.image.size)
            ),
            evaluate=_with_callback(task.evaluate, on_epoch),
            hooks=Hooks(prepare=freeze_batch_norm),
        )


class StudentTrials:
    """Trains the student on the view cache of `distill`."""

    def __init__(self, split: Split, cache: ViewCache) -> None:
        self._split = split
        self._cache = cache

    def __call__(self, recipe: Recipe, epochs: int, checkpoint: Path, on_epoch: EpochCallback) -> object:
        """Distil the student with a trial's settings."""
        task = _ReportingTask(recipe, self._split, self._cache)
        task.on_epoch = on_epoch
        torch.manual_seed(recipe.run.seed)
        model, _ = build_student(recipe.student, len(self._split.labels))
        return task.train(
            move(model, task.device),
            epochs=epochs,
            rate=recipe.student.rate,
            ema=recipe.student.ema,
            progressive=True,
            checkpoint=checkpoint,
            title="trial",
        )


class _ReportingTask(DistillationTask):
    """A distillation that reports the metrics of each epoch."""

    on_epoch: EpochCallback

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation metrics."""
        return _with_callback(super().evaluate, self.on_epoch)(model)


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
    """Run trials until the study has `trials` finished ones, including those of other workers.

    No more are begun than are missing: a worker without one waits until the others have finished theirs, or died. A
    trial whose training diverges or runs out of GPU memory is recorded as pruned.
    """

    def objective(trial: Trial) -> float:
        trial.set_user_attr(WORKER, worker_id())
        if _is_surplus(study, trial.number, trials):
            trial.set_user_attr(SURPLUS, True)
            raise _SurplusTrial
        started, best = time.monotonic(), -float("inf")
        settings = suggest_settings(trial, values, between=method == "tpe")
        checkpoint = work / f"trial-{trial.number}.ckpt"
        checkpoint.unlink(missing_ok=True)
        epoch = 0

        def on_epoch(metrics: dict[str, float]) -> None:
            nonlocal best, epoch
            epoch += 1
            value = selection_value(metrics, recipe.run.selection_metric)
            if value > best:
                best = value
                for name in REPORTED_METRICS:
                    trial.set_user_attr(name, metrics[name])
            trial.set_user_attr(SECONDS, round(time.monotonic() - started, 3))
            trial.report(value, epoch)
            if epoch < epochs and trial.should_prune():
                trial.set_user_attr(WHY, f"behind after epoch {epoch}")
                raise optuna.TrialPruned

        try:
            training(with_settings(recipe, settings), epochs, checkpoint, on_epoch)
        except TrainError as error:
            trial.set_user_attr(WHY, str(error))
            raise optuna.TrialPruned from None
        except torch.OutOfMemoryError:
            trial.set_user_attr(WHY, "out of GPU memory")
            raise optuna.TrialPruned from None
        finally:
            checkpoint.unlink(missing_ok=True)
        return best

    with meter("trials", trials, done=min(trials, finished(study))) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        while (before := finished(study)) < trials:
            requeue_dead_trials(study)
            if _is_needed(study, trials):
                with _unless_taken():
                    study.optimize(objective, n_trials=1, catch=(_SurplusTrial,))
            else:
                time.sleep(_POLL_S)
            for _ in range(finished(study) - before):
                bar.advance(_progress_text(study))


class _SurplusTrial(Exception):  # noqa: N818 - no error: the trial is not needed
    """Ends a trial that was begun for a place that another worker took at the same moment."""


@contextmanager
def _unless_taken() -> Iterator[None]:
    """Go on if a trial's heartbeat stopped for so long that another worker took it: its result does not count."""
    try:
        yield
    except UpdateFinishedTrialError:
        pass
    except ValueError as error:
        if not str(error).startswith("Cannot tell a"):  # what Optuna says of a trial that has ended already
            raise


def _is_needed(study: Study, trials: int) -> bool:
    """Whether a trial waits for a worker, or fewer than `trials` are finished or running."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return TrialState.WAITING in states or sum(state in (*DONE, TrialState.RUNNING) for state in states) < trials


def _is_surplus(study: Study, number: int, trials: int) -> bool:
    """Whether `trials` trials with smaller numbers are finished or running."""
    counted = study.get_trials(deepcopy=False, states=(*DONE, TrialState.RUNNING))
    return sum(trial.number < number for trial in counted) >= trials


def finished(study: Study) -> int:
    """Number of finished trials, pruned ones included."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def ranked(study: Study) -> list[FrozenTrial]:
    """Complete trials, best first; the earlier one on ties."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (-float(trial.value or 0.0), trial.number))


def _with_callback(
    evaluate: Callable[[nn.Module], dict[str, float]], on_epoch: EpochCallback
) -> Callable[[nn.Module], dict[str, float]]:
    """`evaluate`, with its metrics passed to `on_epoch`."""

    def evaluate_and_report(model: nn.Module) -> dict[str, float]:
        metrics = evaluate(model)
        on_epoch(metrics)
        return metrics

    return evaluate_and_report


def _progress_text(study: Study) -> str:
    best = ranked(study)
    return f"best so far: trial {best[0].number}, {best[0].value:.3f}" if best else ""
