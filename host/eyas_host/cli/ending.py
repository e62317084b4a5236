"""The last lines of the main job: whether to ship, where the report is, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.markup import escape

from eyas_host.pipeline.runner import BUNDLE, REPORT, RunContext
from eyas_host.support.commands import command
from eyas_host.support.progress import say

_COLOURS = {"ship": "green", "look": "yellow", "do not ship": "red"}
_SHOWN = 1
"""Reasons of the verdict; the report has all of them."""


def show_ending(context: RunContext) -> None:
    """Print the verdict, the accuracy and its split, the report's address, and the next commands."""
    report = msgspec.json.decode((context.root / REPORT).read_bytes(), type=dict[str, Any])
    bundle = context.root / BUNDLE
    if ship := report.get("ship"):
        reasons = ship["reasons"][:_SHOWN]
        more = f" (and {len(ship['reasons']) - _SHOWN} more in the report)" if len(ship["reasons"]) > _SHOWN else ""
        colour = _COLOURS.get(ship["verdict"], "yellow")
        _line("verdict", f"[{colour}]{escape(ship['verdict'])}[/{colour}]: {escape('; '.join(reasons) + more)}")
    _line("accuracy", escape(accuracy(report)))
    _line("report", (context.root / "report.html").resolve().as_uri())
    frames = context.root / "validation"
    images = frames if frames.is_dir() else Path("IMAGES")
    tried = command("eyas-device", "run", "--bundle", bundle, "--camera", f"folder:{images}", "--accuracy")
    _line("try it", escape(tried))
    _line("flash it", escape(command("eyas", "flash", "USER@HOST", "--name", "NAME", "--bundle", bundle)))


def accuracy(report: dict[str, Any]) -> str:
    """`balanced accuracy 0.871 on 90 held-out test images (validation 0.890): litert-int8`."""
    on_test, on_validation = (
        next((row for row in report[name] if row["name"] == report["shipped"]), None)
        for name in ("variants", "validation_variants")
    )
    if on_test is None:
        return "not measured"
    images = sum(report["counts"]["test"].values())
    beside = f" (validation {on_validation['balanced_accuracy']:.3f})" if on_validation is not None else ""
    return (
        f"balanced accuracy {on_test['balanced_accuracy']:.3f} on {images} held-out test images{beside}: "
        f"{report['shipped']}"
    )


def _line(what: str, text: str) -> None:
    say(f"[bold]{what:9}[/bold] {text}")
