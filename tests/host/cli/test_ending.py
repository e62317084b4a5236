"""The last lines of the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_host.cli.ending import accuracy, show_ending
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection

REPORT: dict[str, Any] = {
    "shipped": "litert-int8",
    "variants": [{"name": "teacher", "balanced_accuracy": 0.9}, {"name": "litert-int8", "balanced_accuracy": 0.8714}],
    "validation_variants": [{"name": "litert-int8", "balanced_accuracy": 0.8899}],
    "counts": {"test": {"a": 40, "b": 50}},
}


def shown(root: Path, capsys: pytest.CaptureFixture[str], **more: object) -> dict[str, str]:
    root.mkdir(parents=True)
    (root / "report.json").write_bytes(msgspec.json.encode(REPORT | more))
    show_ending(RunContext(Recipe(run=RunSection(name="toy")), root))
    return {line[:9].strip(): line[10:] for line in capsys.readouterr().err.splitlines()}


def test_the_accuracy_names_its_split() -> None:
    expected = "balanced accuracy 0.871 on 90 held-out test images (validation 0.890): litert-int8"
    assert accuracy(REPORT) == expected
    assert accuracy(REPORT | {"variants": []}) == "not measured"


def test_verdict_report_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "my runs" / "toy"
    ship = {"verdict": "do not ship", "reasons": ["recall of [b] is 40 %", "few images", "dear"]}
    lines = shown(root, capsys, ship=ship)
    assert list(lines) == ["verdict", "accuracy", "report", "try it", "flash it"]
    assert lines["verdict"] == "do not ship: recall of [b] is 40 % (and 2 more in the report)"
    assert lines["report"].startswith("file:///") and lines["report"].endswith("/my%20runs/toy/report.html")
    assert f"--bundle '{root}/bundle'" in lines["try it"] and "folder:IMAGES" in lines["try it"]
    assert "flash USER@HOST --name NAME --bundle" in lines["flash it"]


def test_a_report_without_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "verdict" not in shown(tmp_path / "toy", capsys)
