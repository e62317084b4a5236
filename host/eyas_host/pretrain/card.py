"""Model card of pretrained weights: training, images with their licences, and quality."""

from __future__ import annotations

from collections import Counter

import msgspec

from eyas_host.pretrain.images import MIN_SIDE, SOURCES
from eyas_host.pretrain.train import PretrainResult, PretrainSettings, default_last_size


class Record(msgspec.Struct, frozen=True):
    """`NETWORK.json`, beside the weights."""

    settings: PretrainSettings
    result: PretrainResult
    machine: str
    """Processor of the last training session."""
    images: dict[str, str]
    """sha256 of each training image -> its package."""


def weights_card(record: Record) -> str:
    """The card as Markdown."""
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

Initial student weights, fp16 with timm's tensor names (prefix `backbone.`), and the normalisation that they were
trained with (`mean`, `std`). Use: `[student] weights = "pretrained"` for those that ship with Eyas, else
`weights = "file"` and `weights_file`. Not a classifier for deployment: the 1,000-class head is replaced.

## Training

Distilled from {", ".join(settings.teachers)} (Apache-2.0): KL of the 1,000 probabilities at temperature
{settings.temperature:g} on {result.crops:,} crops ({state}) of {settings.size} pixels a side,
{settings.last_size} in the last {settings.last:.0%}; area 0.02 to 1, flips, rotation, colour, CutMix in
{settings.cutmix:.0%} of the batches; AdamW {settings.rate:g}, cosine, batch {settings.batch}, moving average
{settings.ema:g}, seed {settings.seed}. {hours:.2f} hours on {record.machine}. To reproduce:

    {_command(settings)}

## Images

| package | images | licence |
|---|---|---|
{rows}

`{settings.student}.json` lists the sha256 of each; those below {MIN_SIDE} pixels were skipped. This file
contains no image. The weights are licensed under Apache-2.0, like the teacher's. Whether the licence of an image
extends to weights trained on it is not settled everywhere; to be certain, train on your own images.

## Evaluation

On {result.held_out} crops of held-out images: same prediction as the teacher (1,000 classes)
{result.agreement:.1%}, mean KL {result.divergence:.3f} nats.
"""


def _command(settings: PretrainSettings) -> str:
    """The command that reproduces the weights."""
    options = ["eyas pretrain", f"--student {settings.student}", f"--crops {settings.crops}"]
    defaults = PretrainSettings(last_size=default_last_size(settings.size))
    for name in ("size", "last_size", "batch", "seed"):
        if getattr(settings, name) != getattr(defaults, name):
            options.append(f"--{name.replace('_', '-')} {getattr(settings, name)}")
    for teacher in settings.teachers if settings.teachers != defaults.teachers else ():
        options.append(f"--teacher {teacher}")
    return " ".join(options)
