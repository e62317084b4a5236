"""Live curves: what a training draws, and where."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import MissingExtra
from eyas_host.train import trackers as curves
from eyas_host.train.trackers import Curves
from tests.support.toy_training import Toy


def recipe(*trackers: str) -> Recipe:
    return Recipe(run=RunSection(name="toy", trackers=trackers), data=DataSection(path="."))  # type: ignore[arg-type]


def drawn(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_SECONDS", 0.0)


@pytest.mark.usefixtures("every_step")
def test_a_training_draws_losses_rates_figures_and_stages(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=3)
    history = toy.fit(
        curves=Curves(recipe("auto"), tmp_path), stages=lambda history: "first" if len(history) < 2 else "second"
    )
    assert [path.name for path in (tmp_path / "curves").iterdir()] == ["toy"]
    events = drawn(tmp_path / "curves" / "toy")
    assert [point.step for point in events.Scalars("loss")] == list(range(12))
    assert max(point.value for point in events.Scalars("rate")) == pytest.approx(0.05)
    for name, value in history[-1].metrics.items():
        points = events.Scalars(f"validation/{name}")
        assert [point.step for point in points] == [3, 7, 11]
        assert points[-1].value == pytest.approx(value)
    marks = events.Tensors("stage/text_summary")
    assert [(mark.step, mark.tensor_proto.string_val[0]) for mark in marks] == [(3, b"first"), (11, b"second")]


@pytest.mark.usefixtures("every_step")
def test_a_resumed_training_goes_on_with_its_curve_and_a_new_one_begins_again(tmp_path: Path) -> None:
    lines = Curves(recipe("tensorboard"), tmp_path)
    toy = Toy(tmp_path / "a.ckpt", epochs=3)
    toy.stop_at = (1, 2)
    with pytest.raises(KeyboardInterrupt):
        toy.fit(curves=lines)
    time.sleep(1 - time.time() % 1)  # TensorBoard reads files in the order of their names: second, process, counter
    Toy(tmp_path / "a.ckpt", epochs=3).fit(curves=lines)
    assert [point.step for point in drawn(tmp_path / "curves" / "toy").Scalars("loss")] == list(range(12))
    Toy(tmp_path / "b.ckpt", epochs=1).fit(curves=lines)
    assert [point.step for point in drawn(tmp_path / "curves" / "toy").Scalars("loss")] == list(range(4))


def test_no_trackers_no_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Toy(tmp_path / "a.ckpt", epochs=1).fit(curves=Curves(recipe(), tmp_path))
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    Toy(tmp_path / "b.ckpt", epochs=1).fit(curves=Curves(recipe("auto"), tmp_path))
    assert not (tmp_path / "curves").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(tmp_path: Path, name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingExtra, match=rf"trackers: {name} is not installed; pip install {name}"):
        Curves(recipe(name), tmp_path)
