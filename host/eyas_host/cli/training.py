"""Training verbs beside the chain: `baseline`, `tune` and `pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from eyas_device.support.logs import show
from eyas_host.cli.options import (
    RUNS,
    JsonFile,
    Overrides,
    RecipeArgument,
    RunsOption,
    YesOption,
    prepared_run,
    run_chain,
)


def baseline(
    recipe: RecipeArgument,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Train for N epochs (100 is usual from scratch) instead of the teacher's seconds."
        ),
    ] = None,
    json: JsonFile = None,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Train the teacher's architecture from scratch, to measure what transfer learning adds."""
    context = run_chain(recipe, runs, overrides, until="teach", yes=yes)
    from eyas_host.search.baseline import baseline as train

    train(context, epochs, json)


def tune(
    recipe: RecipeArgument,
    method: Annotated[Literal["grid", "tpe"], typer.Option(help="Every combination, or Bayesian search.")] = "grid",
    what: Annotated[Literal["teacher", "student"], typer.Option(help="Which network's settings.")] = "teacher",
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Finished trials in all.  [default: the grid, or \\[tune] trials]"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Epochs a trial; wins over [tune].")] = None,
    finals: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="How many of the best to train in full; wins over [tune].")
    ] = None,
    final_epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Epochs of a full training; wins over the recipe.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Shared database for several workers, e.g. postgresql://HOST/DB.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Name of the study.  [default: NAME-what-method]")
    ] = None,
    json: JsonFile = None,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Search training settings (hyperparameters) on validation."""
    until = "split" if what == "teacher" else "distill"
    with prepared_run(recipe, runs, overrides, until=until, yes=yes, shared=True) as context:
        from eyas_host.search.tune import SearchSettings
        from eyas_host.search.tune import tune as search

        settings = SearchSettings(
            what=what,
            method=method,
            trials=trials,
            epochs=epochs,
            finals=finals,
            final_epochs=final_epochs,
            storage=storage,
            name=name,
        )
        search(context, settings, json)


def pretrain(
    student: Annotated[str, typer.Option(help="timm name of the student.")] = "mobilenetv3_small_100",
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="tf_efficientnet_lite0, 1 or 2; several are averaged.  [default: tf_efficientnet_lite0]"),
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Crops of the whole training.")] = 2_000_000,
    size: Annotated[int, typer.Option(min=32, max=512, help="Side of a crop, pixels.")] = 96,
    last_size: Annotated[
        int | None,
        typer.Option(min=32, max=512, help="Side of a crop in the last fifth.  [default: a third more]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Crops a step.")] = 64,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.0, help="Pause after this long; the same command resumes.  [default: no pause]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where to train.")] = "auto",
    images: Annotated[Path, typer.Option(metavar="ROOT", help="Where Debian's packages are unpacked.")] = Path("/"),
    runs: RunsOption = RUNS,
) -> None:
    """Pretrain a student without a download: distil ImageNet teachers on freely licensed images."""
    from eyas_host.pretrain.make import make_pretrained
    from eyas_host.pretrain.train import PretrainSettings, default_last_size

    settings = PretrainSettings(
        student=student,
        teachers=tuple(teacher or PretrainSettings().teachers),
        crops=crops,
        size=size,
        last_size=last_size or default_last_size(size),
        batch=batch,
        seed=seed,
    )
    show(str(make_pretrained(settings, images, runs / "pretrain" / student, minutes=minutes, device=device)))
