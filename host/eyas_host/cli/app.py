"""`eyas`: the workstation's command line. A table of verbs; each imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from eyas_device import __version__
from eyas_device.errors import EXIT_USER_ERROR, EyasError
from eyas_host.cli import devices as fleet
from eyas_host.cli import fleet as telemetry
from eyas_host.cli import training
from eyas_host.cli.evaluate import evaluate
from eyas_host.cli.options import JsonOption, Overrides, RecipeArgument, RunsOption
from eyas_host.models import presets
from eyas_host.support.quiet import quiet_libraries

STAGES = ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack", "report")

app = typer.Typer(
    name="eyas",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="From a folder of labelled images to a small, fast, trustworthy classifier on a fleet of cameras.",
    epilog="Start: `eyas new IMAGES`, then `eyas distill models/NAME/recipe.toml`.",
)


def _stage_option(flag: str, text: str) -> object:
    return typer.Option(flag, metavar="STAGE", help=f"{text} ({', '.join(STAGES)}).")


@app.command(
    epilog="Runs only what changed; an interrupted run goes on where it stopped. "
    "Example: `eyas distill models/solar-cells/recipe.toml --from qat --set quantize.epochs=6`."
)
def distill(
    recipe: RecipeArgument,
    start: Annotated[Optional[str], _stage_option("--from", "Run this stage and all behind it again")] = None,  # noqa: UP045
    only: Annotated[Optional[str], _stage_option("--only", "Run just this stage, again")] = None,  # noqa: UP045
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Run the main job: from the images of a recipe to a verified bundle and a report."""
    _run(recipe, runs, overrides, start=start, only=only)
    if only is None:
        _demonstrate(recipe, runs, overrides)


def _verb(stage: str) -> None:
    def run(recipe: RecipeArgument, overrides: Overrides = None, runs: RunsOption = Path("runs")) -> None:
        _run(recipe, runs, overrides, until=stage)

    run.__doc__ = f"{_WHAT[stage]} Earlier stages run first where they have to."
    verb = _WITH_OPTIONS.get(stage, run)
    app.command(name=stage, rich_help_panel="Stages of the main job", epilog=_TEACHES.get(stage))(verb)


_WHAT = {
    "split": "Index the images and divide them into training, validation and held-out test set.",
    "teach": "Transfer-learn the teacher with staged unfreezing.",
    "prune": "Cut the distilled student down and let it recover.",
    "qat": "Fine-tune with the int8 grid in the graph.",
    "compile": "Build fp32 and int8 for LiteRT, OpenVINO and ONNX.",
    "verify": "Measure every artefact on validation and apply the gates.",
    "pack": "Write the bundle.",
    "report": "Evaluate on the held-out test set and write the report.",
}
_TEACHES = {
    "split": """**Where images come from**: `[data] source = "folder"` (one folder a class) or `"csv"` (a table
`path,label[,group,time]`, paths relative to it); `more = [{ source = "csv", path = "line2.csv" }]` joins others.

**What keeps the parts apart**: `by = "stratified"` divides image by image; `by = "group"` keeps every group
(patient, batch, camera) on one side; `by = "time"` trains on the past and tests on the future, `gap_days` apart.
With each of them, images whose hashes differ in at most `near_duplicates` of 256 bits stay together. A leak makes a
test look better than the field will be.

**What it leaves**: `runs/NAME/split/manifest.json` (who is where, and why) and `split/index.csv` (one row an image, to
sort and look at). The test set is held out until `eyas report`; every access is logged in `test-set/access.jsonl`.

**Examples**: `eyas split models/NAME/recipe.toml --set data.by=group`, then `eyas preview models/NAME/recipe.toml`.""",
    "prune": """**What it goes by**: `[prune]` of the recipe; each of the three options stands for
`method = "channel"` and `target = "latency"`, and wins over the recipe. Latency is one image in int8 at one thread on
the first of `[compile] runtimes`.

**Where it is measured**: here, unless there is a table. For another board: run the chain once with
`--set prune.method=none`, copy `runs/NAME/bundle` there, run `eyas-device bench --bundle B --artefact litert-int8
--blocks table.json`, and bring the file back. The times of a table are not measured again: they are predicted.

**What it leaves**: `runs/NAME/prune/plan.json` (what was cut), `student.pt`, and the accuracy-latency front in the
report. A killed run goes on where it stopped.

**Examples**: `eyas prune models/NAME/recipe.toml --target-ms 0.4`,
`eyas prune models/NAME/recipe.toml --keep 0.5 --table table.json`. The stages behind read the recipe: write there what
you want to stay, e.g. `target = "latency"` and `ms = 0.4`, then `eyas distill models/NAME/recipe.toml`.""",
}


