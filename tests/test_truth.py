"""The parts of `benchmarks/truth.py` run, on little."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from eyas_device.bundle import Bundle
from eyas_host.models.factory import PixelClassifier
from tests.support import tiny
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.paths import ROOT


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("truth")


def test_simulations_and_splits_meet_their_bounds(truth: ModuleType) -> None:
    figures: dict[str, Any] = truth.loss_figures() | truth.probability_figures(repetitions=2)
    figures |= truth.split_figures(seeds=1)
    assert len(figures) >= 12
    assert [name for name, figure in figures.items() if figure.bound is None or not figure.ok] == []


def test_coverage_is_simulated(truth: ModuleType) -> None:
    assert truth.interval_figures(draws=20).keys() == {
        "coverage_of_groups",
        "coverage_of_a_rare_label",
        "coverage_of_a_paired_bound",
    }


def test_the_duration_of_verify_and_report_is_scaled(
    truth: ModuleType,
    pristine_bundle: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eyas_host.evaluation.networks._ROUNDS", 1)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(tiny.INPUTS, tiny.CLASSES))
    networks = {name: PixelClassifier(layers, (0.5,) * 3, (0.5,) * 3).eval() for name in ("teacher", "student")}
    networks |= {"pruned": networks["student"], "qat": networks["student"]}
    bundle, dataset = Bundle.open(pristine_bundle), truth.dataset_of(tmp_path, 6, tiny.SPEC.size)
    found = truth.estimate(200, bundle, networks, dataset)
    assert 0 < found.wall < 5 and 0 < found.idle < 5 and "for 8 variants" in found.parts


def test_memory_of_a_tree_of_processes_is_counted(truth: ModuleType) -> None:
    large = importlib.import_module("sides.large_images")
    command = "x = bytearray(b'1' * (200 << 20)); print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {command!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tree:
        assert tree.stdin is not None and tree.stdout is not None
        tree.stdout.readline()
        assert 200 < large._tree_mb(tree.pid) < 300
        tree.stdin.close()


def test_large_images_are_drawn_and_loaded(truth: ModuleType, tmp_path: Path) -> None:
    large = importlib.import_module("sides.large_images")
    assert large.loader_rate(tmp_path, 8, width=64, height=48) > 0
    assert len({path.read_bytes() for path in tmp_path.glob("loader-64/*/*.jpg")}) == 8
