"""The verbs of `eyas` around training: baseline, tune, doctor. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from eyas_host.cli.options import JsonOption, Overrides, RecipeArgument, RunsOption

if TYPE_CHECKING:
    from eyas_host.pipeline.runner import RunContext

TEACHES = {
    "pretrain": """**What it is for**: where no hub can be reached, a student starts from random weights. A warm start
is made once, without any download: ImageNet teachers from the registry's packages answer for strong crops of the free
images that packages ship, and the student follows their 1,000 probabilities.

**From what**: images of Debian packages where they are installed (or unpacked below `--images`), of scikit-learn
and scikit-image; the card lists each licence. No image is copied.

**How long**: `--crops` says how long the whole training is (the rate falls to zero at its end), `--minutes` how much of
it to do now: the same command goes on. About 130 crops a second on one core: half a million take an hour.

**What it leaves**: in `runs/pretrain/STUDENT` the weights (`STUDENT.safetensors`, fp16), their card (`.md`), and
settings, figures and the images' hashes (`.json`).

**Shipped weights** are used where no hub can be reached; `[student] weights = "pretrained"` asks for them.

**Examples**: `eyas pretrain --minutes 5`, then in a recipe `[student] weights = "file"` and
`weights_file = "../../runs/pretrain/mobilenetv3_small_100/mobilenetv3_small_100.safetensors"`.""",
    "tune": """**What is tried**: the settings that `[tune]` of the recipe lists, for the teacher `rates`, `batches`,
`unfreeze` (and `layer_decays`, `weight_decays`), for the student `student_rates`, `kd_ratios`, `temperatures`.
`--method grid` trains every combination; `--method tpe` looks for the best between the least and the most value, and
ends trials early that are behind (`[tune] pruner`). A trial is short (`--epochs`); the best few (`--finals`) are then
trained in full.

**How it is judged**: by the recipe's metric on validation. The sealed test part is never read; the best of many trials
is flattered by validation, so believe the report's test figure, not the search's.

**Killed?** Run it again: finished trials are kept, the one that was running is tried again. A study of another recipe,
split or list of values is refused.

**Many workers**: start the same command on each with one `--storage postgresql://HOST/DATABASE`, all but one with
`--finals 0`. `--trials` counts the trials of all together.

**What it leaves**: in `runs/NAME/tune/STUDY` `tune.html` (plots and tables), `best.toml` (to copy into the recipe) and
`result.json`; the trials in `runs/NAME/tune/study.db`.

**Examples**: `eyas tune models/NAME/recipe.toml`, `eyas tune models/NAME/recipe.toml --method tpe --trials 30 --epochs
4 --set "tune.rates=[1e-4, 3e-3]"`, `eyas tune models/NAME/recipe.toml --what student`.""",
    "doctor": """**What is examined**: the recipe and its images, Python, packages against the extras and the tested
set, imports, GPU driver against torch's CUDA, the hub and which first weights would be used, NNCF's int8 kernels,
cores, memory, disk, and the programs that reach devices. What may hang or crash is tried in a process of its own.

**What it says**: green: well; yellow: works, but look at it; red: does not work; grey: not checked. Below what is not
green stands the fix. The exit code is 1 if anything is red, else 0.

**Examples**: `eyas doctor`, `eyas doctor models/NAME/recipe.toml --runs /big/runs`, `eyas doctor --json`.""",
    "baseline": """**What is compared**: the teacher as the recipe trains it, and the same architecture from random
weights with all layers learning, on the same split, images, augmentation, loss and batch. Without `--epochs` it gets
as many seconds as the teacher took (`runs/NAME/teach/stage.json`): the same hardware for the same time.

**How it is judged**: both by their best epoch on validation, balanced accuracy with its 95 % interval, and by what they
lose against each other on the same images. The sealed test part stays sealed.

**What it leaves**: `runs/NAME/baseline.json`. A killed run goes on where it stopped; a second one does nothing.

