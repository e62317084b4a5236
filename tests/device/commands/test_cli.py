"""The command line as a person or a program sees it: through the installed console script."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from eyas_device import __version__
from eyas_device.cli import main
from eyas_device.commands import info
from tests.support import tiny

SCRIPT = shutil.which("eyas-device", path=str(Path(sys.executable).parent))


def eyas_device(*arguments: object) -> subprocess.CompletedProcess[str]:
    assert SCRIPT is not None, "eyas is not installed in this environment"
    command = [SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines on standard error, without changes that are logged."""
    logged = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info ")
    return [line for line in done.stderr.splitlines() if not logged.match(line)]


def test_help_is_complete_and_imports_nothing_heavy() -> None:
    done = eyas_device("--help")
    assert done.returncode == 0
    assert "eyas-device check" in done.stdout and "--camera folder:" in done.stdout
    heavy = "import sys, eyas_device.cli; print([m for m in ('cv2', 'numpy', 'msgspec') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("snapshto", "; did you mean snapshot? (see eyas-device --help)"),
        ("check b --runtme onnx", "unrecognized arguments: --runtme onnx; did you mean --runtime?"),
        ("run --broker [::1", "argument --broker: '[::1': "),
        ("doctor --zzz", "eyas-device doctor: unrecognized arguments: --zzz (see eyas-device doctor --help)"),
    ],
)
def test_a_command_that_is_mistyped_is_one_line(words: str, error: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and error in err and err.startswith("eyas-device") and err.count("\n") == 1


def test_version() -> None:
    assert eyas_device("--version").stdout == f"eyas-device {__version__}\n"


def test_check(pristine_bundle: Path) -> None:
    done = eyas_device("check", pristine_bundle)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(re.search(r" ok: agreement 1\.00, max \|dp\| 0\.0\d+", line) for line in lines)


def test_check_as_json(pristine_bundle: Path) -> None:
    done = eyas_device("check", pristine_bundle, "--runtime", "onnx", "--json")
    row = json.loads(done.stdout)
    assert (row["artefact"], row["status"], row["agreement"]) == ("onnx-fp32", "ok", 1.0)


def test_check_exits_with_1_for_a_wrong_prediction_and_2_for_a_bad_bundle(
    bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(confidence={"temperature": 30.0})
    done = eyas_device("check", bundle_root)
    assert done.returncode == 1
    assert done.stdout.count("FAILED") == 4
    (bundle_root / "onnx-fp32.onnx").write_bytes(b"altered")
    done = eyas_device("check", bundle_root)
    assert done.returncode == 2
    assert re.fullmatch(r"eyas-device: .*onnx-fp32\.onnx: differs .*copy the bundle again\n", done.stderr)


def test_info(pristine_bundle: Path) -> None:
    done = eyas_device("info", pristine_bundle)
    assert done.returncode == 0
    for message in ("tiny-shapes 1.2.3: cross, disc, stripes", "(used)", "balanced_accuracy 0.9877", "not measured"):
        assert message in done.stdout
    assert "litert: faster" in done.stdout and "Drawn for a test." in done.stdout


def test_info_as_json(pristine_bundle: Path) -> None:
    done = eyas_device("info", "--json", pristine_bundle)
    manifest = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert manifest["labels"] == list(tiny.LABELS) and len(manifest["artefacts"]) == 4


def test_info_moves_no_cursor(
    bundle_root: Path, edit_manifest: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(notices=["drawn\x1b[2J\x1b]0;title\x07 for a test"], reasons={"litert": "\u202ereversed"})
    assert main(["info", str(bundle_root)]) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"drawn\x1b[2J\x1b]0;title\x07 for a test" in shown and r"\u202ereversed" in shown


def test_a_defect_shows_its_place_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: object) -> int:
        raise RuntimeError("http://me:S3cret@camera/ broke\nsecond line")

    monkeypatch.setattr(info, "main", fails)
    before = sys.excepthook, logging.getLogger("eyas_device").level
    assert main(["info", "x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "critical unexpected error" in lines[0] and any("test_cli.py" in line for line in lines)
    assert "RuntimeError: http://***@camera/ broke" in "\n".join(lines) and "S3cret" not in "\n".join(lines)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d critical ", line) for line in lines)
    assert (sys.excepthook, logging.getLogger("eyas_device").level) == before


def test_run_reports_accuracy(pristine_bundle: Path, image_folder: Path) -> None:
    done = eyas_device("run", "--bundle", pristine_bundle, "--camera", f"folder:{image_folder}", "--accuracy")
    assert done.returncode == 0, done.stderr
    assert "accuracy 1.0000, balanced accuracy 1.0000 (12 labelled images)" in done.stdout
    assert re.search(r"^12 frames in .* fps; latency p50 \d", done.stdout, re.MULTILINE)
    assert "litert-int8 on litert" in done.stderr
    assert error_lines(done) == []


def test_run_as_json(pristine_bundle: Path, image_folder: Path) -> None:
    (spoilt := image_folder / "spoilt.jpg").write_bytes(b"junk")
    try:
        done = eyas_device(
            *("run", "--bundle", pristine_bundle, "--camera", f"folder:{image_folder}", "--json"),
            *("--runtime", "openvino", "--frames", 5, "--threads", 1),
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        whole = eyas_device("run", "--bundle", pristine_bundle, "--camera", f"folder:{image_folder}", "--json")
    finally:
        spoilt.unlink()
    assert done.returncode == 0
    assert [row["number"] for row in rows] == list(range(5))
    assert [row["label"] for row in rows] == ["cross"] * 4 + ["disc"]
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-3) for row in rows)
    assert len(whole.stdout.splitlines()) == 12
    assert any("spoilt.jpg: not an image" in line for line in error_lines(whole))
    assert any("1 could not be decoded" in line for line in error_lines(whole))


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 0)])
def test_a_line_a_second_for_debugging_only(level: str, lines: int, pristine_bundle: Path) -> None:
    camera = ("--camera", "fake:?frames=25&size=32x32")
    done = eyas_device("run", "--bundle", pristine_bundle, *camera, "--fps", 10, "--log-level", level)
    found = [
        line.partition(" debug   ")[2] for line in done.stderr.splitlines() if "frames " in line and "fps  " in line
    ]
    assert len(found) == lines
    fields = r"frames \d+  [\d.]+ fps  latency p50 [\d.]+ ms  \w+ [01]\.\d\d\??  uncertain \d+"
    assert all(re.fullmatch(fields, line) for line in found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_summary_and_0(number: signal.Signals, pristine_bundle: Path) -> None:
    command = [str(SCRIPT), "run", "--bundle", str(pristine_bundle), "--camera", "fake:", "--loop", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert json.loads(process.stdout.readline())["number"] == 0
        process.send_signal(number)
        numbers = [0] + [json.loads(line)["number"] for line in process.stdout]
        errors = process.stderr.read()
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert "Traceback" not in errors
    assert numbers == list(range(len(numbers)))
    assert f"{len(numbers)} frames in " in errors


def test_a_closed_pipe(pristine_bundle: Path) -> None:
    command = [str(SCRIPT), "run", "--bundle", str(pristine_bundle), "--camera", "fake:", "--loop", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(20) == 0
    assert "Traceback" not in errors and "BrokenPipe" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "/nowhere"), "is /nowhere a bundle"),
        (("info", "/nowhere"), "is /nowhere a bundle"),
        (("check", "BUNDLE", "--runtime", "tensorrt"), "allowed are litert, tflite, openvino, onnx"),
        (("run", "--bundle", "BUNDLE", "--camera", "folder:/nowhere"), "no such folder"),
        (("run", "--bundle", "BUNDLE", "--camera", "video:/nowhere"), "no such file"),
        (("run", "--bundle", "BUNDLE", "--camera", "video:JUNK"), "not a video"),
        (("run", "--bundle", "BUNDLE", "--camera", "usb:0"), "allowed are v4l2:"),
        (("run", "--bundle", "BUNDLE", "--camera", "fake:", "--accuracy"), "--accuracy needs folder:PATH"),
        (("run", "--bundle", "BUNDLE", "--camera", "fake:", "--artefact", "x"), "the bundle has: litert-fp32"),
        (("run", "--bundle", "BUNDLE", "--camera", "fake:", "--runtime", "x"), "allowed are litert"),
        (("run", "--bundle", "BUNDLE", "--camera", "fake:?frames=9&lost=2"), "lost at frame 2"),
    ],
)
def test_user_errors_are_one_line_and_exit_with_2(
    arguments: tuple[str, ...], message: str, pristine_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"no video " * 100)
    places = {"BUNDLE": str(pristine_bundle)}
    done = eyas_device(*(places.get(a, a).replace("JUNK", str(tmp_path / "junk.mp4")) for a in arguments))
    assert done.returncode == 2
    assert len(error_lines(done)) == 1, done.stderr
    assert error_lines(done)[0].startswith("eyas-device: ") and message in error_lines(done)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--frames", "0"),
        ("--fps", "fast"),
        ("--threads", "-1"),
        ("--window-s", "0"),
        ("--broker", "host:port"),
        ("--broker", ":1883"),
        ("--name", "a/b"),
    ],
)
def test_impossible_options(arguments: tuple[str, str], pristine_bundle: Path) -> None:
    done = eyas_device("run", "--bundle", pristine_bundle, "--camera", "fake:", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr


def test_a_video_on_the_command_line(pristine_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for label in tiny.LABELS:
        writer.write(tiny.draw_shape(label, 5))
    writer.release()
    done = eyas_device(
        "run", "--bundle", pristine_bundle, "--camera", f"video:{path}", "--json", "--loop", "--frames", 6
    )
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == list(tiny.LABELS) * 2
