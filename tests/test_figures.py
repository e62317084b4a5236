"""docs/figures.md is what `make figures` writes from the results, and nobody else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from benchmarks.figures import PAGES, RESULTS, read, render

ROOT = Path(__file__).parents[1]


def test_the_committed_page_is_a_fresh_generation() -> None:
    page = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert page == render(read(RESULTS)), "run `make figures` and commit docs/figures.md"


def test_every_results_file_is_on_the_page() -> None:
    files = sorted(RESULTS.glob("*.json"))
    page = render(read(RESULTS))
    assert {file.stem for file in files} == set(PAGES)
    assert [f for f in files if f"`benchmarks/results/{f.name}`" not in page] == []
    for file in files:
        figures = msgspec.json.decode(file.read_bytes()).get("figures", {})
        assert [key for key in figures if f"| `{key}` |" not in page] == []


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for _, command, _ in PAGES.values():
        program, *words = command.split()
        assert words[0] in targets if program == "make" else (ROOT / words[0]).is_file(), command


def test_missed_and_unmeasured_figures_stay_visible() -> None:
    figure = {"value": 1.5, "unit": "x", "bound": 2.0, "better": "higher", "spread": "", "note": "a | b", "ok": False}
    machine = {"processor": "P", "cores": "2", "system": "Linux-x86_64", "python": "3", "isa": "x86_64, avx2"}
    page = render(
        {
            "new": {
                "machine": machine,
                "versions": {},
                "figures": {"a": figure, "b": {**figure, "value": None, "ok": None}},
            }
        }
    )
    assert "| `a` | 1.5 x | ≥ 2 | **no** |  | a \\| b |" in page
    assert "| `b` | *not measured* |" in page
    assert "P, 2 cores (x86_64, avx2) | 0 of 1 |" in page
