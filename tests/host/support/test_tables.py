"""Tables and lines on terminals of any width, with text that looks like markup."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from rich.table import Table

from eyas_host.support.progress import show


def drawn() -> Table:
    table = Table(title="runs/[red]x[/y] on 5 images")
    for title in ("artefact", "balanced acc.", "95 % interval", "note"):
        table.add_column(title, no_wrap=True)
    table.add_row("[bold]litert[/x]", "81 %", "70 .. 90 %", "")
    table.add_row("onnx-int8", "79 %", "60 .. 88 %", "not packed")
    return table


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_is_legible_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "is_terminal", True)
    show(drawn())
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for word in ("runs/[red]x[/y] on 5 images", "[bold]litert[/x]", "70 .. 90 %", "95 % interval", "not packed"):
        assert word in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert ("  balanced acc.: 79 %" in shown) == (width == 40)
