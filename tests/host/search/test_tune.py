"""`eyas tune` from outside: grid and TPE, killed and gone on with, refused for another recipe, never the test part."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import msgspec
import optuna
import pytest
import torch

from eyas_host.data.split import Split
from eyas_host.recipe.load import load_recipe
from eyas_host.search.result import TuneResult
from eyas_host.support.errors import TrainError
from eyas_host.train.teacher import train_teacher
from tests.support.inside import Done, eyas
from tests.support.shapes import SHAPES, draw_folder

EYAS = Path(sys.executable).with_name("eyas")
RATES, UNFREEZE = (1e-3, 1e-2), ("2", "all")
RECIPE = """
[run]
name = "toy"
threads = 1
device = "cpu"
workers = 0
trackers = []
[data]
path = "images"
[image]
size = 32
[teacher]
model = "mobilenetv3_small_050"
weights = "random"
head_epochs = 2
epochs = 2
batch = 16
accumulate = 2
[student]
model = "mobilenetv3_small_050"
weights = "random"
views = 1
epochs = 1
batch = 16
[tune]
rates = [1e-3, 1e-2]
batches = [16]
unfreeze = ["2", "all"]
epochs = 2
finals = 2
final_epochs = 1
"""


def tune(place: Path, *words: object) -> Done:
    return eyas(place, "tune", "recipe.toml", *words)


def result(place: Path, study: str = "toy-teacher-grid") -> TuneResult:
    path = place / "runs/toy/tune" / study / "result.json"
    return msgspec.json.decode(path.read_bytes(), type=TuneResult)


def make_place(place: Path) -> Path:
    draw_folder(place / "images", count=16, labels=SHAPES[:3])
    (place / "recipe.toml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder whose grid of four is searched. Not to be changed by a test."""
    place = make_place(tmp_path_factory.mktemp("tune"))
    done = tune(place, "--json", "figures.json")
    assert done.code == 0, done.err
    return place, done


@pytest.fixture
def place(searched: tuple[Path, Done], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched[0], tmp_path / "copy"))


def test_the_grid_is_every_combination_and_the_best_are_trained_in_full(searched: tuple[Path, Done]) -> None:
    place, done = searched
    found = result(place)
    tried = {(line.settings["teacher.rate"], line.settings["teacher.unfreeze"]) for line in found.trials}
    assert tried == set(product(RATES, UNFREEZE)) and len(found.trials) == 4
    assert all(not line.pruned and line.epochs == 2 for line in found.trials)
    best_two = sorted(found.trials, key=lambda line: (-(line.value or 0), line.trial))[:2]
    assert {final.trial for final in found.finals} == {line.trial for line in best_two}
    assert found.finals[0].value >= found.finals[1].value and found.finals[0].epochs == 1
    assert found.best == found.finals[0].settings
    assert done.err.splitlines()[-1].startswith("tune") and found.overrides in done.err.splitlines()[-1]
    assert "trained in full" in done.out
    assert Split.load(place / "runs/toy").test_accesses() == []
    assert (place / "figures.json").read_bytes() == (place / "runs/toy/tune/toy-teacher-grid/result.json").read_bytes()


def test_the_result_can_be_taken_as_words_and_as_toml(searched: tuple[Path, Done]) -> None:
    place, _ = searched
    found = result(place)
    words = [word for word in shlex.split(found.overrides) if word != "--set"]
    teacher = load_recipe(place / "recipe.toml", words).teacher
    assert (teacher.rate, teacher.unfreeze) == (found.best["teacher.rate"], found.best["teacher.unfreeze"])
    snippet = (place / "runs/toy/tune/toy-teacher-grid/best.toml").read_text()
    assert msgspec.toml.decode(snippet)["teacher"] == {key.partition(".")[2]: v for key, v in found.best.items()}


