"""`--set` is remembered with a run; other settings ask before finished stages are cleared."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer

from eyas_host.cli import remembered
from eyas_host.pipeline import runner
from eyas_host.pipeline.runner import SETTINGS, RunContext, Stage, StageResult, run_chain
from eyas_host.support.errors import RunError
from eyas_host.support.files import write_bytes


class Toy:
    """Three stages, each with one section, and a recipe file."""

    def __init__(self, root: Path) -> None:
        self.ran: list[str] = []
        self.root = root
        self.stages = (self._stage("split", "data"), self._stage("teach", "teacher"), self._stage("report", "run"))
        self.edit("")

    def _stage(self, name: str, section: str) -> Stage:
        def work(context: RunContext) -> StageResult:
            self.ran.append(name)
            write_bytes(context.folder(name) / "out.txt", name.encode())
            return StageResult(name)

        return Stage(name, (section,), (), work)

    def edit(self, text: str) -> None:
        (self.root / "recipe.toml").write_text(f'[run]\nname = "toy"\n[data]\npath = "images"\n{text}')

    def run(self, *overrides: str, yes: bool = False, until: str | None = None, **stages: str | None) -> list[str]:
        """What a verb does: settle the settings, then run what is due."""
        self.ran.clear()
        context = remembered.settle(
            self.root / "recipe.toml",
            self.root / "runs",
            overrides,
            stages={"start": None, "only": None} | stages,
            yes=yes,
        )
        run_chain(self.stages, context, until=until, **stages)
        return list(self.ran)

    @property
    def settings(self) -> dict[str, str]:
        return msgspec.json.decode((self.root / "runs/toy" / SETTINGS).read_bytes(), type=dict[str, str])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy(tmp_path)
    monkeypatch.setattr(remembered, "STAGES", made.stages)
    monkeypatch.setattr(runner, "give_back_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["eyas", "distill", "recipe.toml"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return made


def test_a_later_command_has_the_settings_of_the_run(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy.run("teacher.epochs=2") == ["split", "teach", "report"]
    capsys.readouterr()
    assert toy.run() == []
    assert "settings remembered" in capsys.readouterr().err
    assert toy.settings == {"teacher.epochs": "2"}
    assert toy.run("teacher.epochs=2") == [], "the same again"


@pytest.mark.parametrize("override", ["teacher.epochs=3", "teacher.rate=1e-4", "data.limit=30", "teacher.epochs="])
def test_other_settings_are_refused_where_nobody_can_be_asked(toy: Toy, override: str) -> None:
    toy.run("teacher.epochs=2")
    before = sorted((path, path.stat().st_mtime_ns) for path in toy.root.rglob("*") if path.is_file())
    with pytest.raises(RunError) as error:
        toy.run(override)
    assert sorted((path, path.stat().st_mtime_ns) for path in toy.root.rglob("*") if path.is_file()) == before
    key = override.partition("=")[0]
    lines = str(error.value).splitlines()
    assert key in lines[0] and " -> " in lines[0]
    commands = [shlex.split(line.partition("    to ")[0]) for line in lines[1:]]
    assert commands[0][-1] == "--yes" and commands[1][-1] == "run.name=toy-2"
    assert toy.run(override, yes=True) == (["split"] if "data" in key else ["teach"])
    assert toy.run() == []


def test_a_run_beside_it_has_only_its_own_settings(toy: Toy) -> None:
    toy.run("teacher.epochs=2")
    assert toy.run("teacher.rate=1e-4", "run.name=toy-2") == ["split", "teach", "report"]
    assert toy.settings == {"teacher.epochs": "2"}
    assert msgspec.json.decode((toy.root / "runs/toy-2" / SETTINGS).read_bytes()) == {"teacher.rate": "1e-4"}
    assert toy.run("run.name=toy-2") == []


def test_what_is_asked_for_by_name_needs_no_question(toy: Toy) -> None:
    toy.run("teacher.epochs=2")
    assert toy.run("teacher.epochs=3", start="teach") == ["teach", "report"]
    assert toy.run("teacher.epochs=4", only="teach") == ["teach"]
    with pytest.raises(RunError):
        toy.run("data.limit=30", start="teach")


def test_settings_without_effect_on_what_is_finished_and_the_report_alone(toy: Toy) -> None:
    toy.run()
    assert toy.run("student.epochs=5") == []
    assert toy.settings == {"student.epochs": "5"}
    assert toy.run("run.threads=2") == ["report"], "a report is written again without a question"


def test_an_edited_recipe_is_an_ordinary_change(toy: Toy) -> None:
    toy.run("teacher.epochs=2")
    toy.edit("[teacher]\nrate = 1e-4\n")
    assert toy.run() == ["teach"]
    toy.edit("[teacher]\nepochs = 7\n")
    assert toy.run() == ["teach"], "the rate is the default's again"
    assert toy.run("teacher.epochs=", yes=True) == ["teach"]
    assert toy.settings == {}


def test_all_settings_can_be_dropped_at_once(toy: Toy) -> None:
    toy.run("teacher.epochs=2", "teacher.rate=1e-4", "data.limit=30")
    with pytest.raises(RunError, match="limit 30 -> 0"):
        toy.run("=")
    assert toy.run("=", "teacher.rate=1e-4", yes=True) == ["split", "teach"]
    assert toy.settings == {"teacher.rate": "1e-4"}


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _interrupt() -> bool:
    raise typer.Abort


@pytest.mark.parametrize(("answer", "ran"), [(_yes, ["teach"]), (_no, None), (_interrupt, None)])
def test_a_terminal_is_asked(
    toy: Toy, answer: Callable[[], bool], ran: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.run("teacher.epochs=2")
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answer())
    if ran is None:
        with pytest.raises(RunError, match="nothing was changed"):
            toy.run("teacher.epochs=3")
        assert toy.settings == {"teacher.epochs": "2"}
    else:
        assert toy.run("teacher.epochs=3") == ran


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"teacher.epochs": 3}', b"\xff"])
def test_settings_that_cannot_be_read_are_none(toy: Toy, content: bytes) -> None:
    toy.run("teacher.epochs=2")
    (toy.root / "runs/toy" / SETTINGS).write_bytes(content)
    assert toy.run(yes=True) == ["teach"]


def test_an_interrupted_run_goes_on_with_its_settings(toy: Toy) -> None:
    toy.run("teacher.epochs=2", until="split")
    assert toy.run() == ["teach", "report"]
    assert toy.settings == {"teacher.epochs": "2"}
