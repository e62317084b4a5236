"""Reports without the paths of the machine that wrote them: images relative to their source, settings by their name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:  # without torch for the pages that need no training
    from eyas_host.report.model import Report

_Value = TypeVar("_Value")


def portable(report: Report, roots: Iterable[Path | str]) -> Report:
    """The report without `roots`; paths in the recipe keep their last part, that of the test log its last three.

    The machines of the stages stay: processor, cores and system say what a figure was measured on, and name no host.
    """
    shown = without_roots(report, roots)
    return msgspec.structs.replace(
        shown,
        recipe=_mapped(shown.recipe, lambda text: Path(text).name if Path(text).is_absolute() else text),
        test_log="/".join(Path(shown.test_log).parts[-3:]) if Path(shown.test_log).is_absolute() else shown.test_log,
    )


def without_roots(value: _Value, roots: Iterable[Path | str]) -> _Value:
    """The same structure with each of the absolute folders `roots`, wherever a text names one, cut to its last part.

    What remains of the working directory is cut likewise; the home folder becomes `~`.
    """
    folders = [Path(root) for root in (*roots, Path.cwd())]
    names = {str(path): folder.name for folder in folders for path in (folder, folder.resolve())}
    names |= {str(_home()): "~"}
    longest_first = sorted((root for root in names if root.startswith("/") and len(root) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w./~-]){re.escape(root)}(?![\w-])" for root in longest_first))
    result: _Value = _mapped(value, lambda text: pattern.sub(lambda found: names[found.group()], text))
    return result


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry and without HOME
        return Path("/")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed; keys of mappings stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, msgspec.Struct):
        fields = {name: _mapped(getattr(value, name), change) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
