"""Standard streams that are closed, full or poor in characters, under the real command line and real processes."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from eyas_device.bundle import MANIFEST
from eyas_device.errors import EXIT_OUTPUT
from eyas_device.support.streams import Output, to_json
from tests.support.bundles import record_settings

EYAS = [sys.executable, "-m", "eyas_device"]
LIVE = "fake:?live=1&fps=40&frames=1000000&size=64x48"


def shell(redirections: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line with a shell's redirections; what is not redirected is returned."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *EYAS, *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=os.environ | environ, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def foreign_bundle(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose labels are in no 8-bit character set together."""
    root = tmp_path_factory.mktemp("foreign") / "bundle"
    shutil.copytree(pristine_bundle, root)
    text = (root / MANIFEST).read_text(encoding="utf-8")
    for label, foreign in (("cross", "猫\U0001f408"), ("disc", "Ä"), ("stripes", "№")):
        text = text.replace(f'"{label}"', f'"{foreign}"')
    (root / MANIFEST).write_text(text, encoding="utf-8")
    record_settings(root)
    return root


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["info", "BUNDLE"],
        ["slots", "--state", "STATE", "--json"],
        ["check", "BUNDLE", "--runtime", "onnx"],
        ["run", "--bundle", "BUNDLE", "--camera", "fake:?frames=9", "--runtime", "onnx", "--json"],
    ],
)
def test_a_full_disk_is_said_once(arguments: list[str], pristine_bundle: Path, tmp_path: Path) -> None:
    places = {"BUNDLE": str(pristine_bundle), "STATE": str(tmp_path)}
    done = shell(">/dev/full", *(places.get(a, a) for a in arguments))
    errors = done.stderr.decode()
    assert done.returncode == EXIT_OUTPUT, errors
    assert errors.count("No space left on device") == 1 and "Traceback" not in errors
    if arguments[0] == "run" and "--json" in arguments:
        assert "9 frames in " in errors, "the loop went on"


@pytest.mark.parametrize(
    "redirections",
    [">&-", ">&- 2>&- <&-", "2>/dev/full"],
)
def test_nothing_to_write_on_is_no_reason_to_fail(redirections: str, pristine_bundle: Path, tmp_path: Path) -> None:
    run = ["run", "--bundle", pristine_bundle, "--camera", "fake:?frames=5", "--runtime", "onnx", "--json"]
    done = shell(redirections, *run)
    assert done.returncode == 0
    if ">&-" not in redirections.replace("2>&-", ""):
        assert len(done.stdout.splitlines()) == 5
    if "<&-" in redirections:
        snapshot = ["snapshot", "--bundle", pristine_bundle, "--camera", "fake:?frames=2", "--out", tmp_path / "s"]
        assert shell(redirections, *snapshot).returncode == 0
        assert len(list((tmp_path / "s").glob("*.json"))) == 1
    assert shell(redirections, "check", "/nowhere").returncode == 2


def test_a_closed_stream_gives_its_number_to_nothing_else() -> None:
    program = "import os\nfrom eyas_device.support.streams import open_streams\nwith open_streams():\n"
    program += "    opened = os.open('/etc/hostname', os.O_RDONLY)\n"
    program += "    links = [os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)]\n"
    program += "    raise SystemExit(0 if opened > 2 and links == ['/dev/null'] * 3 else 1)\n"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_labels_that_the_character_set_lacks(encoding: str, foreign_bundle: Path) -> None:
    run = ["run", "--bundle", foreign_bundle, "--camera", "fake:?frames=6&size=64x48", "--runtime", "onnx"]
    done = shell("", *run, "--json", "--log-level", "debug", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line.decode(encoding)) for line in done.stdout.splitlines()]
    assert len(rows) == 6 and {row["label"] for row in rows} <= {"猫\U0001f408", "Ä", "№"}
    shown = shell("", "info", foreign_bundle, PYTHONIOENCODING=encoding)
    assert shown.returncode == 0
    assert rb"\u732b\U0001f408, " + ("Ä" if encoding != "ascii" else r"\xc4").encode(encoding) in shown.stdout


@pytest.mark.parametrize("value", ["Ä", "\U0001f408", "№", 'quoted "\\" and \x07'])
def test_json_is_the_same_in_every_character_set(value: str) -> None:
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        stream.write(to_json({"label": value}, stream))
        stream.flush()
        assert msgspec.json.decode(stream.buffer.getvalue().decode(encoding))["label"] == value  # type: ignore[attr-defined]


def test_a_disk_with_room_again_gets_whole_lines() -> None:
    """A line that was cut by a full disk is not continued by the next one."""
    reading, writing = os.pipe()
    output, real = Output(writing, reports_reader=True), os.write
    fails = iter([4, None, errno.ENOSPC, errno.ENOSPC, None, None])

    def write(descriptor: int, data: memoryview) -> int:
        step = next(fails, None)
        if step == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:step])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        output.write(b'{"number":0}\n')
        assert output.error is None
        fails = iter([4, errno.ENOSPC, errno.ENOSPC])
        output.write(b'{"number":1}\n')
        output.write(b'{"number":2}\n')
        assert output.error is not None and output.first_error is not None
        output.write(b'{"number":3}\n')
    assert output.error is None and output.first_error.errno == errno.ENOSPC
    os.close(writing)
    assert os.read(reading, 1000) == b'{"number":0}\n{"nu\n{"number":3}\n'
    os.close(reading)


def test_a_reader_that_left_is_reported_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = Output(writing, reports_reader=True)
    with pytest.raises(BrokenPipeError):
        output.write(b"x")
    assert output.write(b"y") == 1
    quiet = Output(writing, reports_reader=False)
    assert quiet.write(b"x") == 1 and quiet.first_error is None
    os.close(writing)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_ends_the_loop_but_not_under_nohup(ignored: bool, pristine_bundle: Path) -> None:
    master, slave = pty.openpty()
    run = ["run", "--bundle", str(pristine_bundle), "--camera", LIVE, "--runtime", "onnx"]
    process = subprocess.Popen(
        [*EYAS, *run],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),  # not inherited
    )
    os.close(slave)
    try:
        seen, deadline = b"", time.monotonic() + 60
        while b" fps  " not in seen and time.monotonic() < deadline:
            seen += os.read(master, 4096)
        assert b"\r\x1b[K" in seen
        process.send_signal(signal.SIGHUP)  # the terminal is there: that is a reload
        time.sleep(0.3)
        assert process.poll() is None
        os.close(master)
        process.send_signal(signal.SIGHUP)  # as the kernel and the shell do
        if ignored:
            time.sleep(1.2)  # a line to the closed terminal is due each second
            assert process.poll() is None
        else:
            # the reload that is under way ends first
            assert process.wait(90) == EXIT_OUTPUT, "the summary had no place to go"
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_cannot_control_a_terminal(encoding: str) -> None:
    """C1 controls, directions and separators are valid in JSON as they are; what comes from a network may hold them."""
    text = {"a\x9b31m": "\x1b[2J\x85\u202e\u2028\x00\U000e0001é猫"}
    line = to_json(text, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert line.isprintable() and json.loads(line) == text
    assert ("猫" in line) == (encoding == "utf-8")
