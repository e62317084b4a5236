"""`eyas sensitivity`: which layers int8 harms most, as a table, and what keeping them float would give."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from rich.table import Table

from eyas_host.compress.quantize.mixed import Harm
from eyas_host.compress.quantize.sensitivity import RESULT, Sensitivity, measure_sensitivity
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say, show


def sensitivity(context: RunContext, images: int, json: Path | None) -> None:
    """Measure, show the table and the advice, and write the figures to `json` too if it is given."""
    torch.set_num_threads(training_threads(context.recipe))
    found = measure_sensitivity(context, images=images)
    if json is not None:
        write_bytes(json, msgspec.json.format(msgspec.json.encode(found), indent=1))
    show(harm_table(found))
    say(f"  figures: {context.root / RESULT}")
    say(f"[bold]sensitivity[/bold]   {found.advice}")


def harm_table(found: Sensitivity) -> Table:
    """A row a layer, the most harmful first, and one for the whole network."""
    title = f"int8 against float, layer by layer, on {found.count} validation images"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for side in ("alone", "without"):
        for figure in ("accuracy", "log lik.", "SNR dB"):
            table.add_column(f"{side}: {figure}", justify="right")
    for entry in found.ranked:
        table.add_row(entry.layer, *_cells(entry.alone), *_cells(entry.without))
    table.add_section()
    table.add_row("all layers in int8", *[""] * 3, *_cells(found.whole), style="bold")
    table.caption = (
        "alone: only this layer in int8; without: all but this; accuracy: balanced accuracy lost, points;\n"
        "log lik.: mean log likelihood lost, millinats an image; SNR: of the logits, higher is better"
    )
    table.caption_justify = "left"
    return table


def _cells(harm: Harm) -> tuple[str, str, str]:
    return f"{100 * harm.drop:.1f}", f"{1000 * harm.likelihood:.2f}", f"{harm.snr_db:.1f}"
