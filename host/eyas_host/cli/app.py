"""`eyas`, the command line of the workstation: a table of verbs. Each verb imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from typer.core import TyperCommand

from eyas_device import __version__
from eyas_device.errors import EXIT_USER_ERROR, EyasError
from eyas_device.support.redact import redact
from eyas_host.cli import devices, fleet, stages, training
from eyas_host.cli.doctor import doctor
from eyas_host.cli.evaluate import evaluate
from eyas_host.cli.new import new
from eyas_host.cli.sensitivity import sensitivity
from eyas_host.support.quiet import quiet_libraries

HELP = resources.files("eyas_host.cli") / "help"
"""A page for each verb, shown by `--help` below the options."""

VERBS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "The main job": (new, stages.preview, stages.distill),
    "Its stages (earlier ones run first where they are out of date)": stages.VERBS,
    "Training": (training.baseline, training.tune, sensitivity, training.pretrain),
    "A finished bundle": (evaluate,),
    "This workstation": (doctor,),
    "Devices": (devices.flash, devices.bench),
    "The fleet": (fleet.broker, fleet.enroll, fleet.expel, fleet.forget, fleet.collect, fleet.watch, fleet.expire),
}
"""Panel of `eyas --help` -> verbs in it, each named like its function."""


_FLEET = ("amqtt", "cryptography", "sqlalchemy")
_TRAIN = (
    *("accelerate", "ai_edge_quantizer", "jinja2", "litert_torch", "matplotlib", "nncf", "onnx", "onnxruntime"),
    *("openvino", "optuna", "PIL", "safetensors", "scipy", "sklearn", "timm", "torch", "torch_pruning", "torchvision"),
)
"""Modules of each extra."""


class _Verb(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        page = (HELP / f"{self.name}.md").read_text(encoding="utf-8")
        Console(highlight=False).print(Padding(Markdown(page, code_theme="ansi_dark"), (0, 1, 1, 1)))


app = typer.Typer(
    name="eyas",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="From a folder of labelled images to a small, fast, trustworthy classifier on a fleet of cameras.",
    epilog="Start: `eyas new IMAGES`, then `eyas distill models/NAME/recipe.toml`.",
)
for _panel, _verbs in VERBS.items():
    for _function in _verbs:
        app.command(cls=_Verb, rich_help_panel=_panel)(_function)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"eyas {__version__}")
        raise typer.Exit


def _extra(error: ModuleNotFoundError) -> str | None:
    """The extra that contains the missing module, None if there is none."""
    module = (error.name or "").partition(".")[0]
    return "train" if module in _TRAIN else "fleet" if module in _FLEET else None


def main() -> None:
    """Run `eyas`: a user's mistake ends with one message and exit code 2, without a traceback."""
    quiet_libraries()
    try:
        app()
    except EyasError as error:
        print(f"eyas: {redact(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        if (extra := _extra(error)) is None:
            raise
        print(f"eyas: {error.name} is not installed: pip install 'eyas[{extra}]'", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("eyas: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
