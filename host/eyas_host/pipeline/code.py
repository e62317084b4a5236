"""The code that a stage consists of, and the libraries that it imports.

Both are found in the source files, without importing anything: a module, all modules of Eyas that it imports, at the
top, inside functions or by name (`"eyas_device.runtimes.litert:LiteRT"`), and so on. The hash is that of the syntax
trees without docstrings, so that documentation, comments and layout change nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("eyas_host", "eyas_device")

_WITHOUT_EFFECT = (
    *("eyas_device.errors", "eyas_host.support"),
    *(f"eyas_host.pipeline.{name}" for name in ("clock", "code", "lock", "memory", "runner")),
)
"""Modules that no result depends on: files, progress, errors, the runner itself."""
_LIBRARIES_WITHOUT_EFFECT = frozenset(
    ("elpv_dataset", "huggingface_hub", "jinja2", "markupsafe", "matplotlib", "msgspec", "rich", "safetensors")
)
"""Libraries that no result depends on: containers, drawing, downloads; the images themselves are hashed."""
_MODULE = re.compile(r"(\w+(?:\.\w+)+)(?::\w+)?")
"""`package.module` or `package.module:Name`."""


class Dependencies(NamedTuple):
    """What a module's results depend on, besides files and settings."""

    code: str
    """Hash of its code and of all code of Eyas that it imports."""
    libraries: dict[str, str]
    """Distribution -> version, of all libraries that this code imports; `not installed` for a missing one."""


class _Source(NamedTuple):
    digest: str
    imports: frozenset[tuple[str, str | None]]
    """(module, imported name or empty); None instead of a name for text that may be a module."""


def dependencies(module: str, packages: Sequence[str] = PACKAGES) -> Dependencies:
    """Code and libraries of `module`, within `packages`."""
    code, libraries = _closure(module, packages)
    return Dependencies(code, _versions(set(libraries - _LIBRARIES_WITHOUT_EFFECT)))


def imported_modules(module: str, packages: Sequence[str] = PACKAGES) -> frozenset[str]:
    """Top-level modules of other distributions that `module`, and what it imports of `packages`, import somewhere."""
    return _closure(module, packages)[1]


@functools.cache
def _closure(module: str, packages: Sequence[str]) -> tuple[str, frozenset[str]]:
    """Hash of the code of `module`, and the libraries that it imports, within `packages`."""
    digests: dict[str, str] = {}
    libraries: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name, packages)
        if path is None or name in digests or f"{name}.".startswith(tuple(f"{skip}." for skip in _WITHOUT_EFFECT)):
            continue
        source = _read(path)
        digests[name] = source.digest
        for imported, attribute in source.imports:
            if imported.split(".")[0] in packages:
                submodule = f"{imported}.{attribute}"
                waiting.append(submodule if _file(submodule, packages) else imported)
            elif attribute is not None:
                libraries.add(imported.split(".")[0])
    code = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
    return code, frozenset(libraries - sys.stdlib_module_names)


def _file(module: str, packages: Sequence[str]) -> Path | None:
    """The source file of a module of `packages`; None if there is none."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package) if package in packages else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *rest)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@functools.cache
def _read(path: Path) -> _Source:
    """Hash and imports of a source file; templates beside it belong to it."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(body, list):
                body[:] = [statement for statement in body if not _is_docstring(statement)]
    digest = hashlib.sha256(ast.dump(tree).encode())
    for template in sorted(path.parent.glob("*.j2")):
        digest.update(template.read_bytes())
    return _Source(digest.hexdigest(), frozenset(_imports(tree)))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Imports and names of modules below a syntax node, without those for type checkers alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from ((node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Constant) and (match := _MODULE.fullmatch(str(node.value))):
        yield match[1], None
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Module -> distributions that contain it."""
    return packages_distributions()


def _versions(modules: set[str]) -> dict[str, str]:
    installed = _distributions()
    found = {name: installed.get(name, ()) for name in modules}
    missing = {name: "not installed" for name, distributions in found.items() if not distributions}
    return missing | {name: version(name) for name in sorted({n for names in found.values() for n in names})}
