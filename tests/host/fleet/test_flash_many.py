"""Many devices side by side: real SSH servers, one of them gone and one with another host key."""

from __future__ import annotations

import getpass
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from eyas_host.fleet.deploy.flash import FlashResult
from eyas_host.fleet.deploy.results import table
from tests.support.brokers import free_port
from tests.support.inside import eyas
from tests.support.ssh_board import Board


@pytest.fixture
def boards(server: Board) -> Iterator[list[Board]]:
    """Three devices; the first one's server makes sure that there is SSH at all."""
    made = []
    with tempfile.TemporaryDirectory(prefix="eyas-boards-") as folder:
        try:
            for number in range(3):
                place = Path(folder) / str(number)
                place.mkdir()
                made.append(Board(place).start())
            yield made
        finally:
            for one in made:
                one.stop()


def test_each_device_has_its_line_and_its_exit_code(boards: list[Board], bundle_root: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    lines = [(one.folder / "known_hosts").read_text() for one in boards]
    lines[2] = f"[127.0.0.1]:{boards[2].port} {lines[0].split(' ', 1)[1]}"  # the key of another device
    known.write_text("".join(lines))
    keys = "".join((one.folder / "key.pub").read_text() for one in boards)
    for one in boards:
        (one.folder / "authorized_keys").write_text(keys)
    dead = f"{getpass.getuser()}@127.0.0.1:{free_port()}"
    words = ["--bundle", bundle_root, "--python", sys.executable, "--root", tmp_path / "device root", "--parallel", "4"]
    words += ["--identity", boards[0].key, "--ssh-option", f"UserKnownHostsFile={known}"]
    names = [boards[0].name, dead, boards[2].name]
    done = eyas(tmp_path, "flash", *names, *words)
    assert done.code == 1, done.err
    rows = {line.split()[0]: line for line in done.out.splitlines() if "@" in line}
    assert " flashed " in rows[names[0]] and rows[names[0]].split()[2] == "0"
    assert [rows[name].split()[1:3] for name in names[1:]] == [["failed", "1"]] * 2
    assert "Connection refused" in done.out and "host key" in done.out.lower()
    assert done.out.splitlines()[-1] == "3 devices: 1 flashed, 2 failed"
    done = eyas(tmp_path, "flash", *names[:2], *words, "--json")
    found = {line["target"]: line for line in map(json.loads, done.out.splitlines())}
    assert (found[names[0]]["status"], found[names[0]]["code"]) == ("unchanged", 0)
    assert (found[dead]["status"], found[dead]["code"]) == ("failed", 1)


def test_the_table_fits_and_shows_nothing_that_a_terminal_would_obey() -> None:
    results = [
        FlashResult("pi@a", "failed", "bad\x1b[2J thing " + "x" * 90, 1.0),
        FlashResult("pi@camera-17", "flashed", "shapes 2.0.0 in slot b; new: model", 12.34, 90_250_000, 90_000_000),
    ]
    lines = list(table(results, 80))
    assert lines[1].startswith("pi@camera-17  flashed  0     12.3 s  250 kB + 90 MB wheels")
    assert lines[-1] == "2 devices: 1 failed, 1 flashed"
    assert "\x1b" not in "".join(lines)
