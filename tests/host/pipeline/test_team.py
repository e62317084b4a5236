"""Processes that a command starts by itself: they train the weights of one, and none outlives another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from eyas_host.pipeline import distributed, team
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import StageError
from tests.support.fleet_parts import wait_until
from tests.support.inside import eyas
from tests.support.shapes import draw_folder

RECIPE = """
[run]
name = "toy"
device = "cpu"
workers = 0
threads = 1
trackers = []
[data]
path = "images"
[image]
size = 32
[teacher]
model = "mobilenetv3_small_050"
weights = "random"
head_epochs = 2
epochs = {epochs}
patience = 99
batch = 9
unfreeze = "3"
[student]
model = "mobilenetv3_small_050"
weights = "random"
views = 3
epochs = 1
batch = 8
[prune]
epochs = 1
keep = 0.7
[quantize]
epochs = 2
calibration = 8
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with images and a recipe."""
    draw_folder(tmp_path / "images", count=11, width=40, height=36, labels=("ring", "square", "cross"))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(epochs=2))
    return tmp_path


def facts(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "stage.json").read_bytes())["facts"]["histories"]


def assert_same_losses(one: dict[str, Any], two: dict[str, Any], *, metrics: float = 1e-4) -> None:
    for title, history in one.items():
        for epoch, other in zip(history, two[title], strict=True):
            assert other["loss"] == pytest.approx(epoch["loss"], abs=1e-5)
            assert other["metrics"] == pytest.approx(epoch["metrics"], abs=metrics)


def test_two_processes_teach_predict_and_quantize_as_one(place: Path) -> None:
    """BatchNorm is frozen in the teacher and folded in the int8 student: both get the weights of one process.

    The cached views of one teacher are equal to the byte, whichever process wrote them.
    """
    done = eyas(place, "qat", "recipe.toml", "--runs", "two", "--set", "run.processes=2")
    assert done.code == 0, done.err
    two, again = place / "two/toy", shutil.copytree(place / "two", place / "again") / "toy"
    assert eyas(place, "teach", "recipe.toml", "--runs", "one").code == 0
    assert_same_losses(facts(place / "one/toy", "teach"), facts(two, "teach"))
    assert_same_weights(place / "one/toy/teach/teacher.pt", two / "teach/teacher.pt", 1e-5)

    for stage in ("qat", "distill"):
        done = eyas(place, "distill", "recipe.toml", "--runs", "again", "--only", stage, "--set", "run.processes=1")
        assert done.code == 0, done.err
    # a value between two steps of int8 may become either in batches of another size, as two processes predict them
    assert_same_losses(facts(two, "qat"), facts(again, "qat"), metrics=5e-3)
    assert_same_weights(two / "qat/qat.pt", again / "qat/qat.pt", 1e-4)
    files = sorted(path.name for path in (two / "distill").glob("view-*"))
    assert len(files) == 3 * 4
    for name in files:
        assert (two / "distill" / name).read_bytes() == (again / "distill" / name).read_bytes(), name


def assert_same_weights(one: Path, two: Path, tolerance: float) -> None:
    expected, found = (torch.load(path, weights_only=True) for path in (one, two))
    assert set(expected) == set(found)
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), atol=tolerance, rtol=tolerance), name


class Training:
    """A command that trains for long, and its companion."""

    def __init__(self, place: Path) -> None:
        (place / "recipe.toml").write_text(RECIPE.format(epochs=100_000))
        command = [sys.executable, "-m", "eyas_host", "teach", "recipe.toml", "--set", "run.processes=2"]
        self.place = place
        self.main = subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.companion = 0

    def wait_for_epochs(self) -> None:
        """Wait until both train the blocks."""
        assert self.main.stderr is not None
        checkpoint, deadline = self.place / "runs/toy/teach/blocks.ckpt", time.monotonic() + 200
        while not checkpoint.exists():
            assert self.main.poll() is None and time.monotonic() < deadline, self.main.stderr.read()
            time.sleep(0.2)
        children = Path(f"/proc/{self.main.pid}/task/{self.main.pid}/children").read_text().split()
        (self.companion,) = (int(pid) for pid in children if team.COMPANION in command_line(int(pid)))

    def end(self) -> str:
        """What it printed; both are gone."""
        output = self.main.communicate(timeout=60)[1]
        deadline = time.monotonic() + 10
        while command_line(self.companion) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not command_line(self.companion)
        return output


def command_line(pid: int) -> str:
    """Command line of a process that runs; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


