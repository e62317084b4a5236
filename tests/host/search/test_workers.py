"""Four workers of one study on a real PostgreSQL: every trial once, no more than asked for, and a killed one again."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.study import Study
from optuna.trial import TrialState

from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.search import study as study_module
from eyas_host.search import trials as trials_module
from eyas_host.search.study import SURPLUS, WORKER, Method, make_sampler, open_study, requeue_dead_trials, worker_id
from eyas_host.search.trials import search
from tests.support.postgres import PostgresServer, postgres  # noqa: F401 - a fixture

# two tests begin trials by hand
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
VALUES: dict[str, list[Any]] = {"teacher.rate": [1e-4, 1e-3, 1e-2], "teacher.batch": [8, 16, 32]}
WORKERS = 4


def opened(url: str, method: Method) -> Study:
    first = {"teacher.rate": 2e-3, "teacher.batch": 16}
    return open_study(url, "study", {"a": 1}, make_sampler(method, VALUES, 0, first), NopPruner())


def work(url: str, method: Method, trials: int, folder: Path) -> None:
    """What a worker does. The first that trains a batch of 32 is killed in the middle of it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def training(recipe: Recipe, epochs: int, checkpoint: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
        for epoch in range(epochs):
            on_epoch({"combined": recipe.teacher.rate, "balanced_accuracy": 0.5, "auc": 0.5})
            if epoch == 0 and recipe.teacher.batch == 32:
                try:
                    (folder / "killed").mkdir()
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)

    recipe = Recipe(run=RunSection(name="toy"))
    study = opened(url, method)
    search(study, training, recipe, VALUES, method=method, trials=trials, epochs=2, work=folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials_module, "_POLL_S", 0.1)
    monkeypatch.setattr(study_module, "_POLL_S", 0.05)


@pytest.mark.parametrize(("method", "trials"), [("grid", 9), ("tpe", 14)])
def test_four_workers_share_a_study(
    postgres: PostgresServer,  # noqa: F811
    tmp_path: Path,
    method: Method,
    trials: int,
) -> None:
    url = postgres.create_database()
    context = multiprocessing.get_context("fork")  # nothing is imported again
    workers = [context.Process(target=work, args=(url, method, trials, tmp_path)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(250)
    finally:
        for worker in workers:
            worker.kill()
    assert Counter(worker.exitcode for worker in workers) == {0: WORKERS - 1, -signal.SIGKILL: 1}

    found = opened(url, method).get_trials()
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    failed = [trial for trial in found if trial.state == TrialState.FAIL and SURPLUS not in trial.user_attrs]
    assert len(complete) == trials and not [trial for trial in found if not trial.state.is_finished()]
    settings = [(trial.params["teacher.rate"], trial.params["teacher.batch"]) for trial in complete]
    assert len(set(settings)) == trials, "no trial is doubled"
    if method == "grid":
        assert set(settings) == set(itertools.product(*VALUES.values()))
    else:
        assert (2e-3, 16) in settings and found[0].params == {"teacher.rate": 2e-3, "teacher.batch": 16}
    (killed,) = failed
    (again,) = [trial for trial in complete if trial.system_attrs.get("failed_trial") == killed.number]
    assert again.params == killed.params and killed.params["teacher.batch"] == 32
    assert again.user_attrs[WORKER] != killed.user_attrs[WORKER]


def test_a_requeued_trial_is_not_taken_for_dead_before_its_worker_says_who_it_is(
    postgres: PostgresServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study_module, "_WORKER_ID_GRACE_S", 0.3)
    study = opened(postgres.create_database(), "tpe")
    dead = study.ask()
    dead.set_user_attr(WORKER, worker_id().rpartition(" ")[0] + " 1")
    assert [requeue_dead_trials(study) for _ in range(2)] == [1, 0]
    again = study.ask()
    assert again.number == 1 and WORKER not in again.user_attrs
    again.set_user_attr(WORKER, worker_id())
    assert requeue_dead_trials(study) == 0


def test_two_workers_that_find_one_dead_trial_requeue_it_once(
    postgres: PostgresServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = postgres.create_database()
    one, other = opened(url, "grid"), opened(url, "grid")
    one.ask().set_user_attr(WORKER, worker_id().rpartition(" ")[0] + " 1")
    seen = study_module._running_trials(other)
    assert requeue_dead_trials(one) == 1
    monkeypatch.setattr(study_module, "_running_trials", lambda _: seen)
    assert requeue_dead_trials(other) == 0
    assert [trial.state for trial in one.get_trials()] == [TrialState.FAIL, TrialState.WAITING]


def test_the_address_needs_no_driver_s_name(postgres: PostgresServer) -> None:  # noqa: F811
    url = postgres.create_database()
    assert url.startswith("postgresql://")
    assert opened(url, "grid").study_name == "study"
    assert opened(url.replace("postgresql://", "postgresql+psycopg://"), "grid").study_name == "study"
