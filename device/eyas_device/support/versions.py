"""Version numbers."""

from __future__ import annotations

import re


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.14.0rc1` -> (2, 14, 0); (0,) if there are none."""
    match = re.match(r"\d{1,9}(\.\d{1,9})*", version, re.ASCII)
    return tuple(int(number) for number in match.group().split(".")) if match else (0,)