def prune(
    recipe: RecipeArgument,
    target_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--target-ms", metavar="MS", min=0.0, help="Prune until one image takes at most this long."),
    ] = None,
    keep: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--keep", metavar="PART", help="Prune to this part of the dense student's latency, 0 to 1."),
    ] = None,
    table: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--table", metavar="FILE", help="Block times of the dense student on the target device."),
    ] = None,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Cut the distilled student down and let it recover. Earlier stages run first where they have to."""
    if target_ms is not None and keep is not None:
        raise typer.BadParameter("--target-ms and --keep both say how far to go; give one")
    more = [] if target_ms is None else [f"prune.ms={target_ms}"]
    more += [] if keep is None else [f"prune.keep={keep}", "prune.ms=0.0"]
    more += [] if table is None else [f"prune.table={table.resolve()}"]
    latency = ["prune.method=channel", "prune.target=latency"] if more else []
    _run(recipe, runs, [*(overrides or ()), *latency, *more], until="prune")


_WITH_OPTIONS: dict[str, Callable[..., None]] = {"prune": prune}
for _name in _WHAT:
    _verb(_name)


@app.command(
    rich_help_panel="Stages of the main job",
    epilog="An interrupted measurement goes on where it stopped. Example: `eyas sensitivity models/NAME/recipe.toml`.",
)
def sensitivity(
    recipe: RecipeArgument,
    images: Annotated[int, typer.Option(min=2, help="Validation images, as many of each class.")] = 256,
    json: JsonOption = None,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Show which layers int8 harms most, and which to keep float. Earlier stages run first where they have to."""
    _run(recipe, runs, overrides, until="qat")
    from eyas_host.cli.sensitivity import sensitivity as measure
    from eyas_host.pipeline.runner import RunContext
    from eyas_host.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides or ())
    measure(RunContext(settings, runs / settings.run.name), images, json)


@app.command(
    epilog="Every view is drawn by the function that training uses, from training images. "
    "Example: `eyas preview models/NAME/recipe.toml --set augment.quarter_turns=true`."
)
def preview(
    recipe: RecipeArgument,
    images: Annotated[int, typer.Option(min=1, max=20, help="Images of each class.")] = 3,
    views: Annotated[int, typer.Option(min=1, max=20, help="Augmented views of each image.")] = 6,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Draw what the model will see: stored images, the same as the device prepares them, augmented views."""
    _run(recipe, runs, overrides, until="split")
    from eyas_host.data.preview import write_preview
    from eyas_host.pipeline.runner import RunContext
    from eyas_host.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides or ())
    typer.echo(write_preview(RunContext(settings, runs / settings.run.name), images=images, views=views))


@app.command(epilog=presets.TEACHES)
def new(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that holds one folder a class.")],
    name: Annotated[Optional[str], typer.Option(help="Name of the run; the folder's name by default.")] = None,  # noqa: UP045
    teacher: Annotated[str, typer.Option(metavar="NAME", help="The large one that teaches.")] = "efficientnet_lite0",
    student: Annotated[str, typer.Option(metavar="NAME", help="The small one for the device.")] = "mobilenetv3_small",
    models: Annotated[Path, typer.Option(help="Where recipes are kept.")] = Path("models"),
) -> None:
    """Look at a folder of class folders and write a recipe for it."""
    from eyas_host.cli.new import new_recipe

    path = new_recipe(images, name, models, teacher=teacher, student=student)
    typer.echo(f"{path}\nnext: eyas distill {path}")


def _run(
    recipe_path: Path,
    runs: Path,
    overrides: list[str] | None,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
) -> None:
    for value in (start, only):
        if value is not None and value not in STAGES:
            raise typer.BadParameter(f"{value!r} is no stage; allowed: {', '.join(STAGES)}")
    from eyas_host.recipe.load import load_recipe

    recipe = load_recipe(recipe_path, overrides or ())
    from eyas_host.pipeline.runner import RunContext, run_chain
    from eyas_host.recipe.warnings import recipe_warnings
    from eyas_host.stages.chain import STAGES as CHAIN
    from eyas_host.support.progress import warn

    for line in recipe_warnings(recipe):
        warn(line)
    run_chain(CHAIN, RunContext(recipe, runs / recipe.run.name), start=start, only=only, until=until)


def _demonstrate(recipe_path: Path, runs: Path, overrides: list[str] | None) -> None:
    from eyas_host.cli.demonstrate import demonstrate
    from eyas_host.pipeline.runner import RunContext
    from eyas_host.recipe.load import load_recipe

    recipe = load_recipe(recipe_path, overrides or ())
    code = demonstrate(RunContext(recipe, runs / recipe.run.name))
    if code:
        raise typer.Exit(code)


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Training, compared": (training.baseline, training.tune, training.pretrain),
    "A finished bundle": (evaluate,),
    "This workstation": (training.doctor,),
    "Devices": (fleet.flash, fleet.bench),
    "The fleet": (telemetry.broker, telemetry.enroll, telemetry.collect, telemetry.watch, telemetry.expire),
}
for _panel, _verbs in _PANELS.items():
    for _function in _verbs:
        app.command(rich_help_panel=_panel, epilog=training.TEACHES.get(_function.__name__))(_function)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"eyas {__version__}")
        raise typer.Exit


_FLEET = ("amqtt", "cryptography", "sqlalchemy")
_TRAIN = (
    *("accelerate", "ai_edge_quantizer", "jinja2", "litert_torch", "matplotlib", "nncf", "onnx", "onnxruntime"),
    *("openvino", "optuna", "PIL", "safetensors", "scipy", "sklearn", "timm", "torch", "torch_pruning", "torchvision"),
)
"""Modules that an extra brings."""


def _extra(error: ModuleNotFoundError) -> str | None:
    """The extra whose package is not installed, or None if the missing module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    return "train" if module in _TRAIN else "fleet" if module in _FLEET else None


def main() -> None:
    """Entry point: a mistake of the user ends with one message and exit code 2."""
    quiet_libraries()
    try:
        app()
    except EyasError as error:
        print(f"eyas: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        if (extra := _extra(error)) is None:
            raise
        print(f"eyas: {error.name} is not installed: pip install 'eyas[{extra}]'", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("eyas: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
