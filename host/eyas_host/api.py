"""The public functions of `eyas_host`; each imports what it needs when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from eyas_device.support.toml import did_you_mean
from eyas_host.pipeline.runner import BUNDLE, RECIPE, REPORT, RunContext, StageRecord, read_stage_record, run_chain
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe as load_recipe
from eyas_host.recipe.warnings import recipe_warnings
from eyas_host.stages.chain import STAGES
from eyas_host.stages.plan import show_plan
from eyas_host.support.errors import RunError
from eyas_host.support.progress import warn
from eyas_host.support.quiet import quiet_libraries

if TYPE_CHECKING:
    from eyas_host.evaluation.labelled_figures import Evaluation
    from eyas_host.fleet.store.database import Store


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run below `runs/`, as it was when it was opened."""

    folder: Path
    recipe: Recipe
    stages: dict[str, StageRecord]
    """Finished stage -> its record: one-line summary, facts, seconds, peak memory, hashes of inputs and outputs."""
    bundle: Path | None
    """The packed bundle; None before the stage `pack`."""
    report: dict[str, Any] | None
    """The content of `report.json`; None before the stage `report`."""


def distill(
    recipe: Recipe | Path | str,
    *,
    runs: Path | str = "runs",
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
) -> Run:
    """Run the main job of a recipe, from its images to a verified bundle and a report.

    Stages that are up to date are not run again, and an interrupted run continues where it stopped. Progress is printed
    to standard error. Under `torchrun` only the main process returns; the others exit when the chain ends.

    Args:
        recipe: A loaded recipe, or the path of one.
        runs: The folder that holds the run, below the recipe's `[run] name`.
        start: Run this stage and all later ones again.
        only: Run just this stage, again.
        until: Stop after this stage.

    Raises:
        EyasError: Of the kind that fits: `RecipeError`, `DataError`, `StageError`, `GateError` and so on.

    >>> run = distill("models/shapes/recipe.toml", until="split")
    >>> list(run.stages)
    ['split']

    """
    check_stages(start, only, until)
    quiet_libraries()
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    show_warnings(settings)
    context = RunContext(settings, Path(runs) / settings.run.name)
    run_chain(STAGES, context, start=start, only=only, until=until, plan=show_plan)
    return open_run(context.root)


def check_stages(*stages: str | None) -> None:
    """Raise `RunError` for an unknown name among `stages`."""
    known = [stage.name for stage in STAGES]
    for value in stages:
        if value is not None and value not in known:
            raise RunError(f"{value!r} is not a stage; {did_you_mean(value, known)}allowed: {', '.join(known)}")


def show_warnings(recipe: Recipe) -> None:
    """Print the warnings that need no images."""
    for line in recipe_warnings(recipe):
        warn(line)


def evaluate(
    bundle: Path | str,
    images: Path | str,
    *,
    artefacts: Sequence[str] = (),
    run: Path | str | None = None,
    skip_unreadable: bool = False,
) -> Evaluation:
    """Evaluate a finished bundle on a second labelled set, through the device's own runtimes.

    Args:
        bundle: The bundle's folder.
        images: A folder that holds one folder a class, or a CSV table `path,label[,group]`.
        artefacts: Only these artefacts; by default all that work on this machine.
        run: The run that the bundle was packed in, to find images that it was trained on; found by itself for
            `runs/NAME/bundle`.
        skip_unreadable: List unreadable images instead of refusing the set.

    Returns:
        A frozen object with `artefacts` (metrics with 95 % intervals, confusion and calibration of each), `parity`
        between artefacts, `mistakes`, `overlap` with the images of the run, and `warnings`.

    Raises:
        EyasError: Of the kind that fits: `BundleError`, `DataError` or `RuntimeUnavailable`.

    >>> evaluation = evaluate("bundle", "second-set")
    >>> evaluation.images, evaluation.labels
    (12, ('cross', 'disc', 'stripes'))

    """
    quiet_libraries()
    from eyas_host.evaluation.labelled_set import evaluate_bundle

    return evaluate_bundle(
        Path(bundle),
        Path(images),
        artefacts=artefacts,
        run=None if run is None else Path(run),
        skip_unreadable=skip_unreadable,
    )


def open_run(folder: Path | str) -> Run:
    """Open a run, finished or not.

    Args:
        folder: The run's folder, e.g. `runs/solar-cells`.

    Returns:
        A frozen object with `folder`, `recipe`, `stages` (finished stage -> its record), `bundle` (the path of the
        packed bundle or None) and `report` (the content of `report.json` or None).

    Raises:
        RunError: The folder does not hold a run, or holds one that this version cannot read.

    >>> run = open_run("runs/shapes")
    >>> run.recipe.run.name
    'shapes'
    >>> run.stages["split"].facts["labels"]
    ['circle', 'cross', 'ring', 'square', 'triangle']

    """
    folder = Path(folder)
    try:
        recipe = msgspec.json.decode((folder / RECIPE).read_bytes(), type=Recipe)
    except OSError as error:
        raise RunError(f"{folder}: not a run ({RECIPE}: {error.strerror}); `eyas distill RECIPE` makes one") from None
    except msgspec.DecodeError as error:
        raise RunError(f"{folder / RECIPE}: cannot be read by this version of Eyas ({error})") from None
    records = {stage.name: read_stage_record(folder / stage.name) for stage in STAGES}
    stages = {name: record for name, record in records.items() if record is not None}
    report = None
    if "report" in stages:
        try:
            report = msgspec.json.decode((folder / REPORT).read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError) as error:
            raise RunError(f"{folder / REPORT}: cannot be read ({error}); `eyas report RECIPE` writes it") from None
    bundle = folder / BUNDLE if "pack" in stages else None
    return Run(folder=folder, recipe=recipe, stages=stages, bundle=bundle, report=report)


def open_store(url: str) -> Store:
    """Open the telemetry store of a fleet for queries; it is never created here.

    Args:
        url: SQLAlchemy's URL of the database that `eyas collect --store` writes, e.g. `sqlite:///fleet.db`.

    Returns:
        A context manager with `devices()`, `windows()`, `events()`, `counts()` and `poison()`. Collectors may write to
        the database meanwhile.

    Raises:
        EyasError: The URL is mistaken, or there is no store that this version reads.

    >>> with open_store("sqlite:///fleet.db") as store:
    ...     [(device.device, device.status.state) for device in store.devices()]
    [('camera-1', 'online')]

    """
    from eyas_host.fleet.store.database import Store

    return Store(url, create=False)
