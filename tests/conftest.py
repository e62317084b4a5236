"""What holds for every test: the header names the system parts that are missing."""

from __future__ import annotations

from tests.support.system_parts import PARTS, is_there


def pytest_report_header() -> list[str]:
    """One line on the system parts, before the first test."""
    missing = [part.program for part in PARTS if not is_there(part)]
    return [f"system parts: {'missing ' + ', '.join(missing) + ' (make system-deps)' if missing else 'all there'}"]