**Examples**: `eyas baseline models/NAME/recipe.toml`, `eyas baseline models/NAME/recipe.toml --epochs 30`.""",
}
"""What `--help` says below the options."""


def baseline(
    recipe: RecipeArgument,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Train the baseline for N epochs instead of the teacher's seconds."),
    ] = None,
    json: JsonOption = None,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Train the teacher's architecture from scratch too, to see what transfer learning buys."""
    context = _up_to("teach", recipe, runs, overrides)
    from eyas_host.search.baseline import baseline as train

    train(context, epochs, json)


def tune(
    recipe: RecipeArgument,
    method: Annotated[
        Literal["grid", "tpe"], typer.Option(help="Every combination, or a search that learns from its trials.")
    ] = "grid",
    what: Annotated[Literal["teacher", "student"], typer.Option(help="Whose settings.")] = "teacher",
    trials: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, metavar="N", help="Finished trials to end with; by default the whole grid, or [tune] trials."
        ),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Epochs of a trial instead of [tune] epochs."),
    ] = None,
    finals: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, metavar="N", help="How many of the best are trained in full instead of [tune] finals."),
    ] = None,
    final_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Epochs of their training instead of the recipe's."),
    ] = None,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="URL", help="A database for many workers, e.g. postgresql://HOST/DATABASE."),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="STUDY", help="The study's name there; by default NAME-what-method."),
    ] = None,
    json: JsonOption = None,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Search for good training settings, on validation alone."""
    context = _up_to("split" if what == "teacher" else "distill", recipe, runs, overrides)
    from eyas_host.cli.tune import tune as search

    search(
        context,
        what=what,
        method=method,
        trials=trials,
        epochs=epochs,
        finals=finals,
        final_epochs=final_epochs,
        storage=storage,
        name=name,
        json=json,
    )


def doctor(
    recipe: Annotated[Optional[Path], typer.Argument(metavar="[RECIPE]", help="The recipe to be trained.")] = None,  # noqa: UP045
    json: Annotated[bool, typer.Option("--json", help="One JSON object with all findings.")] = False,
    overrides: Overrides = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Examine this workstation: install, GPU, weights, memory, disk, programs."""
    from eyas_host.cli.doctor import doctor as examine

    code = examine(recipe, overrides or (), runs, json=json)
    if code:
        raise typer.Exit(code)


def _up_to(stage: str, recipe: Path, runs: Path, overrides: list[str] | None) -> RunContext:
    """The run of a recipe whose stages up to that one are finished, run now where they have to be."""
    from eyas_host.recipe.load import load_recipe

    settings = load_recipe(recipe, overrides or ())
    from eyas_host.pipeline.runner import RunContext, run_chain
    from eyas_host.stages.chain import STAGES

    context = RunContext(settings, runs / settings.run.name)
    run_chain(STAGES, context, until=stage)
    return context


def pretrain(
    student: Annotated[str, typer.Option(help="A network of timm's.")] = "mobilenetv3_small_100",
    teacher: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="tf_efficientnet_lite0, 1 or 2; several answer together.  [default: tf_efficientnet_lite0]"),
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Crops of the whole training.")] = 2_000_000,
    size: Annotated[int, typer.Option(min=32, max=512, help="Side of a crop, pixels.")] = 96,
    last_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=32, max=512, help="The same in the last fifth.  [default: a third more]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Crops a step.")] = 64,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Pause after so long; the same command goes on.  [default: no pause]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where to train.")] = "auto",
    images: Annotated[Path, typer.Option(metavar="ROOT", help="Where Debian's packages are unpacked.")] = Path("/"),
    runs: RunsOption = Path("runs"),
) -> None:
    """Give a student something to start from without a download: what ImageNet teachers say of free images."""
    from eyas_host.pretrain.make import make_pretrained
    from eyas_host.pretrain.train import PretrainSettings, usual_last_size

    settings = PretrainSettings(
        student=student,
        teachers=tuple(teacher or PretrainSettings().teachers),
        crops=crops,
        size=size,
        last_size=last_size or usual_last_size(size),
        batch=batch,
        seed=seed,
    )
    typer.echo(make_pretrained(settings, images, runs / "pretrain" / student, minutes=minutes, device=device))
