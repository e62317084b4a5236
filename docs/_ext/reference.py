"""Sphinx extension: write the reference pages from the code before the site is built.

What a page says of a key is the docstring below the struct's field; types, ranges and defaults are the struct's own.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
from msgspec import inspect as types

FOLDER = "reference"
"""Below docs/; written by every build and not committed."""


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / FOLDER))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(folder: Path) -> None:
    """Write every page that changed."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """All pages: name -> Markdown."""
    return {
        "recipe": recipe_page(),
        "device-toml": device_toml_page(),
        "rollout-plan": rollout_plan_page(),
        "messages": messages_page(),
        "eyas": eyas_page(),
        "eyas-device": eyas_device_page(),
        "api": api_page(),
    }


def recipe_page() -> str:
    """Every section and key of a recipe."""
    from eyas_host.recipe import Recipe
    from eyas_host.recipe.load import RENAMED

    return _join(
        "# Recipe",
        "A recipe is one TOML file. Only `run.name` and `data.path` have no default. `--set section.key=value` "
        "overrides a key for one run. Unknown keys, wrong types and impossible combinations are all reported at once. "
        "`models/template/recipe.toml` in the repository shows the same keys as a file.",
        *_sections(Recipe, toml=True),
        _renamed(RENAMED),
    )


def device_toml_page() -> str:
    """Every section and key of the device's configuration."""
    from eyas_device import config

    return _join(
        "# device.toml",
        "The configuration of a camera, `/etc/eyas/device.toml` for the service. Every key is optional; options of "
        "`eyas-device run` override single keys. `eyas-device doctor --config FILE` checks a file, and "
        "`device.example.toml` beside the code shows the same keys as a file.",
        *_sections(config.Config, toml=True),
        _renamed(getattr(config, "RENAMED", {})),
    )


def rollout_plan_page() -> str:
    """Every section and key of a rollout's plan."""
    from eyas_host.fleet.rollout.plan import Plan

    return _join(
        "# Plan of a rollout",
        "A TOML file for `eyas rollout start --plan FILE`. Only `[[wave]]` has to be there, once for each wave; all "
        "errors of a file are reported at once. [Rollouts](../rollouts.md) says what happens by it.",
        *_sections(Plan, toml=True),
    )


def messages_page() -> str:
    """Every message between devices and the host."""
    from eyas_device.telemetry import messages

    kinds = {**messages.KINDS, "ack": messages.Ack, "cmd": messages.Command}
    nested: dict[str, type] = {}
    blocks = []
    for topic, kind in kinds.items():
        blocks.append(f"## {kind.__name__}\n\nTopic `eyas/<site>/<device>/{topic}`. {_summary(kind)}")
        blocks.append(_fields(kind, nested, toml=False))
    return _join(
        "# Messages",
        "JSON over MQTT. Every field has a default and unknown fields are ignored, so that versions mix. "
        "`device/eyas_device/telemetry/schema.json` in the repository holds the same as JSON Schema; "
        "[Telemetry](../telemetry.md) says what is promised about delivery.",
        *blocks,
        *_nested(nested, toml=False),
    )


def eyas_page() -> str:
    """The command line of the workstation."""
    import typer

    from eyas_host.cli.app import app

    group: Any = typer.main.get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        panel = command.rich_help_panel if isinstance(command.rich_help_panel, str) else "Start"
        inner = getattr(command, "commands", {})
        heading = [f"### eyas {name}\n\n{command.help}"] if inner else [_command(f"eyas {name}", command)]
        inside = [_command(f"eyas {name} {word}", verb) for word, verb in inner.items()]
        panels.setdefault(panel, []).extend([*heading, *inside])
    return _join(
        "# eyas",
        f"{group.help} {group.epilog}",
        *(_join(f"## {panel}", *commands) for panel, commands in panels.items()),
    )


def eyas_device_page() -> str:
    """The command line of the camera, as `--help` prints it."""
    from eyas_device.cli import VERBS

    blocks = [f"## eyas-device {verb}\n\n{_printed_help(verb)}" for verb in VERBS]
    return _join("# eyas-device", _printed_help(), *blocks)


