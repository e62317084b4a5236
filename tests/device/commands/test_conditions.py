"""Every verb on failing streams, in odd places, with odd names: it works, or it is one line and a documented code."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_device import __main__ as entry
from eyas_device import cli
from eyas_device.camera import open_camera
from eyas_device.config import read_config
from eyas_device.errors import EXIT_INTERRUPTED, EXIT_OUTPUT, CameraError
from tests.support.descriptors import FULL, descriptors

ODD = "a b [1] 'q' \"d\" 100%s $HOME 猫\n\x1b[2J"
"""A name that shells, formats, terminals and lines take for something else."""
ONNX = ["--runtime", "onnx"]


def verbs(bundle: Path, folder: Path) -> dict[str, tuple[list[object], int]]:
    """Name -> arguments and the exit code of a healthy system."""
    state = folder / "state"
    fake = ["--camera", "fake:?frames=3&size=64x48"]
    return {
        "help": (["run", "--help"], 0),
        "run": (["run", "--bundle", bundle, *fake, *ONNX], 0),
        "run --json": (["run", "--bundle", bundle, *fake, *ONNX, "--json"], 0),
        "check": (["check", bundle, *ONNX], 0),
        "info": (["info", bundle], 0),
        "install": (["install", bundle, "--state", state], 0),
        "slots": (["slots", "--state", state], 0),
        "update --status": (["update", "--status", "--state", state], 0),
        "update": (["update", "--state", state], 2),
        "snapshot": (["snapshot", "--bundle", bundle, *fake, "--out", folder / "snapshots"], 0),
        "status": (["status", "--state", state], 2),
        "reload": (["reload", "--state", state], 2),
        "no bundle": (["check", folder / "nothing"], 2),
    }


def call(arguments: list[object], out: Path | None, err: Path | None, encoding: str = "utf-8") -> int:
    with descriptors(out, err, encoding=encoding):
        return cli.main([str(argument) for argument in arguments])


def complaints(path: Path) -> list[str]:
    """Lines on standard error that begin with the program's name."""
    text = path.read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("eyas-device: ")]


@pytest.mark.parametrize("verb", verbs(Path(), Path()))
def test_every_verb_on_streams_that_fail(verb: str, pristine_bundle: Path, tmp_path: Path) -> None:
    arguments, code = verbs(pristine_bundle, tmp_path)[verb]
    err = tmp_path / "err"
    for out in (FULL, None):
        expected = (code or EXIT_OUTPUT) if out is FULL else code
        assert call(arguments, out, err) == expected, err.read_text()
        assert len(complaints(err)) == (expected != 0) or "--json" in verb
    for err_too in (FULL, None):
        assert call(arguments, tmp_path / "out", err_too) == code
    assert call(arguments, None, None) == code


@pytest.mark.parametrize("verb", ["run --json", "check", "info", "install", "snapshot", "no bundle"])
def test_odd_paths_in_poor_character_sets(verb: str, pristine_bundle: Path, tmp_path: Path) -> None:
    """The bundle is a link, and every path has a name that is not to be interpreted."""
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "bundle").symlink_to(pristine_bundle)
    arguments, code = verbs(folder / "bundle", folder)[verb]
    out, err = tmp_path / "out", tmp_path / "err"
    for encoding in ("ascii", "latin-1", "utf-8"):
        assert call(arguments, out, err, encoding) == code, err.read_text()
        text = out.read_bytes() + err.read_bytes()
        assert b"\x1b" not in text
        if verb == "run --json":
            assert [json.loads(line)["number"] for line in out.read_bytes().splitlines()] == [0, 1, 2]
        assert len(complaints(err)) == (code != 0)


@pytest.mark.parametrize("verb", ["run", "install", "snapshot"])
@pytest.mark.parametrize("place", ["gone", "no home", "foreign zone"])
def test_without_a_place_to_stand(
    verb: str, place: str, pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    if place == "gone":
        gone.rmdir()
    elif place == "no home":
        monkeypatch.setenv("HOME", "/dev/null")
        monkeypatch.setenv("TMPDIR", "/nowhere")
    else:
        monkeypatch.setenv("TZ", "Nowhere/Mars:::")
    (config := tmp_path / "device.toml").write_text(f'[device]\nstate = "{tmp_path / "state"}"\n')
    arguments, code = verbs(pristine_bundle, tmp_path)[verb]
    assert call([*arguments, "--config", config], tmp_path / "out", tmp_path / "err") == code
    assert complaints(tmp_path / "err") == []


def test_ctrl_c_while_verbs_are_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["slots"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "eyas-device: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_command_line_itself_is_imported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "eyas_device.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "eyas_device.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert entry.main() == EXIT_INTERRUPTED
    assert capfd.readouterr().err == "eyas-device: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_verb_as_systemd_expects(number: signal.Signals) -> None:
    """What the verb opened is closed first, and the process ends by the signal."""
    program = f"""
import os, sys, types
from contextlib import closing
from eyas_device import __main__ as entry
from eyas_device import cli
def main(args):
    with closing(types.SimpleNamespace(close=lambda: print("closed"))):
        os.kill(os.getpid(), {number.value})
verb = types.SimpleNamespace(HELP="", add_arguments=lambda parser: None, main=main, __doc__="")
cli.importlib.import_module = lambda name: verb
sys.exit(cli.main(["slots"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -number
    assert done.stdout == "closed\n" and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def _fails(error: Exception) -> Callable[..., int]:
    def main(args: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "/d/x: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/x"), "/d/x: Permission denied; see to its permissions"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "Too many open files; raise the limit of open files (ulimit -n)",
        ),
        (OSError(errno.EROFS, "Read-only file system", b"/d/\xff"), "Read-only file system; see to its permissions"),
        (MemoryError(), "out of memory"),
    ],
)
def test_trouble_of_the_system_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("eyas_device.commands.slots.main", _fails(error))
    assert call(["slots"], tmp_path / "out", tmp_path / "err") == 1
    [line] = complaints(tmp_path / "err")
    assert words in line


def test_a_home_is_written_as_a_tilde(
    tmp_path: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pristine_bundle, tmp_path / "b")
    (config := tmp_path / "c.toml").write_text(
        '[device]\nstate = "~/s"\n[model]\nbundle = "~/b"\n[telemetry]\nca = "~/ca"\ncertificate = "~/c"\nkey = "~/k"\n'
        '[[output]]\nkind = "webhook"\nurl = "https://h"\nca = "~/o"\nheader_file = "~x~"\n'
    )
    found = read_config(config)
    assert (found.device.state, found.model.bundle) == (f"{tmp_path}/s", f"{tmp_path}/b")
    telemetry, [output] = found.telemetry, found.output
    assert [telemetry.ca, telemetry.certificate, telemetry.key] == [f"{tmp_path}/{name}" for name in ("ca", "c", "k")]
    assert output.ca == f"{tmp_path}/o"
    assert output.header_file == "~x~"
    assert cli.main(["info", "~/b"]) == 0
    with pytest.raises(CameraError, match=f"{tmp_path}/images: no such folder"):
        open_camera("folder:~/images")
    with pytest.raises(CameraError, match=f"{tmp_path}/v.mp4: no such file"):
        open_camera("video:~/v.mp4")


def test_an_unknown_user_has_no_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert cli.main(["info", "~/b"]) == 2
    assert "~/b" in capsys.readouterr().err
