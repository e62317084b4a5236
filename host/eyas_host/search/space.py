"""What a search may change: settings of the recipe, the values to try, and how Optuna is to draw them."""

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
_BY_FACTORS = ("teacher.rate", "student.rate", "student.temperature", "teacher.weight_decay")
"""Searched on a logarithmic scale where zero is not among the values."""


def space(tune: TuneSection, what: What) -> dict[str, list[Value]]:
    """Setting -> values to try, each once and in their order; settings with an empty list are left out."""
    lists = {key: list(dict.fromkeys(getattr(tune, name))) for key, name in _LISTS[what].items()}
    return {key: values for key, values in lists.items() if values}


def size(values: Mapping[str, list[Value]]) -> int:
    """Combinations of the grid."""
    return math.prod(len(some) for some in values.values())


def draw(trial: Trial, values: Mapping[str, list[Value]], *, between: bool) -> dict[str, Value]:
    """The settings of a trial: one of the values each, or with `between` any number from the least to the most."""
    drawn: dict[str, Value] = {}
    for key, some in values.items():
        numbers = [float(value) for value in some if isinstance(value, float)]
        if between and len(numbers) == len(some) > 1:
            log = key in _BY_FACTORS and min(numbers) > 0
            drawn[key] = trial.suggest_float(key, min(numbers), max(numbers), log=log)
        else:
            chosen: Any = trial.suggest_categorical(key, some)
            drawn[key] = chosen
    return drawn


def present(recipe: Recipe, values: Mapping[str, list[Value]]) -> dict[str, Value] | None:
    """The recipe's own settings, None where one of them is not among what is tried."""
    own: dict[str, Value] = {}
    for key, some in values.items():
        section, _, name = key.partition(".")
        own[key] = getattr(getattr(recipe, section), name)
        numbers = [value for value in some if isinstance(value, float)]
        inside = min(numbers) <= float(own[key]) <= max(numbers) if len(numbers) == len(some) > 1 else own[key] in some
        if not inside:
            return None
    return own


def applied(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the settings of a trial."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = msgspec.structs.replace(getattr(recipe, section), **{name: value})
        recipe = msgspec.structs.replace(recipe, **{section: changed})
    return recipe


def as_overrides(settings: Settings) -> str:
    """The settings as words of the command line."""
    words = (shlex.quote(f"{key}={_toml(value)}") for key, value in settings.items())
    return " ".join(f"--set {word}" for word in words)


def as_toml(settings: Settings) -> str:
    """The settings as sections of a recipe."""
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml(value)}")
    return "\n".join(line for section, lines in sections.items() for line in (f"[{section}]", *lines)) + "\n"


def _toml(value: Value) -> str:
    """A number or a word in TOML, which writes them as JSON does."""
    return msgspec.json.encode(value).decode()
