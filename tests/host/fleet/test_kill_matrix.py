"""The short form of the kill matrix: real spool, uplink, mosquitto and collector, killed while messages flow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.fleet_parts import needs_mosquitto
from tests.support.paths import ROOT

PROGRAM = ROOT / "benchmarks" / "kill_matrix.py"
CASES = ("all", "broker", "collector down, then broker")


def test_nothing_is_lost_and_nothing_is_stored_twice(tmp_path: Path) -> None:
    needs_mosquitto()
    command = [sys.executable, str(PROGRAM), "--messages", "400", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [*command, *(word for case in CASES for word in ("--case", case))],
        capture_output=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    written = json.loads((tmp_path / "out.json").read_text())
    results = {result["case"]: result for result in written["outcomes"]}
    assert set(results) == set(CASES)
    for result in results.values():
        assert result["finished"], result
        assert result["messages"] >= 395, result
        assert (result["lost"], result["twice"]) == (0, 0), result
