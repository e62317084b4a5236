"""Strict TOML files: a frozen struct per section, and all errors of a file reported at once.

The host's recipe and the device's configuration are read this way; messages and manifests, which another version may
have written, are read leniently instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

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
    homes = _homes(kind)
    for name, value in tree.items():
        if name not in known:
            errors.append(_is_now(f"[{name}]", renamed) or _unknown_section(name, value, known, homes))
    for name, field in known.items():
        if (item := _item_of(field.type)) is not None:
            if name in tree:
                sections[name], more = _tables(name, item, tree[name], renamed, homes)
                errors += more
            continue
        table = tree.get(name, {})
        if not isinstance(table, dict):
            errors.append(f"[{name}]: must be a section, not {type(table).__name__}")
            continue
        values, more = _section(name, field.type, table, renamed, homes)
        errors += more
        if all(f.name in values for f in msgspec.structs.fields(field.type) if f.required):
            sections[name] = field.type(**values)
    return sections, errors


def _item_of(kind: Any) -> type[msgspec.Struct] | None:
    """The struct of a field that is a tuple of sections, `[[name]]` in the file; None for a plain section."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def _tables(
    name: str, kind: type[msgspec.Struct], tables: Any, renamed: Mapping[str, str], homes: Mapping[str, list[str]]
) -> tuple[tuple[msgspec.Struct, ...], list[str]]:
    """Convert an array of tables; an error names the table by its number, from 1."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return (), [f"[[{name}]]: must be tables, each below a line [[{name}]]"]
    found, errors = [], []
    for number, table in enumerate(tables, 1):
        values, more = _section(f"{name} {number}", kind, table, renamed, homes)
        errors += more
        if all(f.name in values for f in msgspec.structs.fields(kind) if f.required):
            found.append(kind(**values))
    return tuple(found), errors


def did_you_mean(name: str, allowed: Collection[str]) -> str:
    """`did you mean 'source'? ` for the allowed name that is closest to `name`; empty if none is close.

    >>> did_you_mean("Time-out_s", ["source", "timeout_s"])
    "did you mean 'timeout_s'? "
    """
    forms = {_plain(one): one for one in allowed}
    close = get_close_matches(_plain(name), forms, n=1)
    return f"did you mean {forms[close[0]]!r}? " if close else ""


def error_report(source: object, errors: list[str]) -> str:
    """Format the errors of a file: its name and their number, then one line per error."""
    return f"{source}: {len(errors)} error{'s' * (len(errors) > 1)}\n" + "\n".join(f"  {error}" for error in errors)


def _section(
    name: str, kind: Any, table: dict[str, Any], renamed: Mapping[str, str], homes: Mapping[str, list[str]]
) -> tuple[dict[str, Any], list[str]]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    errors = [
        _is_now(f"[{name}] {key}", renamed) or f"[{name}] {key}: unknown key; {_instead(key, fields, homes)}"
        for key in table
        if key not in fields
    ]
    for key, field in fields.items():
        if key in table:
            try:
                values[key] = msgspec.convert(table[key], field.type)
            except msgspec.ValidationError as error:
                old = f"[{name}] {key} = {json.dumps(table[key], default=str)}"
                errors.append(
                    _is_now(old, renamed) or f"[{name}] {key} = {table[key]!r}: {_describe(error, field.type)}"
                )
        elif field.required:
            errors.append(f"[{name}] {key}: missing")
    return values, errors


def _homes(kind: type[msgspec.Struct]) -> dict[str, list[str]]:
    """Key -> the headings of the sections that have it."""
    homes: dict[str, list[str]] = {}
    for section in msgspec.structs.fields(kind):
        item = _item_of(section.type)
        heading = f"[[{section.name}]]" if item else f"[{section.name}]"
        for key in msgspec.structs.fields(item or section.type):
            homes.setdefault(key.name, []).append(heading)
    return homes


def _instead(key: str, fields: Collection[str], homes: Mapping[str, list[str]]) -> str:
    """What to write instead of an unknown key: another section, a close name or one of all that are allowed."""
    if key in homes:
        return f"it belongs to {' or '.join(homes[key])}"
    return f"{did_you_mean(key, fields)}allowed: {', '.join(fields)}"


def _unknown_section(name: str, value: object, known: Collection[str], homes: Mapping[str, list[str]]) -> str:
    if not isinstance(value, dict | list) and name in homes:
        return f"{name}: a key needs its section; it belongs below {' or '.join(homes[name])}"
    return f"[{name}]: unknown section; {did_you_mean(name, known)}allowed: {', '.join(known)}"


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")


def _is_now(old: str, renamed: Mapping[str, str]) -> str:
    return f"{old} is now {renamed[old]}" if old in renamed else ""


def _describe(error: msgspec.ValidationError, kind: Any) -> str:
    text = str(error).replace("`", "").replace("Expected", "must be")
    if match := re.fullmatch(r"Invalid enum value (.*?)( - at .*)?", text):
        choices = [str(choice) for choice in _choices(kind)]
        return f"must be one of {', '.join(choices)}; {did_you_mean(match[1], choices)}".rstrip("; ")
    return text


def _choices(kind: Any) -> list[Any]:
    """The values of every `Literal` within a type, and "a number" for one."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if kind is float:
        return ["a number"]
    return [choice for argument in get_args(kind) for choice in _choices(argument)]
