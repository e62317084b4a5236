"""Types of command-line values, for `argparse`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from eyas_device.support import names
from eyas_device.support.files import expand_home


def path(text: str) -> Path:
    """A path; `~` is the home folder also where the shell leaves it alone, as in `--config=~/device.toml`."""
    return Path(expand_home(text))


def positive_int(text: str) -> int:
    """An integer above 0."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: an integer above 0 is needed")
    return int(text)


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return value


def seconds(text: str) -> float:
    """A time in seconds, 0 or more."""
    return 0.0 if re.fullmatch(r"0+(\.0+)?", text, re.ASCII) else positive_number(text)


def fraction(text: str) -> float:
    """A fraction, above 0 to 1."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 to 1 is needed")
    return value


def window_s(text: str) -> float:
    """Length of a telemetry window, 0.1 s or more."""
    value = positive_number(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"{text!r}: 0.1 s or more is needed")
    return value


def site(text: str) -> str:
    """Name of a site."""
    return _named(names.check_site, text)


def device(text: str) -> str:
    """Name of a device."""
    return _named(names.check_name, text)


def cores(text: str) -> tuple[int, ...]:
    """Processor core numbers: `0`, `2,3` or `0-3`."""
    numbers: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r}: core numbers are needed, such as 0, 2,3 or 0-3")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(numbers))


def _named(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
