"""What would end a run after hours is said before its first stage."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from eyas_device.errors import EyasError
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.stages.chain import STAGES
from eyas_host.stages.preflight import check_chain
from eyas_host.support.errors import MissingExtra, StageError
from tests.support.shapes import SHAPES, draw_folder

ALL = [stage.name for stage in STAGES]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    draw_folder(folder / "images", labels=SHAPES[:2], count=3)
    path = folder / "recipe.toml"
    path.write_text('[run]\nname = "t"\n[data]\npath = "images"\n', encoding="utf-8")
    return path


def context(recipe: Path, runs: Path, *settings: str) -> RunContext:
    loaded = load_recipe(recipe, settings)
    return RunContext(loaded, runs / loaded.run.name)


def test_a_run_that_can_end_well_is_let_through(recipe: Path, tmp_path: Path) -> None:
    check_chain(context(recipe, tmp_path), ALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("prune.target=latency", "prune.table=none.json"), ("[prune] table", "none.json: no such file")),
        (('quantize.keep_float=["backbone.nothing"]',), ("keep_float", "backbone.nothing", "similar names")),
        (("student.views=20000", "image.size=1024"), ("GB more (views", "are free", "another --runs")),
        (("student.model=densenet121",), ("denselayer1.norm1", "cannot fold")),
    ],
    ids=["table", "layers", "space", "fold"],
)
def test_settings_of_a_late_stage(
    settings: tuple[str, ...], words: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(EyasError) as raised:
        check_chain(context(recipe, tmp_path, *settings), ALL)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_a_table_counts_only_where_its_stage_runs(recipe: Path, tmp_path: Path) -> None:
    check_chain(context(recipe, tmp_path, "prune.target=latency", "prune.table=none.json"), ["compile", "verify"])


@pytest.mark.parametrize(("module", "stage"), [("nncf", "prune"), ("litert_torch", "prune"), ("jinja2", "report")])
def test_packages_of_late_stages(
    module: str, stage: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra, match=rf"{module}, which is not installed: .* -m pip install 'eyas\[train\]'"
    ) as raised:
        check_chain(context(recipe, tmp_path), ALL)
    assert f"'{stage}'" in str(raised.value)


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def foreign(path: str | Path, mode: int, real: Callable[[str | Path, int], bool] = os.access) -> bool:
    """`os.access` for a user whom the pruned student and the caches do not belong to."""
    return Path(path).name not in ("prune", "closed") and real(path, mode)


def test_folders_that_belong_to_somebody_else(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t/prune").mkdir(parents=True)
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", foreign)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "closed/new"))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvcc" if name == "nvcc" else None)
    with pytest.raises(StageError) as raised:
        check_chain(context(recipe, tmp_path, "run.compile=true"), ["distill", "prune", "qat"])
    first, *problems = str(raised.value).splitlines()
    assert "3 problems would end this run later" in first and len(problems) == 3
    assert f"{tmp_path}/t/prune: cannot be written; see to the permissions" in problems[0]
    assert "TORCH_EXTENSIONS_DIR" in problems[1] and "C++ compiler" in problems[2]


def test_what_is_there_already_needs_no_space(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(StageError, match=r"the run needs about .* MB more"):
        check_chain(context(recipe, tmp_path), ALL)
    (tmp_path / "t/distill").mkdir(parents=True)
    with (tmp_path / "t/distill/view-0.u8").open("wb") as stream:
        stream.truncate(10**9)
    check_chain(context(recipe, tmp_path), ALL)
