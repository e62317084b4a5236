"""The doctor as a whole: its verb, its findings, and checks that crash or hang."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from eyas_device import doctor
from eyas_device.cli import main as eyas_device
from eyas_device.commands import doctor as verb
from eyas_device.doctor import CHECKS, CheckResult, Context, Finding, check_name, examine, probes, software, system
from eyas_device.doctor.finding import green
from eyas_device.errors import BundleError, LinkError
from eyas_device.runtimes import RUNTIMES
from tests.support.brokers import Broker
from tests.support.doctor_parts import context, file


def test_every_check_has_a_name_and_every_runtime_a_check() -> None:
    titles = [check_name(check) for check in CHECKS]
    assert len(titles) == len(set(titles)) > 20
    assert {name.replace("-", " ") for name in RUNTIMES} <= set(titles)
    assert set(probes.PACKAGES) == set(RUNTIMES)


def test_a_check_that_crashes_or_hangs_is_red_and_stops_no_other() -> None:
    hanging = threading.Event()

    def crashes(context: Context) -> Finding:
        raise ZeroDivisionError("nothing left")

    def raises(context: Context) -> Finding:
        raise BundleError("bundle b: damaged; copy it again")

    def hangs(context: Context) -> Finding:
        hanging.wait(60)
        return green("late")

    def fine(context: Context) -> Finding:
        return green("fine")

    rows = list(examine(context(), (crashes, raises, hangs, fine), limit_s=0.3))
    hanging.set()
    assert [row.status for row in rows] == ["red", "red", "red", "green"]
    assert "ZeroDivisionError: nothing left" in rows[0].finding
    assert rows[1].finding == "bundle b: damaged; copy it again"
    assert "no result within 0.3 s" in rows[2].finding


def test_findings_are_one_line_without_control_characters_and_passwords() -> None:
    def shows_secrets(context: Context) -> Finding:
        return green("rtsp://user:secret@10.0.0.9/s\n\x1b[2Jhttp://me:p%40ss@host/ end" + "x" * 1000)

    (row,) = examine(context(), (shows_secrets,))
    assert row.finding.startswith("rtsp://***@10.0.0.9/s ?[2Jhttp://***@host/ end")
    assert row.finding.isprintable() and len(row.finding) == 400


def run_verb(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args([str(argument) for argument in arguments]))


def test_the_verb_with_everything_real(
    pristine_bundle: Path, tmp_path: Path, broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    file(
        tmp_path / "device.toml", f'[device]\nstate = "{tmp_path}"\n[camera]\nsource = "fake:?live=1&frames=9&fps=20"\n'
    )
    given = ("--config", tmp_path / "device.toml", "--bundle", pristine_bundle, "--broker", f"127.0.0.1:{broker.port}")
    code = run_verb(*given, "--json")
    report = json.loads(capsys.readouterr().out)
    rows = {row["check"]: row for row in report["findings"]}
    assert list(rows) == [check_name(check) for check in CHECKS]
    for name in ("configuration", "libraries", "litert", "openvino", "onnx", "golden", "camera", "broker", "disk"):
        assert rows[name]["status"] == "green", rows[name]
    assert "litert-int8" in rows["litert"]["finding"] and "ms per image" in rows["litert"]["finding"]
    assert "9 frames of 640 x 480" in rows["camera"]["finding"]
    assert "tiny-shapes 1.2.3" in rows["golden"]["finding"]
    reds = [row for row in rows.values() if row["status"] == "red"]
    assert code == (1 if reds else 0)
    assert report["worst"] == (
        "red" if reds else "yellow" if any(r["status"] == "yellow" for r in rows.values()) else "green"
    )


def test_the_table_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (system.memory, software.configuration)
    monkeypatch.setattr(doctor, "examine", lambda context, on_start: examine(context, checks, on_start=on_start))
    file(tmp_path / "bad.toml", "[loop]\nduty = 2\n[camra]\n")
    assert run_verb("--config", tmp_path / "bad.toml") == 1
    memory, configuration, fix, summary = capsys.readouterr().out.splitlines()
    assert memory.startswith("green   memory  ")
    assert configuration.startswith("red     configuration  ")
    assert "[loop] duty = 2" in configuration and "[camra]: unknown section" in configuration, "all errors in one line"
    assert fix.index("-> ") == configuration.index(str(tmp_path)), "the fix stands below the finding"
    assert summary == "1 green, 0 yellow, 1 red, 0 not checked"
    assert "\x1b" not in memory, "no colours outside of a terminal"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    row = CheckResult("memory", "red", "none", "buy", 0.0)
    verb.print_result(row, 8)
    assert capsys.readouterr().out.startswith("\x1b[31mred   \x1b[0m  memory    none\n")
    monkeypatch.setenv("NO_COLOR", "1")
    verb.print_result(row, 8)
    assert "\x1b" not in capsys.readouterr().out


def test_an_unreadable_password_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"none: the password cannot be read"):
        run_verb("--password-file", tmp_path / "none")


def test_the_parent_needs_neither_numpy_nor_opencv() -> None:
    code = "import sys, eyas_device.doctor; print([m for m in ('cv2', 'numpy', 'paho') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_verb_is_known_and_help_is_light() -> None:
    heavy = (
        "import sys, eyas_device.commands.doctor; print([m for m in ('cv2', 'numpy', 'msgspec') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"


def test_json_rows_can_be_read_back() -> None:
    (row,) = examine(context(), (system.descriptors,))
    assert msgspec.json.decode(msgspec.json.encode(row), type=CheckResult) == row
    assert callable(eyas_device)
