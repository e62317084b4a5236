"""The README's fleet section, command by command, from a bare board to a camera in the live view.

The walk is the first flash of the boards that other tests take, too: see `conftest.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from .walk import COLUMNS, Walk, commands


def test_the_section_names_each_step_once() -> None:
    assert [command.split()[:2] for command in commands()] == [
        ["eyas", "broker"],
        ["eyas", "enroll"],
        ["make", "flash"],
        ["eyas", "collect"],
        ["eyas", "watch"],
    ]


def test_from_a_bare_board_to_answers(walked: Walk, report: Callable[[str], None]) -> None:
    assert ": flashed: " in walked.flash and "warning" not in walked.flash, walked.flash
    report(walked.flash.strip().splitlines()[-1])
    shown = "\n".join(line.rstrip() for line in walked.screen.splitlines() if line.strip())
    report(f"{walked.seconds:.0f} s from the broker to an answering camera in eyas watch:\n{shown}")
    assert max(map(len, walked.screen.splitlines())) <= COLUMNS
    assert walked.active == "active\n"
    status = json.loads(walked.status)
    assert status["camera"]["state"] == "delivering", status
    assert walked.frames > 0
