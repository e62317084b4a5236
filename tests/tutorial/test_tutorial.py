"""Every command of docs/tutorial.md runs, in the page's order, in an empty folder that holds drawn images."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eyas_host.fleet.store.database import Store
from tests.support.brokers import free_port
from tests.support.paths import ROOT
from tests.support.shapes import draw_folder
from tests.support.system_parts import require

_IMAGES = 3 * 24
_SECONDS = 840
"""On a busy machine with two cores; about 90 s of processor time."""

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_command_block_runs_or_says_why_not() -> None:
    fences = re.findall(r"^```(\w+)$", PAGE, flags=re.MULTILINE)
    assert set(fences) == {"sh", "console", "text"}
    assert fences.count("sh") == len(BLOCKS) >= 9
    assert fences.count("console") == len(re.findall(r"^<!-- not run: .+ -->\n```console$", PAGE, re.MULTILINE)) == 2


@pytest.mark.timeout(900)
def test_the_page_from_images_to_stored_telemetry(open_folder: Path) -> None:
    require("mosquitto", "openssl")
    draw_folder(open_folder / "images", count=24, labels=("circle", "cross", "square"))
    output = _run(open_folder, "\n".join(f"echo '== block {n}'\n{block}" for n, block in enumerate(BLOCKS, 1)))

    assert re.findall(r"^== block (\d+)$", output, flags=re.MULTILINE) == [str(n + 1) for n in range(len(BLOCKS))]
    assert (open_folder / "runs/images/report.html").stat().st_size > 10_000
    assert (open_folder / "runs/images/preview/sheet.png").exists()
    assert len(re.findall(r"^images/\w+/\d+\.png (circle|cross|square) [01]\.\d\d$", output, re.MULTILINE)) == 3
    assert f"({_IMAGES} labelled images)" in output
    with Store(f"sqlite:///{open_folder}/fleet.db") as store:
        assert sum(window.frames for window in store.windows("cam-1")) == _IMAGES


def _run(folder: Path, script: str) -> str:
    """Output of a bash script with this checkout's programs on the path; whatever it started ends with it."""
    programs = folder / "bin"
    programs.mkdir()
    for name, module in (("eyas", "-m eyas_host"), ("eyas-device", "-m eyas_device"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'device'}:{ROOT / 'host'}",
    }
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null' ERR\n" + script.replace("8883", str(free_port()))
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return output
