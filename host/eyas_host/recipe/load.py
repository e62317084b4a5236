"""Read a recipe file, apply `--set` overrides, and report every error at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from eyas_device.support.toml import convert, error_report, parse
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment_rules import augment_errors, without_forbidden
from eyas_host.recipe.checks import combination_errors
from eyas_host.recipe.run import NAME, RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.addresses import is_url
from eyas_host.support.errors import RecipeError

RENAMED = {
    "[picture]": "[image]",
    "[run] metric": "[run] selection_metric",
    '[run] selection_metric = "objective"': '[run] selection_metric = "combined"',
    '[teacher] weights = "warm"': '[teacher] weights = "pretrained"',
    '[student] weights = "warm"': '[student] weights = "pretrained"',
    "[student] ready": "[student] checkpoint",
    "[student] hint": "[student] feature_loss",
    "[student] hints": "[student] feature_layers",
    "[pack] pictures": "[pack] images",
}
"""Sections, keys and values of earlier versions -> what they are called now."""

_Training = TypeVar("_Training", TeacherSection, StudentSection)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A TOML file; relative paths in it are resolved against its folder.
        overrides: `section.key=value`, values as in TOML; bare words are strings.

    Raises:
        RecipeError: Lists every error with file, section, key and what would be allowed.

    >>> recipe = load_recipe("models/shapes/recipe.toml", ["run.seed=1", "teacher.epochs=2"])
    >>> recipe.run.name, recipe.run.seed, recipe.teacher.epochs
    ('shapes', 1, 2)

    """
    path = Path(path)
    tree = _read(path)
    errors = [error for override in overrides for error in _override(tree, override)]
    sections, more = convert(tree, Recipe, RENAMED)
    recipe = Recipe(**({"run": RunSection(name="unnamed")} | sections))
    errors += [*more, *augment_errors(recipe.augment, tree.get("augment"))]
    recipe = _resolve_paths(recipe, path.resolve().parent)
    recipe = msgspec.structs.replace(recipe, augment=without_forbidden(recipe.augment))
    errors += combination_errors(recipe)
    if errors:
        raise RecipeError(error_report(path, errors))
    return recipe


def run_name(path: Path | str, overrides: Sequence[str] = ()) -> str | None:
    """The `[run] name` of a recipe that need not be valid otherwise, None without one."""
    tree = _read(Path(path))
    for override in overrides:
        list(_override(tree, override))
    run = tree.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    return name if isinstance(name, str) and re.fullmatch(NAME, name) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text (UTF-16?); save it as UTF-8"
        raise RecipeError(f"{path}: {reason}; a recipe is a TOML file, `eyas new FOLDER` writes one") from None
    try:
        return parse(text)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _override(tree: dict[str, Any], override: str) -> Iterable[str]:
    """Put one `section.key=value` into the tree; yields an error if it has another form."""
    target, equals, value = override.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        yield f"--set {override}: the form is section.key=value{_sections_of(target.strip())}"
        return
    try:
        parsed = parse(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    branch = tree.setdefault(section, {})
    if isinstance(branch, dict):
        branch[key] = parsed


def _sections_of(key: str) -> str:
    """`, e.g. teacher.epochs=2 or student.epochs=2`: the settings called `key` without its section."""
    fields = msgspec.structs.fields(Recipe)
    names = [f"{field.name}.{key}" for field in fields if key in field.type.__struct_fields__]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Resolve every relative path against `base`."""
    data = recipe.data
    return msgspec.structs.replace(
        recipe,
        data=msgspec.structs.replace(
            data,
            keep=_resolve(base, data.keep),
            path=data.path if data.source == "elpv" else _resolve(base, data.path),
            more=tuple(msgspec.structs.replace(source, path=_resolve(base, source.path)) for source in data.more),
        ),
        teacher=_resolve_weights(recipe.teacher, base),
        student=_resolve_weights(
            msgspec.structs.replace(recipe.student, checkpoint=_resolve(base, recipe.student.checkpoint)), base
        ),
        prune=msgspec.structs.replace(recipe.prune, table=_resolve(base, recipe.prune.table)),
    )


def _resolve_weights(section: _Training, base: Path) -> _Training:
    return msgspec.structs.replace(section, weights_file=_resolve(base, section.weights_file))


def _resolve(base: Path, path: str) -> str:
    return path if is_url(path) else str(base / path) if path else ""
