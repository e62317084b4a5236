"""Values on the command line: each function reads one and says what is allowed."""

from __future__ import annotations

import argparse
import re

from eyas_device.support import names


def count(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0 is needed")
    return int(text)


def number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return value


def share(text: str) -> float:
    """A part of a whole, above 0 to 1."""
    value = number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 to 1 is needed")
    return value


def window(text: str) -> float:
    """Seconds, 0.1 or more."""
    value = number(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"{text!r}: 0.1 s or more is needed")
    return value


def name(text: str) -> str:
    """One level of a topic."""
    try:
        return names.check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cores(text: str) -> tuple[int, ...]:
    """Numbers of processor cores: `0`, `2,3` or `0-3`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r}: numbers of cores are needed, such as 0, 2,3 or 0-3")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(numbers))


def broker(text: str) -> tuple[str, int]:
    """HOST or HOST:PORT."""
    try:
        return names.parse_broker(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
