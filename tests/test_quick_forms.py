"""Quick forms: their recipes are valid, their runs are their own, and their figures say what they are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.figures import RESULTS
from eyas_host.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import each other by their bare names."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))


def test_what_depends_on_a_shortened_training_has_no_bound_and_says_so() -> None:
    common = importlib.import_module("common")
    figure = common.Figure(value=0.7, unit="", bound=0.8, spread="0.6, 0.8", note="two seeds")
    bare = common.Figure(value=1.0, unit="x")
    found = common.shortened({"a": figure, "b": bare}, "one epoch")
    assert figure.ok is False and found["a"].ok is None
    assert found["a"].note == "two seeds; one epoch" and found["b"].note == "one epoch"
    assert (found["a"].value, found["a"].spread, found["b"].unit) == (0.7, "0.6, 0.8", "x")


def test_quick_runs_are_not_those_of_the_full_forms() -> None:
    main_job, pretrained = (importlib.import_module(name) for name in ("main_job", "pretrained"))
    ways = [main_job._context(0, way) for way in main_job.WAYS]
    assert len({one.root for one in ways}) == len(ways) == 3
    assert ways[0].recipe.data.limit == 0 < ways[-1].recipe.data.limit
    tasks = [
        pretrained.Task("solar-cells", main_job.RECIPE),
        pretrained.Task("solar-cells", main_job.RECIPE, pretrained.QUICK, "quick-pretrained-"),
    ]
    assert len({one.root for one in ways} | {task.context(0).root for task in tasks}) == 4, "the full ones share a run"
    assert tasks[0].context(1).root.name == "solar-cells-seed1"


@pytest.mark.parametrize("name", ["FULL", "QUICK"])
def test_a_form_of_the_demonstration_has_a_recipe_and_its_days_in_order(name: str, tmp_path: Path) -> None:
    forms, demo = (importlib.import_module(module) for module in ("sides.demo_forms", "fleet_demo"))
    form = getattr(forms, name)
    (tmp_path / "recipe.toml").write_text(forms.recipe_of(form))
    student = load_recipe(tmp_path / "recipe.toml").student
    assert (student.views, student.epochs) == (form.views, form.epochs)
    learning = demo.TUNING.profile_days + demo.TUNING.calibration_days
    change = demo.CHANGE_S / demo.DAY_S
    assert learning == demo.WATCHED < form.dirty < form.season
    assert form.season + change + form.wait_hours / 24 <= form.last + form.wait_hours / 24 < form.days - form.at_the_end
