"""The Makefile's clean targets: runs are no cache, and only a typed yes removes them."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MODEL = Path("runs/toy/distill/student.pt")
CACHES = (".venv", ".readers", ".mypy_cache", "dist", "docs/_build")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the Makefile beside a run and caches."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (*CACHES, str(MODEL.parent)):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / MODEL).write_bytes(b"weights")
    return tmp_path


def make(tree: Path, *words: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run make there; `typed` is what a person types on the terminal, without which there is none."""
    command = ["make", "--no-print-directory", *words]
    if typed is None:
        return subprocess.run(
            command, cwd=tree, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    ours, terminal = pty.openpty()
    try:
        os.write(ours, typed.encode())
        return subprocess.run(
            command, cwd=tree, stdin=terminal, capture_output=True, text=True, timeout=30, check=False
        )
    finally:
        os.close(ours)
        os.close(terminal)


def test_clean_removes_caches_and_keeps_runs(tree: Path) -> None:
    done = make(tree, "clean")
    assert done.returncode == 0, done.stderr
    assert not [folder for folder in CACHES if (tree / folder).exists()]
    assert (tree / MODEL).read_bytes() == b"weights"


def test_clean_runs_refuses_without_a_terminal(tree: Path) -> None:
    done = make(tree, "clean-runs")
    assert done.returncode != 0 and "YES=1" in done.stderr
    assert "Error 1" in done.stderr
    assert (tree / MODEL).exists()


@pytest.mark.parametrize("typed", ["\n", "y\n", "no\n", "yes please\n"])
def test_clean_runs_keeps_runs_unless_yes_is_typed(tree: Path, typed: str) -> None:
    done = make(tree, "clean-runs", typed=typed)
    assert done.returncode != 0 and "kept" in done.stderr
    assert (tree / MODEL).exists()


def test_clean_runs_removes_runs_after_yes(tree: Path) -> None:
    done = make(tree, "clean-runs", typed="yes\n")
    assert done.returncode == 0, done.stderr
    assert "Type yes" in done.stdout
    assert not (tree / "runs").exists()


def test_clean_runs_does_not_ask_with_yes_given(tree: Path) -> None:
    assert make(tree, "clean-runs", "YES=1").returncode == 0
    assert not (tree / "runs").exists()
    assert make(tree, "clean-runs").returncode == 0, "nothing to remove is no error"
