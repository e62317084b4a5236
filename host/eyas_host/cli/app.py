"""`eyas`, the command line of the workstation: a table of verbs. Each verb imports what it needs when it runs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from typer.core import TyperCommand, TyperGroup

from eyas_device import __version__
from eyas_device.errors import EXIT_OUTPUT, EXIT_USER_ERROR, EyasError
from eyas_device.support.interrupts import describe, exit_code, interruptible
from eyas_device.support.logs import clean
from eyas_device.support.redact import redact
from eyas_device.support.streams import open_streams, output_of
from eyas_host.cli import devices, fleet, keys, models, repo, rollout, samples, stages, training, updates
from eyas_host.cli.agent_release import publish_agent
from eyas_host.cli.doctor import doctor
from eyas_host.cli.drift import drift
from eyas_host.cli.enroll import enroll
from eyas_host.cli.evaluate import evaluate
from eyas_host.cli.inventory import fleet as list_fleet
from eyas_host.cli.labels import labels
from eyas_host.cli.new import new
from eyas_host.cli.retrain import retrain
from eyas_host.cli.send import send
from eyas_host.cli.sensitivity import sensitivity
from eyas_host.support.errors import BrokerUnreachable
from eyas_host.support.extras import extra_of, install_line
from eyas_host.support.machine import limit_threads
from eyas_host.support.quiet import quiet_libraries, quiet_warnings
from eyas_host.support.trouble import describe_trouble

_MAX_LINE = 20_000
HELP = resources.files("eyas_host.cli") / "help"
"""A page for each verb, shown by `--help` below the options."""


class VerbGroup(NamedTuple):
    """Verbs that share their first word."""

    panel: str
    help: str
    verbs: tuple[Callable[..., None], ...]


VERBS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "The main job": (new, labels, stages.preview, stages.distill),
    "Its stages (earlier ones run first where they are out of date)": stages.VERBS,
    "Training": (training.baseline, training.tune, sensitivity, training.pretrain),
    "A finished bundle": (evaluate, retrain),
    "This workstation": (doctor,),
    "Devices": (devices.flash, devices.bench),
    "Signed updates": (updates.publish, publish_agent, updates.revoke),
    "The fleet": (
        fleet.broker,
        enroll,
        fleet.expel,
        fleet.forget,
        fleet.collect,
        fleet.watch,
        list_fleet,
        drift,
        send,
        fleet.expire,
    ),
}
"""Panel of `eyas --help` -> verbs in it, each named like its function."""
GROUPS: Mapping[str, VerbGroup] = {
    "models": VerbGroup(
        "A finished bundle",
        "Versions of models: what each was made from, how good it is, and which one is in use.",
        (
            models.add,
            models.list_models,
            models.show,
            models.alias,
            models.diff,
            models.card,
            models.export,
            models.rebuild,
            models.verify,
            models.prune,
        ),
    ),
    "keys": VerbGroup(
        "Signed updates",
        "Keys that sign releases: which there are, where each lies, and how one is replaced.",
        (keys.init, keys.show, keys.rotate, keys.sign),
    ),
    "repo": VerbGroup("Signed updates", "The repository of signed releases.", (repo.verify, repo.renew)),
    "samples": VerbGroup(
        "The fleet",
        "Samples that devices sent: what to label next, what people said, and to other tools and back.",
        (samples.queue, samples.label, samples.undo, samples.check, samples.export, samples.read),
    ),
    "rollout": VerbGroup(
        "The fleet",
        "Bring a new version to a fleet in waves that stop by themselves.",
        (
            rollout.start,
            rollout.run,
            rollout.status,
            rollout.pause,
            rollout.resume,
            rollout.approve,
            rollout.abort,
        ),
    ),
}
"""Verbs of two words: the first one, and the functions that the second one is named after."""
NAMES = (
    *(verb.__name__.replace("_", "-") for verbs in VERBS.values() for verb in verbs),
    *(f"{name} {verb.__name__}" for name, group in GROUPS.items() for verb in group.verbs),
)
"""All verbs, as they are typed."""
RENAMED_OPTIONS = {"--cert": "--certificate", "--folder": "--kit"}
"""Options of earlier versions -> their present names."""


class _Passed(Exception):  # noqa: N818 - an envelope
    """Carries an error past typer, which would end with the word "Aborted" or without any."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise _Passed(error) from error


class _Verb(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in parameter.opts}
        for name in (arg.partition("=")[0] for arg in args):
            if name not in known and RENAMED_OPTIONS.get(name) in known:
                raise EyasError(f"{self.name}: {name} is now {RENAMED_OPTIONS[name]}")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        group = ctx.parent is not None and ctx.parent.parent is not None
        page = (HELP / f"{f'{ctx.parent.info_name}-' if group else ''}{self.name}.md").read_text(encoding="utf-8")
        Console(highlight=False).print(Padding(Markdown(page, code_theme="ansi_dark"), (0, 1, 1, 1)))


app = typer.Typer(
    name="eyas",
    cls=_Verbs,
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
for _name, _group in GROUPS.items():
    _words = typer.Typer(cls=_Verbs, no_args_is_help=True, rich_markup_mode="markdown", help=_group.help)
    for _function in _group.verbs:
        _words.command(cls=_Verb)(_function)
    app.add_typer(_words, name=_name, rich_help_panel=_group.panel)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"eyas {__version__}")
        raise typer.Exit


def main() -> None:
    """Run `eyas` and exit: 0 success, 1 the system's trouble or a failed check, 2 a user's mistake, 130 Ctrl-C.

    Only a defect prints a traceback. Standard streams that are closed or fail never end a verb; if standard output did
    not take everything, the exit code is 74 instead of 0. A reader that closes the pipe ends the verb quietly.
    """
    with open_streams():
        try:
            code = _run()
            sys.stdout.flush()
        except BrokenPipeError:
            code = 0
        output = output_of(sys.stdout)
        if output is not None and output.first_error is not None:
            if not output.reported:
                _complain(f"standard output: {output.first_error.strerror}")
            code = code or EXIT_OUTPUT
    sys.exit(code)


def _run() -> int:
    """Run a verb; an error is one line on standard error."""
    quiet_libraries()
    limit_threads()
    quiet_warnings()
    try:
        with interruptible():
            _call_verb()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except EyasError as error:
        _complain(redact(str(error)))
        return error.exit_code if isinstance(error, BrokerUnreachable) else EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        _complain(describe(error))
        return exit_code(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _failed(error)
    return 0


def _call_verb() -> None:
    try:
        app()
    except _Passed as passed:
        raise passed.error from None


def _failed(error: Exception) -> int:
    """Print what ended the verb; a traceback if it is a defect."""
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name or "")) is not None:
        _complain(f"{error.name} is not installed: {install_line(extra)}")
        return EXIT_USER_ERROR
    if (line := describe_trouble(error)) is not None:
        _complain(redact(line))
    else:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    return 1


def _complain(text: str) -> None:
    """Print an error; what a file's name would do to the terminal is escaped."""
    lines = "\n".join(clean(line, _MAX_LINE) for line in text.split("\n"))
    print(f"eyas: {lines}", file=sys.stderr)
