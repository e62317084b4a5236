"""Strict TOML files: a frozen struct per section, and all errors of a file reported at once.

The host's recipe and the device's configuration are read this way; messages and manifests, which another version may
have written, are read leniently instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of a file: every key has a type and, mostly, a default."""


def parse(text: str) -> dict[str, Any]:
    """Parse TOML into nested dictionaries. Raises `ValueError` with the position of a syntax error."""
    try:
        tree: dict[str, Any] = msgspec.toml.decode(text)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors too
        raise ValueError(f"not TOML: {error}") from None
    return tree


def convert(
    tree: dict[str, Any], kind: type[msgspec.Struct], renamed: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Convert the sections in `tree` to the structs of `kind`, whose fields are sections; also returns all errors.

    Each key is converted separately, so that one error does not hide the next. An invalid key keeps its default, and a
    section without a required key is left out. `renamed` maps `[section]`, `[section] key` or `[section] key = value`
    (the value as JSON) of an earlier version to its present name.
    """
    renamed = renamed or {}
    errors: list[str] = []
    sections: dict[str, Any] = {}
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in tree:
        if name not in known:
            errors.append(_is_now(f"[{name}]", renamed) or f"[{name}]: unknown section; allowed: {', '.join(known)}")
    for name, field in known.items():
        if (item := _item_of(field.type)) is not None:
            if name in tree:
                sections[name], more = _tables(name, item, tree[name], renamed)
                errors += more
            continue
        table = tree.get(name, {})
        if not isinstance(table, dict):
            errors.append(f"[{name}]: must be a section, not {type(table).__name__}")
            continue
        values, more = _section(name, field.type, table, renamed)
        errors += more
        if all(f.name in values for f in msgspec.structs.fields(field.type) if f.required):
            sections[name] = field.type(**values)
    return sections, errors


def _item_of(kind: Any) -> type[msgspec.Struct] | None:
    """The struct of a field that is a tuple of sections, `[[name]]` in the file; None for a plain section."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def _tables(
    name: str, kind: type[msgspec.Struct], tables: Any, renamed: Mapping[str, str]
) -> tuple[tuple[msgspec.Struct, ...], list[str]]:
    """Convert an array of tables; an error names the table by its number, from 1."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return (), [f"[[{name}]]: must be tables, each below a line [[{name}]]"]
    found, errors = [], []
    for number, table in enumerate(tables, 1):
        values, more = _section(f"{name} {number}", kind, table, renamed)
        errors += more
        if all(f.name in values for f in msgspec.structs.fields(kind) if f.required):
            found.append(kind(**values))
    return tuple(found), errors


def error_report(source: object, errors: list[str]) -> str:
    """Format the errors of a file: its name and their number, then one line per error."""
    return f"{source}: {len(errors)} error{'s' * (len(errors) > 1)}\n" + "\n".join(f"  {error}" for error in errors)


def _section(
    name: str, kind: Any, table: dict[str, Any], renamed: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    errors = [
        _is_now(f"[{name}] {key}", renamed) or f"[{name}] {key}: unknown key; allowed: {', '.join(fields)}"
        for key in table
        if key not in fields
    ]
    for key, field in fields.items():
        if key in table:
            try:
                values[key] = msgspec.convert(table[key], field.type)
            except msgspec.ValidationError as error:
                old = f"[{name}] {key} = {json.dumps(table[key], default=str)}"
                errors.append(_is_now(old, renamed) or f"[{name}] {key} = {table[key]!r}: {_describe(error)}")
        elif field.required:
            errors.append(f"[{name}] {key}: missing")
    return values, errors


def _is_now(old: str, renamed: Mapping[str, str]) -> str:
    return f"{old} is now {renamed[old]}" if old in renamed else ""


def _describe(error: msgspec.ValidationError) -> str:
    return str(error).replace("`", "").replace("Expected", "must be").replace("Invalid enum value", "not allowed:")
