"""Read a recipe file, apply `--set` overrides, and report every error at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.support.toml import convert, parse, told
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment_rules import allowed, forbidden
from eyas_host.recipe.checks import impossible
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.training import with_weights_beside
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.support.errors import RecipeError


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and `section.key=value` overrides (values as in TOML, bare words are strings).

    Raises `RecipeError` that lists every fault: file, section, key and what would be allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: {reason}; a recipe is a TOML file, `eyas new FOLDER` writes one") from None
    try:
        tree = parse(text)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    faults = [fault for override in overrides for fault in _override(tree, override)]
    sections, more = convert(tree, Recipe)
    faults += more
    recipe = Recipe(**({"run": RunSection(name="unnamed")} | sections))
    base = path.resolve().parent
    recipe = msgspec.structs.replace(recipe, data=_beside(recipe.data, base))
    faults += forbidden(recipe.augment, tree.get("augment"))
    recipe = msgspec.structs.replace(recipe, augment=allowed(recipe.augment))
    if recipe.prune.table:
        table = msgspec.structs.replace(recipe.prune, table=str(base / recipe.prune.table))
        recipe = msgspec.structs.replace(recipe, prune=table)
    if recipe.student.ready:
        student = msgspec.structs.replace(recipe.student, ready=str(base / recipe.student.ready))
        recipe = msgspec.structs.replace(recipe, student=student)
    recipe = msgspec.structs.replace(
        recipe,
        teacher=with_weights_beside(recipe.teacher, base),
        student=with_weights_beside(recipe.student, base),
    )
    faults += impossible(recipe)
    if faults:
        raise RecipeError(told(path, faults))
    return recipe


def _override(tree: dict[str, Any], override: str) -> Iterable[str]:
    """Put one `section.key=value` into the tree; yields a fault if it has another form."""
    target, equals, value = override.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        yield f"--set {override}: the form is section.key=value"
        return
    try:
        parsed = parse(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    branch = tree.setdefault(section, {})
    if isinstance(branch, dict):
        branch[key] = parsed


def _beside(data: DataSection, base: Path) -> DataSection:
    """The same with every path beside the recipe."""
    more = tuple(msgspec.structs.replace(one, path=str(base / one.path)) for one in data.more)
    path = str(base / data.path) if data.path and data.source != "elpv" else data.path
    return msgspec.structs.replace(data, path=path, more=more)
