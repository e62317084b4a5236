"""Arguments of the host's commands, checked by the host before it sends and by the device before it executes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from eyas_device.errors import EyasError

Arguments = Mapping[str, str | float | bool]

PAUSE_S, MAX_PAUSE_S = 3600.0, 86_400.0
"""Duration of a pause: by default, and at most."""
THRESHOLD_S, MAX_THRESHOLD_S = 86_400.0, 7 * 86_400.0
"""Duration of a changed threshold: by default, and at most."""
UNITS: Mapping[str, float] = {"seconds": 1.0, "minutes": 60.0}
"""Argument that gives a duration -> seconds in one unit of it."""
TAKES: Mapping[str, tuple[str, ...]] = {
    "pause": tuple(UNITS),
    "resume": (),
    "set-thresholds": ("threshold", *UNITS),
    "snapshot": (),
    "bench": (),
    "doctor": (),
}
"""Command -> arguments that it takes."""
LONG_S: Mapping[str, float] = {"bench": 180.0, "doctor": 240.0}
"""Commands that take minutes -> how long to wait for their result."""


class CommandRefused(EyasError):  # noqa: N818 - reads as the outcome it is
    """A command is not executed; the message gives the reason."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of a command, checked."""

    seconds: float = 0.0
    """Duration of a pause or of a changed threshold; 0 for other commands."""
    threshold: float = 0.0
    """New confidence threshold; 0 for other commands."""


def read_arguments(command: str, arguments: Arguments, *, min_threshold: float = 0.0) -> Settings:
    """Check the arguments of a known command and fill in the defaults.

    The most probable of n labels has a probability of 1/n or more, so a threshold that is not above `min_threshold`
    would declare every prediction certain. A host does not know n and checks against 0.

    Raises `CommandRefused` for an argument that the command does not take, or a value that is not allowed.
    """
    allowed = TAKES[command]
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        takes = ", ".join(allowed) if allowed else "no arguments"
        raise CommandRefused(f"{command}: unknown argument {unknown[0][:64]!r}; it takes {takes}")
    if command == "pause":
        return Settings(seconds=_seconds(command, arguments, default_s=PAUSE_S, max_s=MAX_PAUSE_S))
    if command != "set-thresholds":
        return Settings()
    threshold = _number(arguments.get("threshold"))
    if threshold is None or not min_threshold < threshold <= 1:
        given = f"threshold = {arguments['threshold']!r}" if "threshold" in arguments else "no threshold"
        reason = ", because at less no prediction would be uncertain" if min_threshold else ""
        raise CommandRefused(f"{command}: {given}; a number above {min_threshold:.3g} to 1 is needed{reason}")
    seconds = _seconds(command, arguments, default_s=THRESHOLD_S, max_s=MAX_THRESHOLD_S)
    return Settings(threshold=threshold, seconds=seconds)


def _number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _seconds(command: str, arguments: Arguments, *, default_s: float, max_s: float) -> float:
    given = [unit for unit in UNITS if unit in arguments]
    if not given:
        return default_s
    unit = given[0]
    number = _number(arguments[unit])
    if len(given) > 1 or number is None or not 0 < number * UNITS[unit] <= max_s:
        raise CommandRefused(
            f"{command}: {unit} = {arguments[unit]!r}; either seconds, above 0 to {max_s:g}, "
            f"or minutes, above 0 to {max_s / 60:g}, are allowed"
        )
    return number * UNITS[unit]