def test_the_page_has_tables_and_plots(searched: tuple[Path, Done]) -> None:
    page = (searched[0] / "runs/toy/tune/toy-teacher-grid/tune.html").read_text()
    assert page.count('src="data:image/png;base64,iVBOR') in (3, 4)  # importance only where the trials differ
    assert page.count("<tr>") == 4 + 1 + 2 + 1 and "http" not in page


def test_a_trial_is_the_teacher_s_own_training(searched: tuple[Path, Done], tmp_path: Path) -> None:
    place, _ = searched
    line = next(line for line in result(place).trials if line.settings["teacher.unfreeze"] == "2")
    words = [f"teacher.rate={line.settings['teacher.rate']}", 'teacher.unfreeze="2"']
    recipe = load_recipe(place / "recipe.toml", words)
    split = Split.load(place / "runs/toy", recipe.image.preprocessing())
    _, _, histories = train_teacher(recipe, split, tmp_path)
    reached = max(epoch.metrics["combined"] for epoch in histories["blocks"])
    assert len(split.train) % recipe.teacher.batch > 0 and line.value == pytest.approx(reached, abs=1e-6)


def test_a_second_search_trains_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("eyas_host.search.tune.search", never)
    monkeypatch.setattr("eyas_host.search.finals.train_teacher", never)
    before = result(place)
    done = tune(place)
    assert done.code == 0 and "4 of 4 trials finished" in done.err
    assert result(place) == before


