"""Settings that are seldom wise: one line each, with what, why and what instead, and never an exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.warnings import label_warnings, recipe_warnings, student_warnings, teacher_warnings
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, draw_folder


def recipe(folder: Path, *settings: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text('[run]\nname = "toy"\n[data]\npath = "images"\n')
    return load_recipe(path, settings)


@pytest.mark.parametrize(
    ("settings", "start", "instead"),
    [
        (("teacher.rate=0.002",), "[teacher] rate = 0.002 on unfrozen blocks: above 0.001", "take 1e-3 to 1e-5"),
        (("teacher.unfreeze_by=plateau", "teacher.rate=0.02"), "[teacher] rate = 0.002 on unfrozen", "take 1e-3"),
        (("teacher.layer_decay=1.0",), "[teacher] layer_decay = 1.0, one rate for all blocks", "take 0.65 to 0.9"),
        (("teacher.patience=11",), "[teacher] patience = 11", "take 3 to 5"),
        (("teacher.batch=7",), "[teacher] batch = 7", "take 16 or more"),
        (("teacher.label_smoothing=0.2",), "[teacher] label_smoothing = 0.2", "take 0 to 0.1"),
        (("student.batch=4",), "[student] batch = 4: BatchNorm", "take 16 or more"),
        (("student.temperature=0.5",), "[student] temperature = 0.5 sharpens", "take 1 to 10"),
        (("student.temperature=20",), "[student] temperature = 20 makes them nearly uniform", "take 1 to 10"),
        (("student.rate=0.02",), "[student] rate = 0.02", "take 3e-3"),
        (("student.kd=dist", "student.batch=8"), "[student] kd = 'dist' with batch = 8", "take 32 or more"),
        (
            ("student.kd_ratio=0.0", "student.feature_loss=0.0"),
            "[student] kd_ratio = 0 without feature",
            "take kd_ratio",
        ),
    ],
)
def test_questionable_settings_are_named(settings: tuple[str, ...], start: str, instead: str, tmp_path: Path) -> None:
    (line,) = recipe_warnings(recipe(tmp_path, *settings))
    assert line.startswith(start) and instead in line and "\n" not in line
    assert line in (teacher_warnings if line.startswith("[teacher]") else student_warnings)(recipe(tmp_path, *settings))


@pytest.mark.parametrize(
    "settings",
    [
        ("teacher.rate=0.001", "teacher.patience=10", "teacher.batch=8", "student.batch=8"),
        ("teacher.rate=0.01", "teacher.layer_decay=1.0", "teacher.epochs=0"),
        ("teacher.rate=0.01", "teacher.weights=random", "teacher.layer_decay=1.0", "student.weights=random"),
        ("teacher.unfreeze_by=plateau", "teacher.rate=0.005"),
        ("teacher.layer_decay=1.0", 'teacher.unfreeze="0"'),
        ("teacher.batch=4", "teacher.accumulate=2"),
        ("student.temperature=1.0",),
        ("student.temperature=10.0",),
        ("student.temperature=0.1", "student.kd_ratio=0.0"),
        (
            "student.kd_ratio=0.0",
            'student.feature_layers=[{ student = "a", teacher = "b" }]',
            "student.feature_loss=0.0",
        ),
        (
            "student.checkpoint=x.pth",
            "prune.method=none",
            "quantize.method=ptq",
            "teacher.patience=90",
            "student.batch=1",
        ),
    ],
)
def test_sensible_settings_give_no_warning(settings: tuple[str, ...], tmp_path: Path) -> None:
    assert recipe_warnings(recipe(tmp_path, *settings)) == []


@pytest.mark.parametrize(
    ("labels", "settings", "named"),
    [
        (("turn left", "turn right", "stop"), (), ["horizontal_flip"]),
        (("7", "8", "9"), (), ["horizontal_flip"]),
        (("a", "b", "c", "other"), ("augment.quarter_turns=true",), ["horizontal_flip", "quarter_turns"]),
        (("Chest_X-ray_normal", "pneumonia"), (), ["horizontal_flip"]),
        (("bottle-up", "bottle-down", "none"), ("augment.vertical_flip=true",), ["vertical_flip"]),
        (("bottle-up", "bottle-down", "none"), (), []),
        (("turn left", "turn right"), ('augment.forbid=["horizontal_flip"]',), []),
        (SHAPES, ("augment.vertical_flip=true", "augment.quarter_turns=true"), []),
        (("bright", "cupboard", "leftover"), ("augment.vertical_flip=true",), []),
    ],
)
def test_labels_whose_class_a_flip_may_change(
    labels: tuple[str, ...], settings: tuple[str, ...], named: list[str], tmp_path: Path
) -> None:
    found = label_warnings(recipe(tmp_path, *settings), labels)
    assert len(found) == bool(named)
    if named:
        assert found[0].endswith("forbid = " + json.dumps(named)) and labels[0] in found[0]


def test_dist_needs_more_than_two_classes(tmp_path: Path) -> None:
    dist = recipe(tmp_path, "student.kd=dist")
    assert student_warnings(dist, 3) == []
    (line,) = student_warnings(dist, 2)
    assert "with two classes" in line and "take 'kl'" in line
    assert student_warnings(recipe(tmp_path), 2) == []


def test_warnings_precede_the_run_and_do_not_stop_it(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    recipe(tmp_path)
    done = eyas(tmp_path, "split", "recipe.toml", "--set", "teacher.patience=30", "--set", "student.batch=2")
    assert done.code == 0, done.err
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in done.err.splitlines()]
    first, second, *rest = lines
    assert first.startswith("[teacher] patience = 30") and second.startswith("[student] batch = 2")
    assert any(line.startswith("split") for line in rest)
