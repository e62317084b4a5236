"""What a new run keeps of the results before: the run before of its class of machines, two of each other class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.earlier import earlier_runs, machine_class
from benchmarks.figures import RESULTS, render

INTEL, EPYC, ROME, PI = "x86_64, VNNI", "x86_64, avx2, avx512f, avx512_vnni", "x86_64, no VNNI", "aarch64, asimddp"
CLASSES = {
    INTEL: "VNNI",
    EPYC: "VNNI",
    ROME: "no VNNI",
    "x86_64, avx2, avx512f": "no VNNI",
    PI: "aarch64",
    "x86_64, avx2, avx_vnni": "VNNI",
    "aarch64, asimddp, i8mm": "aarch64 i8mm",
    "": "not recorded",
}


def machine(isa: str) -> dict[str, str]:
    return {"processor": "P", "cores": "2", "system": "Linux-x86_64", "python": "3", "isa": isa}


def write(path: Path, isa: str, value: float | None) -> None:
    """A run of one figure, as `finish` writes it."""
    figure = {"value": value, "unit": "x", "bound": None, "better": "higher", "spread": "", "note": "", "ok": None}
    tree = {
        "machine": machine(isa),
        "finished": f"day {value}",
        "versions": {},
        "figures": {"speed": figure},
        "earlier": earlier_runs(path, machine(isa)),
    }
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("isa", CLASSES)
def test_the_class_of_a_machine(isa: str) -> None:
    assert machine_class({"isa": isa} if isa else {}) == CLASSES[isa]


def test_the_newest_stands_beside_the_one_before_of_each_class(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    for number, isa in enumerate((ROME, INTEL, ROME, PI, ROME, EPYC, INTEL)):
        write(path, isa, float(number))
    tree: dict[str, Any] = json.loads(path.read_text())
    assert tree["figures"]["speed"]["value"] == 6.0
    kept = [(run["machine"]["isa"], run["figures"]["speed"]) for run in tree["earlier"]]
    assert kept == [(EPYC, 5.0), (ROME, 4.0), (PI, 3.0), (ROME, 2.0)], "one more of VNNI, two of ROME, one of PI"
    page = render({"speed": tree})
    assert "| figure | value | earlier (1) | earlier (2) | earlier (3) | earlier (4) | bound |" in page
    assert "| `speed` | 6 x | 5 | 4 | 3 | 2 |" in page
    assert f"(2) P, 2 cores ({ROME}), day 4.0;" in page


@pytest.mark.parametrize("text", ["", "not json", '{"machine": {}, "outcomes": []}'])
def test_what_is_no_results_file_of_figures_is_nothing_to_keep(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert earlier_runs(tmp_path / "x.json", machine(ROME)) == []
    assert earlier_runs(tmp_path / "none.json", machine(ROME)) == []


def test_finish_keeps_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    common = sys.modules.get("common") or __import__("common")
    for value in (1.0, 2.0, None):
        common.finish({"a": common.Figure(value=value, unit="s", bound=1.5)}, "some avg10=0.00", tmp_path / "a.json")
    tree = msgspec.json.decode((tmp_path / "a.json").read_bytes())
    assert tree["figures"]["a"]["value"] is None
    assert [run["figures"] for run in tree["earlier"]] == [{"a": 2.0}], "of this machine only the one before"
    out = capsys.readouterr().out
    assert "pressure before and after: some avg10=0.00;" in out and f"({common.isa()})" in out


def test_every_committed_file_obeys() -> None:
    """An earlier run without figures or a machine says nothing."""
    for path in RESULTS.glob("*.json"):
        for run in msgspec.json.decode(path.read_bytes()).get("earlier", ()):
            assert run["figures"] and run["machine"]["processor"], path.name
