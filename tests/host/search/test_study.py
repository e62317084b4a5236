"""Trials whose process died are found by one clock, whatever the machines' time zones."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from eyas_host.search import study as study_module
from eyas_host.search.study import WORKER, requeue_dead_trials, worker_id


@pytest.mark.parametrize("hours", [-9, 0, 9])
@pytest.mark.parametrize("alive", [True, False])
def test_a_new_trial_has_time_to_record_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int, alive: bool
) -> None:
    """It began on a machine whose clock is `hours` behind or ahead; a living one records its id a little later."""
    monkeypatch.setattr(study_module, "_WORKER_ID_GRACE_S", 3.0 if alive else 0.3)
    monkeypatch.setattr(study_module, "_POLL_S", 0.02)
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    started = datetime.now() + timedelta(hours=hours)
    template = optuna.trial.FrozenTrial(
        number=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=started,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=-1,
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=template)

    def record() -> None:
        time.sleep(0.2)
        study._storage.set_trial_user_attr(trial_id, WORKER, worker_id())

    thread = threading.Thread(target=record if alive else lambda: None)
    thread.start()
    assert requeue_dead_trials(study) == (0 if alive else 1)
    thread.join()
    states = [trial.state for trial in study.get_trials()]
    assert states == ([TrialState.RUNNING] if alive else [TrialState.FAIL, TrialState.WAITING])


def test_a_trial_of_a_process_that_ended_is_tried_again(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    for worker in (worker_id(), f"{socket.gethostname()} {os.getpid()} 1", f"another-machine {os.getpid()} 1"):
        study.ask().set_user_attr(WORKER, worker)
    assert requeue_dead_trials(study) == 1
    assert study.get_trials()[1].state == TrialState.FAIL