@pytest.fixture
def training(place: Path) -> Iterator[Training]:
    started = Training(place)
    yield started
    if started.main.poll() is None:
        started.main.kill()
        started.main.wait()


@pytest.mark.parametrize("how", ["companion", "main", "interrupt"])
def test_no_process_outlives_or_waits_for_one_that_was_killed(training: Training, how: str) -> None:
    training.wait_for_epochs()
    if how == "companion":
        os.kill(training.companion, signal.SIGKILL)
        output = training.end()
        assert training.main.returncode == 2
        assert "a training process ended (killed: too little memory?); [run] processes = 1 needs less" in output
        assert "Traceback" not in output
    elif how == "main":
        training.main.kill()
        training.end()
    else:
        os.killpg(training.main.pid, signal.SIGINT)  # as a terminal does
        output = training.end()
        assert training.main.returncode == 130
        assert "goes on where it was" in output and "Traceback" not in output


def test_processes_meet_also_where_temporary_files_have_long_paths(place: Path) -> None:
    longer = place / ("deep-" * 24)
    longer.mkdir()
    command = [sys.executable, "-m", "eyas_host", "teach", "recipe.toml", "--set", "run.processes=2"]
    environment = os.environ | {"TMPDIR": str(longer)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(longer.iterdir())


@pytest.mark.parametrize("how", ["no recipe", "killed while the main process does something else"])
def test_a_companion_that_ends_before_it_has_joined_ends_the_command(place: Path, how: str) -> None:
    """A team of three, which would wait for it for ever; what is said is its own last line."""
    if how == "no recipe":
        reason = pytest.raises(StageError, match=r"a training process ended \(FileNotFoundError: .*recipe.json")
    else:
        reason = pytest.raises(StageError, match=r"a training process ended \(killed: .* processes = 2 needs less")
        recipe = Recipe(run=RunSection(name="toy", device="cpu"), data=DataSection(path="x"))
        (place / "recipe.json").write_bytes(msgspec.json.encode(recipe))
    with reason, team.Team(3, place) as three:
        three.start()
        folder = three._folder
        if how != "no recipe":
            files = [team.ready_file(three._folder, rank) for rank in (1, 2)]
            wait_until(lambda: all(file.exists() for file in files), 200, "both")
            three._companions[1].kill()
            three._companions[1].wait()
        with three.together():
            raise AssertionError("they trained")
    assert distributed.world_size() == 1 and not folder.exists()


def test_on_a_gpu_several_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, count in (("cpu", 3), ("auto", 0), ("cuda", 0)):
        run = RunSection(name="toy", device=device, processes=3)  # type: ignore[arg-type]
        recipe = Recipe(run=run, data=DataSection(path="x"))
        if count:
            assert team.training_processes(recipe) == count
        else:
            with pytest.raises(StageError, match="they share the batches on a processor"):
                team.training_processes(recipe)


@pytest.mark.parametrize(
    ("settings", "size", "cores", "memory", "count"),
    [
        ({}, 128, 2, 8e9, 2),
        ({}, 128, 1, 8e9, 1),
        ({}, 128, 8, 64e9, 2),  # a batch of 32 gives two shards of 16
        ({}, 128, 2, 3e9, 1),
        ({}, 224, 2, 8e9, 1),  # larger images use more threads instead
        ({"threads": 2}, 128, 2, 8e9, 1),
        ({"processes": 3}, 224, 2, 1e9, 3),  # as asked
    ],
)
def test_how_many_processes_train(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], size: int, cores: int, memory: float, count: int
) -> None:
    monkeypatch.setattr(team, "usable_cores", lambda: cores)
    monkeypatch.setattr(team, "usable_memory", lambda: memory)
    recipe = Recipe(
        run=RunSection(name="toy", device="cpu", **settings), data=DataSection(path="x"), image=ImageSection(size=size)
    )
    assert team.training_processes(recipe) == count