def api_page() -> str:
    """The public names of both packages."""
    blocks = [
        "# Python API",
        "Two packages: `eyas_device` runs on a camera and imports no training framework, `eyas_host` on the "
        "workstation. What is not on this page may change without notice.",
    ]
    for package in ("eyas_device", "eyas_host"):
        module = importlib.import_module(package)
        blocks.append(f"## {package}\n\n```{{eval-rst}}\n.. automodule:: {package}\n```")
        names = [name for name in getattr(module, "__all__", ()) if not name.startswith("__")]
        errors = [name for name in names if _is_error(getattr(module, name))]
        blocks += [_documented(package, name, getattr(module, name)) for name in names if name not in errors]
        blocks += [f"### Errors of {package}"] if errors else []
        blocks += [_documented(package, name, getattr(module, name), title=False) for name in errors]
    return _join(*blocks)


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def _documented(package: str, name: str, value: object, *, title: bool = True) -> str:
    home = getattr(value, "__module__", package).partition(".")[0]
    if home != package:
        text = f"`{package}.{name}` is `{home}.{name}`."
    else:
        kind = "exception" if _is_error(value) else "class" if inspect.isclass(value) else "function"
        options = "\n   :members:" if kind == "class" else ""
        text = f"```{{eval-rst}}\n.. auto{kind}:: {package}.{name}{options}\n```"
    return _join(f"### {name}" if title else "", text)


def _sections(kind: type[msgspec.Struct], *, toml: bool) -> Iterator[str]:
    nested: dict[str, type] = {}
    for section in msgspec.structs.fields(kind):
        several = get_origin(section.type) is tuple
        title = f"[[{section.name}]]" if several else f"[{section.name}]"
        values = get_args(section.type)[0] if several else section.type
        yield f"## `{title}`\n\n{_summary(values, title=title)}"
        yield _fields(values, nested, toml=toml)
    yield from _nested(nested, toml=toml)


def _nested(nested: Mapping[str, type], *, toml: bool) -> Iterator[str]:
    """Structs that are the value of a field, and those inside of them."""
    done: set[str] = set()
    waiting = dict(nested)
    while waiting:
        name, kind = waiting.popitem()
        done.add(name)
        inner: dict[str, type] = {}
        yield f"## {name}\n\n{_summary(kind)}"
        yield _fields(kind, inner, toml=toml)
        waiting |= {key: value for key, value in inner.items() if key not in done}


def _renamed(names: Mapping[str, str]) -> str:
    """What an old name of a section, key or value is answered with."""
    rows = [(f"`{old}`", f"`{new}`") for old, new in names.items()]
    return f"## Renamed\n\n{_table(('was', 'is'), rows)}" if rows else ""


def _fields(kind: type[msgspec.Struct], nested: dict[str, type], *, toml: bool) -> str:
    docs = attribute_docs(kind)
    rows = []
    for field, info in zip(msgspec.structs.fields(kind), types.type_info(kind).fields, strict=True):  # type: ignore[attr-defined]
        default = "required" if field.required else _default(field, toml=toml)
        rows.append((f"`{field.encode_name}`", _type(info.type, nested), default, docs.get(field.name, "")))
    return _table(("key" if toml else "field", "type", "default", "meaning"), rows)


def _default(field: Any, *, toml: bool) -> str:
    if field.default is not msgspec.NODEFAULT:
        return f"`{_value(field.default, toml=toml)}`"
    if getattr(field.default_factory, "__name__", "") == "default_name":
        return "the host's name"
    value = field.default_factory()
    return f"`{_value(value, toml=toml)}`"


def _value(value: object, *, toml: bool) -> str:
    """A default as it would be written in the file: msgspec's JSON, and TOML's inline tables."""
    if isinstance(value, dict) and toml:
        return (
            "{ " + ", ".join(f"{key} = {_value(item, toml=toml)}" for key, item in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, toml=toml) for item in value) + "]"
    if value is None and toml:
        return "not set"
    return msgspec.json.encode(value).decode()


