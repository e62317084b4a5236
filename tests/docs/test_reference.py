"""The reference pages have every key, message and verb of the code."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any, get_args, get_origin

import msgspec
import pytest

from eyas_device.config import Config
from eyas_device.telemetry.messages import KINDS, Ack, Command
from eyas_host.fleet.rollout.plan import Plan
from eyas_host.recipe import Recipe
from tests.support.paths import ROOT

_EXTENSIONS = ROOT / "docs" / "_ext"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    sys.path.insert(0, str(_EXTENSIONS))
    try:
        return importlib.import_module("reference").pages()
    finally:
        sys.path.remove(str(_EXTENSIONS))


def _values(section: Any) -> Any:
    """The struct of a section; of each of them where there may be several."""
    return get_args(section)[0] if get_origin(section) is tuple else section


@pytest.mark.parametrize(("page", "kind"), [("recipe", Recipe), ("device-toml", Config), ("rollout-plan", Plan)])
def test_every_key_of_every_section(pages: dict[str, str], page: str, kind: type[msgspec.Struct]) -> None:
    sections = {name.strip("[]"): text for name, text in zip(*[iter(_split(pages[page], "## `["))] * 2, strict=True)}
    for section in msgspec.structs.fields(kind):
        for field in msgspec.structs.fields(_values(section.type)):
            assert f"| `{field.name}` |" in sections[section.name], f"[{section.name}] {field.name}"


def test_every_field_of_every_message(pages: dict[str, str]) -> None:
    messages = dict(zip(*[iter(_split(pages["messages"], "## ", "\n"))] * 2, strict=True))
    for kind in (*KINDS.values(), Ack, Command):
        for field in msgspec.structs.fields(kind):
            assert f"| `{field.name}` |" in messages[kind.__name__], f"{kind.__name__}.{field.name}"


def test_every_key_and_field_is_explained(pages: dict[str, str]) -> None:
    for page in ("recipe", "device-toml", "rollout-plan", "messages"):
        assert re.findall(r"^\| `(\w+)` \|.*\|  \|$", pages[page], re.MULTILINE) == [], page


def test_a_row_has_type_range_default_and_docstring(pages: dict[str, str]) -> None:
    assert "| `seed` | integer, 0 to 2,147,483,647 | `0` | " in pages["recipe"]
    assert "| `name` | text matching `^[A-Za-z0-9][A-Za-z0-9._-]*$` | required | Results go" in pages["recipe"]
    assert "| `duty` | number, above 0 to 1 | `1.0` | " in pages["device-toml"]
    assert "| the host's name |" in pages["device-toml"]


def test_every_verb(pages: dict[str, str]) -> None:
    from eyas_device.cli import VERBS
    from eyas_host.cli.app import NAMES

    assert len(VERBS) > 5
    assert [verb for verb in VERBS if f"## eyas-device {verb}\n" not in pages["eyas-device"]] == []
    assert len(NAMES) > 15
    assert [name for name in NAMES if f"### eyas {name}\n" not in pages["eyas"]] == []
    assert "| `--set SECTION.KEY=VALUE` |" in pages["eyas"]


def test_every_public_name(pages: dict[str, str]) -> None:
    for package in ("eyas_device", "eyas_host"):
        for name in getattr(importlib.import_module(package), "__all__", ()):
            if not name.startswith("__"):
                assert f":: {package}.{name}\n" in pages["api"] or f"`{package}.{name}` is " in pages["api"], name


def _split(page: str, mark: str, end: str = "]") -> list[str]:
    """Title, text, title, text ... of the headings that begin with `mark`."""
    return [piece for block in page.split(f"\n{mark}")[1:] for piece in block.split(end, 1)]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_verbs_and_keys_that_a_page_names_exist(pages: dict[str, str], name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    text = re.sub(r"^\| `[^`]*` \|", "|", text, flags=re.MULTILINE) if name == "figures.md" else text  # figures' names
    verbs = re.findall(r"\b(eyas(?:-device)?) ([a-z][a-z-]+)\b", text)
    assert [(p, verb) for p, verb in verbs if f"# {p} {verb}\n" not in pages[p]] == []
    keys = re.findall(r"`\[(\w+)\] (\w+)", text)
    sections = [section for kind in (Recipe, Config, Plan) for section in msgspec.structs.fields(kind)]
    known = {
        (section.name, field.name) for section in sections for field in msgspec.structs.fields(_values(section.type))
    }
    assert [key for key in keys if key not in known] == []
