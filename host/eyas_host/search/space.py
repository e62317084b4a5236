"""The search space: settings of the recipe, the values to try, and how Optuna samples them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from optuna.trial import Trial

from eyas_host.recipe import Recipe
from eyas_host.recipe.tune import TuneSection

What = Literal["teacher", "student"]
Value = float | int | str
Settings = Mapping[str, Value]
"""`section.key` of the recipe -> value."""

_LISTS: dict[What, dict[str, str]] = {
    "teacher": {
        "teacher.rate": "rates",
        "teacher.batch": "batches",
        "teacher.unfreeze": "unfreeze",
        "teacher.layer_decay": "layer_decays",
        "teacher.weight_decay": "weight_decays",
    },
    "student": {
        "student.rate": "student_rates",
        "student.kd_ratio": "kd_ratios",
        "student.temperature": "temperatures",
    },
}
"""Setting of the recipe -> list of `[tune]`."""
_LOG_SCALE = ("teacher.rate", "student.rate", "student.temperature", "teacher.weight_decay")
"""Searched on a logarithmic scale unless zero is among the values."""


def space(tune: TuneSection, what: What) -> dict[str, list[Value]]:
    """Setting -> distinct values to try, in order; settings with an empty list are left out."""
    lists = {key: list(dict.fromkeys(getattr(tune, name))) for key, name in _LISTS[what].items()}
    return {key: values for key, values in lists.items() if values}


def grid_size(values: Mapping[str, list[Value]]) -> int:
    """Number of grid combinations."""
    return math.prod(len(some) for some in values.values())


def suggest_settings(trial: Trial, values: Mapping[str, list[Value]], *, between: bool) -> dict[str, Value]:
    """Sample a trial's settings: one of the values each, or with `between` any number from minimum to maximum."""
    settings: dict[str, Value] = {}
    for key, some in values.items():
        numbers = [float(value) for value in some if isinstance(value, float)]
        if between and len(numbers) == len(some) > 1:
            log = key in _LOG_SCALE and min(numbers) > 0
            settings[key] = trial.suggest_float(key, min(numbers), max(numbers), log=log)
        else:
            value: Any = trial.suggest_categorical(key, some)
            settings[key] = value
    return settings


def own_settings(recipe: Recipe, values: Mapping[str, list[Value]]) -> dict[str, Value] | None:
    """The recipe's own settings; None if one of them is outside the search space."""
    own: dict[str, Value] = {}
    for key, some in values.items():
        section, _, name = key.partition(".")
        own[key] = getattr(getattr(recipe, section), name)
        numbers = [value for value in some if isinstance(value, float)]
        inside = min(numbers) <= float(own[key]) <= max(numbers) if len(numbers) == len(some) > 1 else own[key] in some
        if not inside:
            return None
    return own


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with a trial's settings."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = msgspec.structs.replace(getattr(recipe, section), **{name: value})
        recipe = msgspec.structs.replace(recipe, **{section: changed})
    return recipe


def format_overrides(settings: Settings) -> str:
    """The settings as command-line options."""
    overrides = (shlex.quote(f"{key}={_toml(value)}") for key, value in settings.items())
    return " ".join(f"--set {override}" for override in overrides)


def format_toml(settings: Settings) -> str:
    """The settings as TOML sections of a recipe."""
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml(value)}")
    return "\n".join(line for section, lines in sections.items() for line in (f"[{section}]", *lines)) + "\n"


def _toml(value: Value) -> str:
    """A number or string in TOML, which has the same form in JSON."""
    return msgspec.json.encode(value).decode()
