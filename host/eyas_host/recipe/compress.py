"""`[prune]` and `[quantize]`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import AtLeastOne, Count, Rate


class PruneSection(Section, frozen=True):
    """`[prune]`: how the student is pruned."""

    method: Literal["channel", "nncf", "none"] = "channel"
    """`channel`: structured pruning, which makes the model faster; `nncf`: unstructured sparsity, no speed-up;
    `none`."""
    target: Literal["macs", "latency", "ratio"] = "macs"
    """channel: the quantity reduced to `keep`: multiply-accumulates, measured latency, or the channels of every
    layer."""
    keep: Rate = 0.6
    """channel: fraction of the target to keep."""
    ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    """latency: target in milliseconds instead of a fraction (0: use `keep`)."""
    table: str = ""
    """latency: file that `eyas-device bench --blocks FILE` wrote on the target, relative to the recipe; empty: measure
    on this machine."""
    rounds: AtLeastOne = 4
    """latency: pruning rounds, with `round_epochs` of recovery between them."""
    round_epochs: Count = 2
    """latency: epochs of recovery between the rounds."""
    sparsity: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    """nncf: fraction of the weights set to zero."""
    epochs: Count = 20
    """Recovery epochs after pruning, with the teacher's predictions."""
    patience: AtLeastOne = 5
    """Early stopping: epochs without improvement on validation before the recovery ends."""
    rate: Rate = 1e-3
    """Learning rate of the recovery."""


class QuantizeSection(Section, frozen=True):
    """`[quantize]`: how the float student is quantized to int8."""

    method: Literal["qat", "ptq"] = "qat"
    """`qat`: quantization-aware training that distils the float student; `ptq`: ranges from calibration images only."""
    preset: Literal["mixed", "symmetric"] = "mixed"
    """`symmetric`: all zero points 0, as TensorRT requires; `mixed` uses the full asymmetric range."""
    weight_bits: Literal[7, 8] = 7
    """7 keeps integer weights within -63..63, in training and in every artefact: the same predictions on x86 processors
    without VNNI, whose int8 sums saturate."""
    epochs: Count = 4
    """qat: epochs of fine-tuning."""
    patience: AtLeastOne = 2
    """qat: early stopping: epochs that come no nearer to the float student on validation before the training ends."""
    rate: Rate = 1e-4
    """qat: learning rate."""
    calibration: Annotated[int, Meta(ge=2)] = 128
    """Training images that set the initial ranges."""
    choose: Literal["coverage", "random"] = "coverage"
    """`coverage`: equally many of each class, far apart in the student's features; `random`."""
    keep_float: tuple[str, ...] = ()
    """Layers to keep in float; `eyas sensitivity` lists the candidates."""
    fallback: Count = 0
    """Maximum number of layers to keep in float where int8 loses more than `gate.max_drop` on validation."""
