"""Strict TOML files: frozen structs for the sections, and every fault of a file told at once.

Both the workstation's recipe and the device's configuration are read this way; messages and manifests, which another
version may have written, are read leniently instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of a file: every key has a type and, mostly, a default."""


def parse(text: str) -> dict[str, Any]:
    """The tree of a TOML text. Raises `ValueError` saying where it is not TOML."""
    try:
        tree: dict[str, Any] = msgspec.toml.decode(text)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors too
        raise ValueError(f"not TOML: {error}") from None
    return tree


def convert(
    tree: dict[str, Any], kind: type[msgspec.Struct], renamed: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The sections of `kind` (a struct whose fields are sections) found in `tree`, and all faults.

    Each section is converted by itself, so that one fault does not hide the next; a faulty key keeps its default, and a
    section that lacks a required key is left out. `renamed` maps `[section]`, `[section] key` or `[section] key =
    value` (the value as JSON) of an earlier version to what it is called now.
    """
    renamed = renamed or {}
    faults: list[str] = []
    sections: dict[str, Any] = {}
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in tree:
        if name not in known:
            faults.append(_is_now(f"[{name}]", renamed) or f"[{name}]: unknown section; allowed: {', '.join(known)}")
    for name, field in known.items():
        given = tree.get(name, {})
        if not isinstance(given, dict):
            faults.append(f"[{name}]: must be a section, not {type(given).__name__}")
            continue
        values, more = _section(name, field.type, given, renamed)
        faults += more
        if all(f.name in values for f in msgspec.structs.fields(field.type) if f.required):
            sections[name] = field.type(**values)
    return sections, faults


def told(source: object, faults: list[str]) -> str:
    """One text that names the file and lists all of its faults, a line each."""
    return f"{source}: {len(faults)} fault{'s' * (len(faults) > 1)}\n" + "\n".join(f"  {f}" for f in faults)


def _section(
    name: str, kind: Any, given: dict[str, Any], renamed: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    faults = [
        _is_now(f"[{name}] {key}", renamed) or f"[{name}] {key}: unknown key; allowed: {', '.join(fields)}"
        for key in given
        if key not in fields
    ]
    for key, field in fields.items():
        if key in given:
            try:
                values[key] = msgspec.convert(given[key], field.type)
            except msgspec.ValidationError as error:
                old = f"[{name}] {key} = {json.dumps(given[key], default=str)}"
                faults.append(_is_now(old, renamed) or f"[{name}] {key} = {given[key]!r}: {_plain(error)}")
        elif field.required:
            faults.append(f"[{name}] {key}: missing")
    return values, faults


def _is_now(old: str, renamed: Mapping[str, str]) -> str:
    return f"{old} is now {renamed[old]}" if old in renamed else ""


def _plain(error: msgspec.ValidationError) -> str:
    return str(error).replace("`", "").replace("Expected", "must be").replace("Invalid enum value", "not allowed:")
