"""What a warm start says of itself: how it was made, from what, under which licences, and how good it is."""

from __future__ import annotations

from collections import Counter

import msgspec

from eyas_host.pretrain.images import SHORTEST, SOURCES
from eyas_host.pretrain.train import PretrainResult, PretrainSettings, usual_last_size


class Record(msgspec.Struct, frozen=True):
    """`NETWORK.json`, beside the weights."""

    settings: PretrainSettings
    result: PretrainResult
    machine: str
    """The processor that finished it."""
    images: dict[str, str]
    """sha256 of each image that was learned from -> its package."""


def weights_card(record: Record) -> str:
    """The card in Markdown."""
    settings, result = record.settings, record.result
    counts = Counter(record.images.values())
    rows = "\n".join(
        f"| {source.package} | {counts[source.package]} | {source.licence} |"
        for source in SOURCES
        if counts[source.package]
    )
    hours = result.seconds / 3600
    state = "finished" if result.finished else f"paused, {settings.crops:,} crops were planned"
    return f"""# Pretrained weights of {settings.student}

Weights for a student to start from, fp16 under timm's names (behind `backbone.`), with `mean` and `std`, the
normalisation that they were trained behind. Use: `[student] weights = "pretrained"` for what ships with Eyas, else
`weights = "file"` and `weights_file`. It is no classifier for the field: its 1,000-class head is replaced.

## How it was made

Distilled from {", ".join(settings.teachers)} (Apache-2.0): KL of the 1,000 probabilities at temperature
{settings.temperature:g} on {result.crops:,} crops ({state}) of {settings.size} pixels a side, of
{settings.last_size} in the last {settings.last:.0%}; area 0.02 to 1, flips, turns, light, CutMix in
{settings.cutmix:.0%} of the batches; AdamW {settings.rate:g}, cosine, batch {settings.batch}, moving average
{settings.ema:g}, seed {settings.seed}. {hours:.2f} hours on {record.machine}. Again:

    {_command(settings)}

## From what

| package | images | their licence |
|---|---|---|
{rows}

`{settings.student}.json` lists the sha256 of each; those below {SHORTEST} pixels were left out. No image is
part of this file. The weights are given under Apache-2.0, as the teacher's are; whether the licence of an image
reaches weights that were trained on it is not settled everywhere: who must be sure trains again from images of
their own choice.

## How good it is

On {result.held_out} crops of images that were held out: the same of 1,000 classes as the teacher
{result.agreement:.1%}, mean KL {result.divergence:.3f} nats.
"""


def _command(settings: PretrainSettings) -> str:
    """What makes it again."""
    words = ["eyas pretrain", f"--student {settings.student}", f"--crops {settings.crops}"]
    usual = PretrainSettings(last_size=usual_last_size(settings.size))
    for name in ("size", "last_size", "batch", "seed"):
        if getattr(settings, name) != getattr(usual, name):
            words.append(f"--{name.replace('_', '-')} {getattr(settings, name)}")
    for teacher in settings.teachers if settings.teachers != usual.teachers else ():
        words.append(f"--teacher {teacher}")
    return " ".join(words)
