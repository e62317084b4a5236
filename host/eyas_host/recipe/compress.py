"""`[prune]` and `[quantize]`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.recipe.types import AtLeastOne, Count, Rate


class PruneSection(Section, frozen=True):
    """`[prune]`: a smaller graph."""

    method: Literal["channel", "nncf", "none"] = "channel"
    """`channel`: fewer channels, really faster; `nncf`: zeros among the weights, no speed; `none`."""
    target: Literal["macs", "latency", "ratio"] = "macs"
    """channel: what is brought down to `keep`: multiply-accumulates, measured latency, or channels of every layer."""
    keep: Rate = 0.6
    """channel: the part of the target that stays."""
    ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    """latency: milliseconds to reach instead of a part (0: `keep` holds)."""
    table: str = ""
    """latency: what `eyas-device bench --blocks FILE` wrote on the target, relative to the recipe; measured here if
    there is none."""
    rounds: AtLeastOne = 4
    """latency: steps in which it is reached, with `round_epochs` of recovery between them."""
    round_epochs: Count = 2
    sparsity: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    """nncf: part of the weights that becomes zero."""
    epochs: Count = 20
    """Recovery with the teacher's answers."""
    rate: Rate = 1e-3


class QuantizeSection(Section, frozen=True):
    """`[quantize]`: how the float student becomes int8."""

    method: Literal["qat", "ptq"] = "qat"
    """`qat`: fine-tuning with the int8 grid in the graph until it answers as the float student; `ptq`: ranges from the
    calibration images alone."""
    preset: Literal["mixed", "symmetric"] = "mixed"
    """`symmetric`: all zero points 0, as TensorRT wants them; `mixed` uses the whole grid."""
    weight_bits: Literal[7, 8] = 7
    """7 uses half of the weights' grid: the same answers on x86 processors without VNNI, whose int8 sums saturate."""
    epochs: Count = 4
    rate: Rate = 1e-4
    calibration: Annotated[int, Meta(ge=2)] = 128
    """Training images that set the first ranges."""
    choose: Literal["coverage", "random"] = "coverage"
    """`coverage`: as many of each class, far apart in the student's features; `random`."""
    keep_float: tuple[str, ...] = ()
    """Layers that stay float; `eyas sensitivity` names them."""
    fallback: Count = 0
    """Where int8 loses more than `gate.max_drop` on validation: at most so many layers are kept float to fix it."""
