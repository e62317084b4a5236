"""The live view of a real agent behind a mosquitto with the kit's certificates, in terminals of 80 and 140 columns."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

from eyas_device import __version__
from eyas_host.fleet.broker.kit import Kit
from tests.support import tiny
from tests.support.agents import AgentProcess, start_kit
from tests.support.fleet_parts import Processes

WINDOW_S = 2.0


@pytest.fixture(scope="module")
def kit(pristine_bundle: Path) -> Iterator[Kit]:
    """A broker and an agent that sees six discs, three crosses and a damaged image again and again."""
    with tempfile.TemporaryDirectory(prefix="eyas-watch-") as name:
        (folder := Path(name)).chmod(0o755)
        (pictures := folder / "pictures").mkdir()
        for number in range(9):
            image = tiny.draw_shape("disc" if number < 6 else "cross", number)
            assert cv2.imwrite(str(pictures / f"{number}.png"), image)
        (pictures / "9.png").write_bytes((pictures / "8.png").read_bytes()[:100])
        processes = Processes(folder)
        kit = start_kit(folder, processes)
        agent = AgentProcess(
            kit, pristine_bundle, folder, "cam-7", camera=f"folder:{pictures}", telemetry=f"window_s = {WINDOW_S}"
        ).start()
        try:
            yield kit
        finally:
            agent.stop()
            processes.close()


def watch(kit: Kit, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eyas_host", "watch", "--kit", str(kit.folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_the_table_has_the_values_that_the_agent_sent(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    """Piped: one table without escapes. Its row is one of the windows that another watcher saw meanwhile."""
    words = [sys.executable, "-m", "eyas_host", "watch", "--kit", str(kit.folder), "--json", "--seconds", "20"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        time.sleep(3)
        tables = [watch(kit, "--seconds", "7", COLUMNS=str(width)) for width in (80, 140)]
        lines = list(map(json.loads, other.communicate()[0].splitlines()))
    windows = [line["message"] for line in lines if line["kind"] == "window"]
    assert len(windows) > 4
    for width, table in zip((80, 140), tables, strict=True):
        assert (table.returncode, table.stderr) == (0, "")
        with capsys.disabled():
            print(f"\n{table.stdout}")
        text = table.stdout.splitlines()
        assert max(map(len, text)) <= width and all(line.isprintable() for line in text)
        assert text[0].split() == ["connected", "1", "degraded"]
        heading, row = text[1], text[2].split()
        assert heading.split()[:4] == ["device", "state", "labels", "conf."]
        assert row[:2] == ["cam-7", "degraded"]
        assert any(matches(window, row) for window in windows), (row, windows)
        assert row[2] == "disc" and 60 <= int(row[3].rstrip("%")) <= 75, "two of three are discs"
        assert 5 < float(row[7]) < 11, "ten a second"
        assert 5 <= int(row[10].rstrip("%")) <= 15, "a tenth of them is damaged"
        assert re.search(r"^ +\d+% of the frames cannot be read", text[3])
        assert (
            re.search(rf" hall-2 +tiny-shapes 1\.2\.3 [0-9a-f]{{7}} +{re.escape(__version__)} ", text[2]) or width == 80
        )


def matches(window: dict[str, Any], row: list[str]) -> bool:
    """Whether a row shows a window; computed here from the message alone."""
    frames, counts = window["frames"], window["counts"]
    if set(counts) != {"disc", "cross"}:
        return False  # the first one is cut short
    first, second = sorted(counts, key=lambda label: -counts[label])
    labels = [first, f"{counts[first] / frames:.0%}", second, f"{counts[second] / frames:.0%}"]
    figures = [
        f"{sum(window['confidence_sum'].values()) / frames:.2f}",
        f"{frames / window['seconds']:.1f}",
        f"{window['latency_ms']['p50']:.1f}",
        str(window["dropped"]),
        f"{window['unreadable'] / (frames + window['unreadable']):.0%}",
    ]
    return row[2:6] == labels and row[6:11] == figures and 0 <= int(row[11]) <= 5 and row[12] == "s"


def test_a_terminal_that_is_resized(kit: Kit) -> None:
    """The site and the model come when there is room, and go again; q ends it and gives the terminal back.

    The environment has the size of the beginning, as shells and libraries leave it there.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "eyas_host", "watch", "--kit", str(kit.folder)]
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"})
    try:
        for columns in (80, 140, 80):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            read(terminal, 1.5)
            heading = last_heading(read(terminal, 30, until=b"cam-7"))
            assert ("model" in heading) == (columns == 140), (columns, heading)
            assert heading.split()[:4] == ["device", "state", "labels", "conf."]
        os.write(terminal, b"q")
        end = read(terminal, 5)
        assert b"\x1b[?1049l" in end, "the screen of before is back"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = 0
    finally:
        os.close(terminal)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def read(terminal: int, seconds: float, until: bytes = b"") -> bytes:
    """What is written to a terminal within a time, or up to and a little beyond some bytes."""
    found, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not select.select([terminal], [], [], left)[0]:
            break
        try:
            found += os.read(terminal, 65536)
        except OSError:
            break
        if until and until in found and b"device " in found.rpartition(until)[0]:
            end = min(end, time.monotonic() + 0.6)
    return found


def last_heading(screen: bytes) -> str:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    return next(line for line in reversed(re.split(r"[\r\n]+", text)) if line.startswith("device "))


def test_a_broker_that_is_not_there_ends_with_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eyas_host", "watch", "--broker", "127.0.0.1:9", "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"eyas: broker 127\.0\.0\.1:9: .*\n", done.stderr)
