"""`eyas sensitivity`: a table of what each layer loses in int8, and which layers to keep in float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from eyas_host.cli.options import RUNS, JsonFile, Overrides, RecipeArgument, RunsOption, YesOption, prepared_run

if TYPE_CHECKING:
    from eyas_host.compress.quantize.mixed import Degradation
    from eyas_host.compress.quantize.sensitivity import Sensitivity


def sensitivity(
    recipe: RecipeArgument,
    images: Annotated[int, typer.Option(min=2, help="Validation images, balanced over the classes.")] = 256,
    json: JsonFile = None,
    overrides: Overrides = None,
    yes: YesOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Measure which layers lose most from int8, and suggest which to keep in float."""
    with prepared_run(recipe, runs, overrides, until="qat", yes=yes) as context:
        import msgspec
        import torch

        from eyas_host.compress.quantize.sensitivity import measure_sensitivity
        from eyas_host.pipeline.distributed import training_threads
        from eyas_host.pipeline.runner import SENSITIVITY
        from eyas_host.support.files import write_bytes
        from eyas_host.support.progress import say, show

        torch.set_num_threads(training_threads(context.recipe))
        measured = measure_sensitivity(context, images=images)
        if json is not None:
            write_bytes(json, msgspec.json.format(msgspec.json.encode(measured), indent=1))
        show(sensitivity_table(measured))
        say(f"  figures: {escape(str(context.root / SENSITIVITY))}")
        say(f"[bold]sensitivity[/bold]   {escape(str(measured.advice))}")


def sensitivity_table(measured: Sensitivity) -> Table:
    """A row per layer, the most sensitive first, and one for all layers in int8."""
    title = f"int8 against float, layer by layer, on {measured.images} validation images"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for side in ("only int8", "only float"):
        for figure in ("accuracy", "NLL", "SNR dB"):
            table.add_column(f"{side}: {figure}", justify="right")
    for entry in measured.ranked:
        table.add_row(entry.layer, *_cells(entry.only_int8), *_cells(entry.only_float))
    table.add_section()
    table.add_row("all layers in int8", *[""] * 3, *_cells(measured.all_int8), style="bold")
    table.caption = (
        "only int8: only this layer in int8; only float: only this layer in float; accuracy: balanced accuracy lost,\n"
        "points; NLL: increase of the mean negative log likelihood, millinats per image; SNR: of the logits"
    )
    table.caption_justify = "left"
    return table


def _cells(entry: Degradation) -> tuple[str, str, str]:
    return f"{100 * entry.drop:.1f}", f"{1000 * entry.nll_increase:.2f}", f"{entry.snr_db:.1f}"