def _type(kind: Any, nested: dict[str, type]) -> str:
    """A type in words, with its range."""
    if isinstance(kind, types.LiteralType):
        return " or ".join(f"`{_value(value, toml=True)}`" for value in kind.values)
    if isinstance(kind, (types.IntType, types.FloatType)):
        return ("integer" if isinstance(kind, types.IntType) else "number") + _range(kind)
    if isinstance(kind, types.StrType):
        return f"text matching `{kind.pattern}`" if kind.pattern else "text"
    if isinstance(kind, types.BoolType):
        return "true or false"
    if isinstance(kind, types.NoneType):
        return "nothing"
    if isinstance(kind, types.UnionType):
        return " or ".join(_type(one, nested) for one in kind.types)
    if isinstance(kind, (types.VarTupleType, types.ListType)):
        return f"list of {_type(kind.item_type, nested)}"
    if isinstance(kind, types.TupleType):
        return f"[{', '.join(_type(one, nested) for one in kind.item_types)}]"
    if isinstance(kind, types.DictType):
        return f"table of {_type(kind.key_type, nested)} to {_type(kind.value_type, nested)}"
    if isinstance(kind, types.StructType):
        nested[kind.cls.__name__] = kind.cls
        return f"[{kind.cls.__name__}](#{kind.cls.__name__.lower()})"
    return "any value"


def _range(kind: Any) -> str:
    low = _number(kind.ge if kind.gt is None else kind.gt)
    high = _number(kind.le if kind.lt is None else kind.lt)
    above, below = "above " if kind.gt is not None else "", "below " if kind.lt is not None else ""
    if low and high:
        return f", {above}{low} to {below}{high}"
    if low:
        return f", {above}{low}" if above else f", {low} or more"
    if high:
        return f", {below}{high}" if below else f", {high} or less"
    return ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{int(value):,}" if value == int(value) else repr(value)


def attribute_docs(kind: type) -> dict[str, str]:
    """Field -> the docstring below it, those of parent classes included."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if cls in (object, msgspec.Struct) or not cls.__module__.startswith("eyas_"):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found


def _summary(kind: type, title: str = "") -> str:
    """The docstring of a class; a section's begins with its own name, which the heading says already."""
    text = inspect.getdoc(kind) or ""
    rest = text.removeprefix(f"`{title}`:").strip()
    return rest[:1].upper() + rest[1:]


def _command(name: str, command: Any) -> str:
    arguments, options = [], []
    for param in command.params:
        if getattr(param, "hidden", False):
            continue
        text = (param.help or "").strip()
        if param.param_type_name == "argument":
            arguments.append((f"`{param.metavar or param.name.upper()}`", text, ""))
        else:
            options.append((_spelled(param), text, _shown_default(param)))
    usage = " ".join([name, *(row[0].strip("`") for row in arguments), *(["[OPTIONS]"] if options else [])])
    table = _table(("argument or option", "meaning", "default"), arguments + options) if arguments + options else ""
    return _join(f"### {name}", f"```text\n{usage}\n```", command.help or "", table, command.epilog or "")


def _spelled(param: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
    if param.is_flag:
        return flags
    choices = get_args(getattr(getattr(param, "type_descriptor", None), "annotation", None))
    words = "|".join(str(one) for one in choices if isinstance(one, str)) or param.metavar or param.name.upper()
    return flags[:-1] + f" {words}`"


def _shown_default(param: Any) -> str:
    if param.default in (None, (), [], False) or param.is_flag or callable(param.default):
        return ""
    return f"`{param.default}`"


def _printed_help(*verb: str) -> str:
    """`eyas-device VERB --help` as a block of text, 100 columns wide."""
    from eyas_device.cli import main

    out = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*verb, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return f"```text\n{out.getvalue().rstrip()}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text of a table's cell: `<name>` outside of code is no HTML."""
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if number % 2 else piece.replace("<", "&lt;") for number, piece in enumerate(pieces))


def _join(*blocks: str) -> str:
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"
