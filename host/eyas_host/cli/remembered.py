"""`--set` values are remembered with a run, and a later command with other ones asks before results are cleared."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import typer
from rich.markup import escape

from eyas_host.pipeline.runner import SETTINGS, Due, RunContext, due_stages
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe, run_name
from eyas_host.stages.chain import STAGES
from eyas_host.support.commands import called_again
from eyas_host.support.errors import RecipeError, RunError
from eyas_host.support.files import free_name
from eyas_host.support.progress import about, say

_NAME = "run.name"
"""Says which run it is, so it is not remembered with one."""


def settle(
    path: Path, runs: Path, overrides: Sequence[str], *, stages: Mapping[str, str | None], yes: bool
) -> RunContext:
    """The run of a recipe, with the settings of this command and those that are remembered.

    Args:
        path: The recipe.
        runs: Folder of all runs.
        overrides: `section.key=value`; `section.key=` drops what is remembered, `=` all of it.
        stages: `start` and `only` of the command, which may be cleared, and `until` if it leaves later ones alone.
        yes: Clear finished stages without a question.

    Raises:
        RecipeError: As `load_recipe`.
        RunError: Finished stages would be cleared, and nobody can be asked or the answer was no.

    """
    name = run_name(path, overrides)
    remembered = _read(runs / name / SETTINGS) if name is not None else {}
    given = {key.strip(): value for key, equals, value in (one.partition("=") for one in overrides) if equals}
    inherited = {} if "" in given else remembered
    wanted = {key: value for key, value in {**inherited, **given}.items() if key and (value or key not in remembered)}
    recipe = load_recipe(path, [*(one for one in overrides if "=" not in one), *_texts(wanted)])
    context = RunContext(recipe, runs / recipe.run.name, {k: v for k, v in wanted.items() if k != _NAME})
    kept = {key: value for key, value in wanted.items() if key in remembered and key not in given}
    if kept:
        shown = escape(", ".join(_texts(kept)))
        say(f"  settings remembered with {context.root} (--set KEY= drops one, --set = all): {shown}")
    if not yes and context.settings != remembered and name is not None:
        _ask(path, context, remembered, stages)
    return context


def _ask(path: Path, context: RunContext, remembered: Mapping[str, str], stages: Mapping[str, str | None]) -> None:
    """Ask before stages are cleared that would be kept with the settings of the run."""
    named = [f"{_NAME}={context.recipe.run.name}"]
    try:
        before = RunContext(load_recipe(path, [*named, *_texts(remembered)]), context.root)
    except RecipeError:
        return
    consented = stages.get("only") or stages.get("start")
    names = [stage.name for stage in STAGES]
    last = names.index(consented) if consented in names else len(names)
    kept = {due.name for due in due_stages(STAGES, before, until=stages.get("until")) if not due.reasons}
    cleared = [
        due
        for due in due_stages(STAGES, context, until=stages.get("until"))
        if due.reasons and due.record is not None and due.name in kept and names.index(due.name) < last
    ]
    if not cleared or [due.name for due in cleared] == ["report"]:  # a report is written again in a minute
        return
    why = f"{context.root} was made with other settings: {_changes(context, before.recipe, remembered)}"
    what = f"{_list([due.name for due in cleared])}, {_minutes(cleared)} of work, would be done again"
    if sys.stdin.isatty() and sys.stderr.isatty():
        say(escape(f"{why}. {what[0].upper()}{what[1:]}."))
        if _confirmed():
            return
        raise RunError("nothing was changed")
    raise RunError(
        f"{why}; {what}. Type one of:\n"
        f"  {called_again('--yes')}    to do them again\n"
        f"  {called_again('--set', f'{_NAME}={free_name(context.root).name}')}    to make another run beside it"
    )


def _confirmed() -> bool:
    try:
        return typer.confirm("Do them again?", err=True)
    except typer.Abort:
        return False


def _changes(context: RunContext, before: Recipe, remembered: Mapping[str, str]) -> str:
    """`student.epochs 30 -> 31`."""
    keys = {**context.settings, **remembered}
    values = {key: (_value(before, key), _value(context.recipe, key)) for key in keys}
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in values.items() if old != new)


def _value(recipe: Recipe, key: str) -> str:
    section, _, name = key.partition(".")
    return msgspec.json.encode(getattr(getattr(recipe, section), name)).decode()


def _minutes(cleared: Sequence[Due]) -> str:
    return about(sum(due.record.seconds for due in cleared if due.record is not None))


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _texts(settings: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _read(path: Path) -> dict[str, str]:
    """The settings of a run; none for a new one, or one of an earlier version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}
