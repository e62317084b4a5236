"""`eyas baseline` from outside: the same architecture, split and time, both sides judged on validation alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from eyas_host.data.split import Split
from eyas_host.models import checkpoints
from eyas_host.models.factory import build, move
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.search.baseline import Baseline, find_rate, load_baseline, train_scratch
from eyas_host.search.baseline import _Progress as Progress
from eyas_host.support.errors import TrainError
from eyas_host.train.schedule import Epoch
from eyas_host.train.supervised import SupervisedTask
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, draw_folder

RECIPE = """
[run]
name = "toy"
threads = 1
device = "cpu"
[data]
path = "images"
[image]
size = 32
[teacher]
model = "mobilenetv3_small_050"
weights = "random"
head_epochs = 2
epochs = 1
batch = 16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose baseline of two epochs is trained."""
    place = tmp_path_factory.mktemp("baseline")
    draw_folder(place / "images", count=16, labels=SHAPES[:3])
    (place / "recipe.toml").write_text(RECIPE)
    done = eyas(place, "baseline", "recipe.toml", "--epochs", 2, "--json", "figures.json")
    assert done.code == 0, done.err
    (place / "said.txt").write_text(done.out + done.err)
    return place


@pytest.fixture(scope="module")
def context(place: Path) -> RunContext:
    return RunContext(load_recipe(place / "recipe.toml"), place / "runs/toy")


def result(place: Path) -> Baseline:
    found = load_baseline(place / "runs/toy")
    assert found is not None
    return found


def test_both_sides_stand_beside_each_other(place: Path, context: RunContext) -> None:
    found, said = result(place), (place / "said.txt").read_text()
    assert found.scratch.epochs == 2 == len(found.scratch.curve) and found.scratch.weights == "random"
    assert found.transfer.epochs == 1 and len(found.transfer.curve) == 3  # two of the head, on cached features
    taught = context.record("teach")
    assert taught is not None and found.transfer.seconds == taught.seconds
    assert found.transfer.curve[-1][0] == pytest.approx(taught.seconds, abs=1e-3)
    assert found.lost.loss == pytest.approx(found.transfer.balanced_accuracy - found.scratch.balanced_accuracy)
    assert "transfer" in said and "from scratch" in said and f"{found.scratch.balanced_accuracy:.3f}" in said
    assert said.splitlines()[-1].startswith("baseline") and "points by transfer" in said.splitlines()[-1]
    assert (place / "figures.json").read_bytes() == (place / "runs/toy/baseline.json").read_bytes()


def test_transfer_is_the_trained_teacher_and_the_test_set_stays_held_out(place: Path, context: RunContext) -> None:
    split = Split.load(context.root, context.recipe.image.preprocessing())
    probabilities = SupervisedTask(context.recipe, split).probabilities(checkpoints.load_teacher(context, 3))
    answers = np.asarray(probabilities).argmax(axis=1)
    expected = balanced_accuracy_score(split.validation.targets, answers)
    assert result(place).transfer.balanced_accuracy == pytest.approx(expected)
    assert split.test_accesses() == []


def test_a_second_run_trains_nothing_and_another_budget_does(place: Path) -> None:
    before = (place / "runs/toy/baseline.json").stat().st_mtime_ns
    done = eyas(place, "baseline", "recipe.toml", "--epochs", 2)
    assert done.code == 0 and "unchanged" in done.err.splitlines()[-1]
    assert (place / "runs/toy/baseline.json").stat().st_mtime_ns == before
    done = eyas(place, "baseline", "recipe.toml")
    assert done.code == 0, done.err
    found = result(place)
    assert "the teacher's" in found.budget and found.scratch.epochs >= 1
    assert found.scratch.seconds < 5 * found.transfer.seconds


def test_an_interrupted_baseline_goes_on_to_the_same_end(
    place: Path, context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split.load(context.root, context.recipe.image.preprocessing())
    torch.manual_seed(0)
    model, _ = build("mobilenetv3_small_050", 3, "random")
    task = SupervisedTask(context.recipe, split)
    model = move(model, task.device)
    rate = find_rate(task, model, Progress(4), tmp_path)
    whole = train_scratch(model, task, 4, tmp_path / "whole.ckpt", rate)
    judged: list[int] = []

    class Interrupted(SupervisedTask):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            judged.append(1)
            if len(judged) in (3, 7):  # at the last rate, then in an epoch of the training
                raise KeyboardInterrupt
            return super().evaluate(model)

    monkeypatch.setattr("eyas_host.search.baseline.SupervisedTask", Interrupted)
    assert eyas(place, "baseline", "recipe.toml", "--epochs", 4).code == 130
    assert len(json.loads((place / "runs/toy/baseline/plan.json").read_bytes())["rates"]) == 2
    assert eyas(place, "baseline", "recipe.toml", "--epochs", 4).code == 130
    assert (place / "runs/toy/baseline/scratch.ckpt").exists()
    assert eyas(place, "baseline", "recipe.toml", "--epochs", 4).code == 0
    assert len(judged) == len(result(place).rates) + 4 + 2, (
        "an epoch of each rate and four of the training, and the two that were cut off"
    )
    assert result(place).rate == rate
    reached = [accuracy for _, accuracy in result(place).scratch.curve]
    assert reached == pytest.approx([epoch.metrics["balanced_accuracy"] for epoch in whole])


def test_the_baseline_has_the_best_of_several_rates(place: Path, context: RunContext) -> None:
    found = result(place)
    assert set(found.rates) == {"0.0003", "0.001", "0.003", f"{context.recipe.teacher.rate:g}"}
    assert found.rates[f"{found.rate:g}"] == max(value for value in found.rates.values() if value is not None)
    assert f"at rate {found.rate:g}" in (place / "said.txt").read_text()


def test_rates_that_diverge_are_left_out(context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SupervisedTask(context.recipe, Split.load(context.root, context.recipe.image.preprocessing()))
    reached = {0.001: 0.5, 0.0003: 0.7}

    def train(model: nn.Module, task: object, epochs: int, checkpoint: Path, rate: float) -> list[Epoch]:
        if rate not in reached:
            raise TrainError("the loss is nan")
        return [Epoch(1, 0.1, 1.0, {"combined": value}) for value in (0.1, reached[rate])]

    monkeypatch.setattr("eyas_host.search.baseline.train_scratch", train)
    model, _ = build("mobilenetv3_small_050", 3, "random")
    progress = Progress(4)
    assert find_rate(task, model, progress, tmp_path) == 0.0003
    assert progress.rates["0.003"] is None
    reached.clear()
    with pytest.raises(TrainError, match="diverges at every rate"):
        find_rate(task, model, Progress(4), tmp_path)


def test_scratch_trains_every_layer_and_its_batch_norm(context: RunContext, tmp_path: Path) -> None:
    split = Split.load(context.root, context.recipe.image.preprocessing())
    torch.manual_seed(0)
    model, _ = build("mobilenetv3_small_050", 3, "random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_scratch(model, SupervisedTask(context.recipe, split), 1, tmp_path / "some.ckpt", 1e-3)
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert set(still) <= {"mean", "std"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "0"), "--epochs"),
        (("--set", "run.device=cuda"), "torch finds no GPU"),
        (
            ("--set", "student.checkpoint=x.pt", "--set", "prune.method=none", "--set", "quantize.method=ptq"),
            "no teacher",
        ),
    ],
)
def test_mistakes(place: Path, words: tuple[str, ...], message: str) -> None:
    if "cuda" in words[-1] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = json.loads((place / "runs/toy/baseline.json").read_bytes())
    done = eyas(place, "baseline", "recipe.toml", "--yes", *words)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err
    assert json.loads((place / "runs/toy/baseline.json").read_bytes()) == before
