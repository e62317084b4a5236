"""Trials whose process died are found by one clock, whatever the machines' time zones."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from eyas_host.search import study as study_module
from eyas_host.search.study import WORKER, requeue_dead_trials, worker_id
from eyas_host.support.errors import TuneError


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


def test_a_process_that_ended_and_was_not_waited_for_is_dead(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    with subprocess.Popen(["sleep", "60"]) as process:
        started = study_module._start_time(process.pid)
        study.ask().set_user_attr(WORKER, f"{socket.gethostname()} {process.pid} {started}")
        assert started and requeue_dead_trials(study) == 0
        process.kill()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert requeue_dead_trials(study) == 1


def damaged(kind: str, data: bytes) -> bytes:
    page = 4096
    return {
        "cut to a half": data[: len(data) // 2],
        "cut within the header": data[:50],
        "zeros": bytes(len(data)),
        "text": b"no database\n" * 400,
        "zero pages": data[:page] + bytes(page * 3) + data[page * 4 :],
        "noise": data[:200] + np.random.default_rng(0).bytes(len(data) - 200),
    }[kind]


@pytest.mark.parametrize("kind", ["cut to a half", "cut within the header", "zeros", "text", "zero pages", "noise"])
def test_a_damaged_database_is_one_line_with_what_to_do(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    url = f"sqlite:///{path}"

    def opened() -> optuna.Study:
        return study_module.open_study(url, "name", {"a": 1}, RandomSampler(), NopPruner())

    study = opened()
    for _ in range(3):
        study.add_trial(optuna.create_trial(value=0.5))
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(TuneError) as caught, study_module.database_errors(url):
        opened().get_trials()
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1
    assert "remove it to begin the search again" in message


def test_an_empty_file_is_a_new_study(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    study = study_module.open_study(f"sqlite:///{path}", "name", {"a": 1}, RandomSampler(), NopPruner())
    assert study.get_trials() == []
