"""What a warm start says of itself: how it was made, from what, under which licences, and how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eyas_host.machine import machine
from eyas_host.warm.pictures import SOURCES, Found
from eyas_host.warm.train import WarmResult, WarmSettings


def warm_card(settings: WarmSettings, result: WarmResult, found: Sequence[Found]) -> str:
    """The card in Markdown; `found` are the pictures that were learned from."""
    counts = Counter(one.package for one in found)
    rows = "\n".join(
        f"| {source.package} | {counts[source.package]} | {source.licence} |"
        for source in SOURCES
        if counts[source.package]
    )
    hours = result.seconds / 3600
    state = "finished" if result.finished else f"paused, {settings.crops:,} crops were planned"
    return f"""# Warm start of {settings.student}

Weights for a student to start from, fp16 under timm's names (behind `backbone.`), with `mean` and `std`, the
normalisation that they were trained behind. Use: `[student] weights = "file"` and `weights_file`. It is no
classifier for the field: its 1,000-class head is replaced.

## How it was made

Distilled from {", ".join(settings.teachers)} (Apache-2.0): KL of the 1,000 probabilities at temperature
{settings.temperature:g} on {result.crops:,} crops of {settings.size} x {settings.size} pixels ({state}), area
0.02 to 1, flips, turns, light, CutMix in {settings.cutmix:.0%} of the batches; AdamW {settings.rate:g}, cosine, batch
{settings.batch}, moving average {settings.ema:g}, seed {settings.seed}. {hours:.2f} hours on {machine()["processor"]}.
Again: `eyas warm-start --student {settings.student} --crops {settings.crops}`.

## From what

| package | pictures | their licence |
|---|---|---|
{rows}

`pictures.json` lists the sha256 of each. No picture is part of this file. The weights are given under Apache-2.0, as
the teacher's are; whether the licence of a picture reaches weights that were trained on it is not settled everywhere:
who must be sure trains again from pictures of their own choice.

## How good it is

On {result.held_out} crops of pictures that were held out: the same of 1,000 classes as the teacher
{result.agreement:.1%}, mean KL {result.divergence:.3f} nats.
"""
