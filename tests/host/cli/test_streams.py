"""No standard stream ends a verb: full disks, closed descriptors, encodings without the characters, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from eyas_device.errors import EXIT_OUTPUT
from eyas_host.cli import app
from eyas_host.fleet.store.database import Store
from eyas_host.support.progress import say
from tests.support.descriptors import FULL, eyas
from tests.support.inside import eyas as inside
from tests.support.shapes import SHAPES, draw_folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of drawn shapes, one class with a label that no 8-bit character set has."""
    folder = tmp_path_factory.mktemp("recipe")
    images = draw_folder(folder / "images", labels=SHAPES[:2])
    (images / SHAPES[0]).rename(images / "жук")
    path = folder / "recipe.toml"
    path.write_text('[run]\nname = "t"\n[data]\npath = "images"\n', encoding="utf-8")
    return path


SHORT = (["--version"], ["--help"], ["watch", "--help"], ["expire", "--store", "sqlite:///STORE"])


@pytest.mark.parametrize("arguments", SHORT, ids=" ".join)
def test_a_full_disk_is_said_once_with_an_exit_code(arguments: list[str], tmp_path: Path) -> None:
    err, store = tmp_path / "err", tmp_path / "fleet.db"
    Store(f"sqlite:///{store}").close()
    given = [argument.replace("STORE", str(store)) for argument in arguments]
    assert eyas(*given, out=FULL, err=err) == EXIT_OUTPUT
    assert err.read_text() == "eyas: standard output: No space left on device\n"
    assert eyas(*given, out=FULL, err=FULL) == EXIT_OUTPUT
    assert eyas(*given, out=None, err=None) == 0


@pytest.mark.parametrize(("out", "err"), [(FULL, FULL), (None, None)], ids=["full", "closed"])
def test_a_stage_does_its_work_without_streams(
    out: Path | None, err: Path | None, recipe: Path, tmp_path: Path
) -> None:
    assert eyas("split", recipe, "--runs", tmp_path, out=out, err=err) == 0
    assert (tmp_path / "t/split/stage.json").is_file()
    assert eyas("split", recipe.with_name("none.toml"), out=out, err=err) == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_text_stays_legible_in_any_encoding(encoding: str, recipe: Path, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    assert eyas("--help", out=out, err=err, encoding=encoding) == 0
    text = out.read_bytes().decode(encoding)
    assert "\\u25" not in text and "\\u2026" not in text
    lines = [line for line in text.splitlines() if "--version" in line]
    assert len({len(line) for line in lines}) == 1 and lines, "the frame keeps its shape"
    assert eyas("split", recipe, "--runs", tmp_path, out=out, err=err, encoding=encoding) == 0
    assert eyas("split", recipe.parent / "無.toml", out=out, err=err, encoding=encoding) == 2
    assert "\\u7121" in err.read_bytes().decode(encoding)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EOFError("Ran out of input"), 1, "EOFError: Ran out of input"),
        (PermissionError(13, "Permission denied", "/etc/[red]x"), 1, "eyas: /etc/[red]x: Permission denied; see to"),
        (OSError(28, "No space left on device", "runs/t/x"), 1, "eyas: runs/t/x: No space left on device; free"),
        (OSError("the connection was reset\nby peer"), 1, "eyas: the connection was reset by peer"),
        (MemoryError(), 1, "eyas: out of memory; set a smaller batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "eyas: out of memory"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), 1, "eyas: the disk is"),
        (ValueError("password=secret"), 1, "ValueError: password=***"),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
        (KeyboardInterrupt(), 130, "eyas: interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'eyas[train]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_ends_a_verb_is_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = typer.Typer(cls=app._Verbs, pretty_exceptions_enable=False)

    @broken.command()
    def version() -> None:
        raise error

    @broken.command()
    def other() -> None: ...

    monkeypatch.setattr(app, "app", broken)
    done = inside(tmp_path, "version")
    assert done.code == code and words in done.err and "Aborted" not in done.err
    assert ("Traceback" in done.err) == (isinstance(error, EOFError | ValueError))
    assert len(done.err.splitlines()) <= 1 or "Traceback" in done.err


@pytest.mark.parametrize(("number", "word"), [(2, "interrupted"), (15, "terminated"), (1, "the terminal was closed")])
def test_a_signal_ends_a_verb_with_its_code(
    number: int, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cleaned = []

    def verb() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    before = signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    try:
        monkeypatch.setattr(app, "app", verb)
        done = inside(tmp_path, "split")
        assert (done.code, done.err) == (128 + number, f"eyas: {word}\n") and cleaned
        assert signal.getsignal(number) == (signal.default_int_handler if number == 2 else signal.SIG_DFL)
    finally:
        signal.signal(number, before)


def test_an_interrupted_stage_says_how_it_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (OSError(5, "Input/output error", "x.png"), 1)):

        def stop(*arguments: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("eyas_host.stages.split.build_index", stop)
        done = inside(tmp_path, "split", recipe)
        assert done.code == code and "Traceback" not in done.err
        last = done.err.splitlines()[-1]
        assert last.startswith("eyas: ") and "stage 'split' goes on where it was when the same command is run" in last
    monkeypatch.undo()
    assert inside(tmp_path, "split", recipe).code == 0


PROGRAM = """
import os, signal, sys, time
from eyas_device.support.interrupts import interruptible
with interruptible():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("not reached", flush=True)
"""


def test_a_second_signal_ends_it_at_once_and_nohup_holds() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    ignored = "trap '' HUP; exec \"$@\""
    program = "import os, signal\nfrom eyas_device.support.interrupts import interruptible\n"
    program += "with interruptible():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('went on')"
    done = subprocess.run(
        ["sh", "-c", ignored, "sh", sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    program = "import sys\nclass Hook:\n    def find_spec(self, name, *_):\n"
    program += "        if name == 'eyas_host.cli.app': raise KeyboardInterrupt\n"
    program += "sys.meta_path.insert(0, Hook())\nfrom eyas_host.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "eyas: interrupted\n")


def test_names_are_utf8_in_an_ascii_locale(tmp_path: Path) -> None:
    draw_folder(tmp_path / "Größe", count=2, labels=("ring", "square"))
    (tmp_path / "Größe/ring").rename(tmp_path / "Größe/größer 猫")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    new = [sys.executable, "-m", "eyas_host", "new", "Größe", "--name", "toy"]
    done = subprocess.run(new, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert "größer 猫 2" in done.stdout.decode()
    assert "größer 猫 2" in (tmp_path / "models/toy/recipe.toml").read_text(encoding="utf-8")


def test_names_of_files_do_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    app._complain("a\x1b[2J\u202e.png: is no image\n  second line \udcfc")
    say("  left out: \x1b]0;title\x07.png")
    printed = capsys.readouterr().err
    assert printed.splitlines()[:2] == ["eyas: a\\x1b[2J\\u202e.png: is no image", "  second line \\udcfc"]
    assert "\x1b" not in printed
    assert "\x07" not in printed