def test_a_killed_search_goes_on_and_tries_its_last_trial_again(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    words = ("--epochs", "6", "--finals", "0", "--set", 'tune.unfreeze=["all"]')
    process = subprocess.Popen([EYAS, "tune", "recipe.toml", *words], cwd=place, stderr=subprocess.DEVNULL)
    database = f"file:{place}/runs/toy/tune/study.db?mode=ro"
    deadline = time.monotonic() + 100

    def asked(query: str) -> list[str]:
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(database, uri=True)) as connection,
        ):
            return [value for (value,) in connection.execute(query)]
        return []

    def states() -> list[str]:
        return asked("select state from trials order by number")

    def workers() -> list[str]:
        return asked("select trial_id from trial_user_attributes where key = 'worker'")

    while (len(workers()), states()) != (2, ["COMPLETE", "RUNNING"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert states() == ["COMPLETE", "RUNNING"]
    done = tune(place, "--yes", *words)
    assert done.code == 0 and "1 of 2 trials finished" in done.err
    found = result(place)
    assert found.put_back == 1 and states().count("FAIL") == 1 and "RUNNING" not in states()
    tried = [(line.settings["teacher.rate"], line.settings["teacher.unfreeze"]) for line in found.trials]
    assert sorted(tried) == sorted(product(RATES, ("all",)))  # each once, that of the killed trial too


def test_tpe_begins_with_the_recipe_s_settings_and_ends_trials_early(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = iter(range(1000, 0, -1))  # each epoch worse than all before
    monkeypatch.setattr(
        "eyas_host.train.supervised.validation_metrics",
        lambda *_: {"combined": float(next(reached)), "balanced_accuracy": 0.5, "auc": 0.5, "loss": 1.0},
    )
    done = tune(place, "--method", "tpe", "--trials", 7, "--finals", 0)
    assert done.code == 0, done.err
    found = result(place, "toy-teacher-tpe")
    assert len(found.trials) == 7
    assert found.trials[0].settings == {"teacher.rate": 1e-3, "teacher.batch": 16, "teacher.unfreeze": "all"}
    assert [line.pruned for line in found.trials] == [False] * 4 + [True] * 3
    assert all(line.epochs == 1 and "behind after epoch 1" in line.why for line in found.trials[4:])
    rates = [float(line.settings["teacher.rate"]) for line in found.trials]
    assert len(set(rates)) == 7 and all(RATES[0] <= rate <= RATES[1] for rate in rates)


def test_tpe_proposes_the_same_when_it_is_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.search.trials.TeacherTrials.__call__", lambda _, r, e, c, judge: judge(FLAT))
    assert tune(place, "--method", "tpe", "--trials", 6, "--finals", 0, "--name", "whole").code == 0
    for count in (2, 6):
        assert tune(place, "--method", "tpe", "--trials", count, "--finals", 0, "--name", "pieces").code == 0
    whole, pieces = result(place, "whole").trials, result(place, "pieces").trials
    assert [line.settings for line in whole] == [line.settings for line in pieces]


FLAT = {"combined": 1.0, "balanced_accuracy": 0.5, "auc": 0.5, "loss": 1.0}


def test_a_trial_without_numbers_is_reported_and_stops_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(_: object, recipe: object, epochs: int, checkpoint: object, judge: object) -> None:
        if recipe.teacher.rate == RATES[1]:  # type: ignore[attr-defined]
            raise TrainError("the loss is nan")
        judge(FLAT)  # type: ignore[operator]

    monkeypatch.setattr("eyas_host.search.trials.TeacherTrials.__call__", training)
    done = tune(place, "--name", "nan", "--finals", 0)
    assert done.code == 0, done.err
    found = result(place, "nan")
    assert sorted(line.why for line in found.trials) == ["", "", "the loss is nan", "the loss is nan"]
    assert found.best["teacher.rate"] == RATES[0]
    done = tune(place, "--name", "all-nan", "--finals", 0, "--set", "tune.rates=[0.01]")
    assert done.code == 2 and "no trial of all-nan ran to its end" in done.err


def test_the_student_is_tuned_on_cached_views(place: Path) -> None:
    lists = (
        "--set",
        "tune.student_rates=[1e-3]",
        "--set",
        "tune.kd_ratios=[0.5,1.0]",
        "--set",
        "tune.temperatures=[2.0]",
    )
    done = tune(place, "--what", "student", "--epochs", 1, "--finals", 1, *lists)
    assert done.code == 0, done.err
    found = result(place, "toy-student-grid")
    assert sorted(line.settings["student.kd_ratio"] for line in found.trials) == [0.5, 1.0]
    assert found.finals[0].settings == found.best and found.toml.startswith("[student]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "image.size=64"), ("belongs to another recipe", "image.size: 32 in the study, 64 now", "--name")),
        (("--set", "run.seed=1"), ("belongs to another recipe", "run.seed")),
        (("--epochs", "1"), ("belongs to another recipe", "epochs of a trial: 2 in the study, 1 now")),
        (("--set", "tune.rates=[1e-3]"), ("belongs to another recipe", "values of teacher.rate")),
        (("--trials", "0"), ("--trials",)),
        (("--epochs", "0"), ("--epochs",)),
        (("--method", "random"), ("--method", "grid", "tpe")),
        (("--storage", "sqlite:////nowhere/at/all.db"), ("cannot be opened", "sqlite:////nowhere/at/all.db")),
        (("--storage", "sqlite:///images/circle/000.png"), ("cannot be opened", "not a database")),
        (("--storage", "no address"), ("cannot be opened",)),
        (("--storage", "mysql+nodriver://me:secret@db/eyas"), ("mysql",)),
        (("--set", "tune.rates=[]"), ("[tune] rates",)),
        (("--set", "run.device=cuda"), ("torch finds no GPU",)),
    ],
)
def test_mistakes(place: Path, words: tuple[str, ...], message: tuple[str, ...]) -> None:
    if "cuda" in words[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = result(place)
    done = tune(place, "--yes", *words)
    assert done.code == 2 and all(word in done.err for word in message), done.err
    assert "secret" not in done.err and "Traceback" not in done.err
    assert sum(line.startswith("eyas: ") for line in done.err.splitlines()) == (words not in USAGE)
    assert result(place) == before
    assert len(optuna.load_study(study_name="toy-teacher-grid", storage=STORE.format(place)).trials) == 4


USAGE = (("--trials", "0"), ("--epochs", "0"), ("--method", "random"))
STORE = "sqlite:///{}/runs/toy/tune/study.db"
