"""`[compile]` and `[gate]`: which artefacts are built, and the bounds they must meet to be packed."""

from __future__ import annotations

from eyas_device.bundle import Precision, RuntimeName
from eyas_device.support.toml import Section
from eyas_host.recipe.types import Fraction, Positive


class CompileSection(Section, frozen=True):
    """`[compile]`: which runtimes to build for."""

    runtimes: tuple[RuntimeName, ...] = ("litert", "openvino", "onnx")
    """Runtimes that artefacts are built for; latency pruning measures on the first."""
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    """fp32 and int8; int16 adds a LiteRT artefact with int16 activations: more exact, slow."""


class GateSection(Section, frozen=True):
    """`[gate]`: bounds on validation that an artefact must meet to be packed."""

    min_agreement: Fraction = 0.95
    """Minimum fraction of images on which an artefact and its reference model predict the same label."""
    max_dp: Positive = 0.02
    """Maximum mean absolute difference of the probabilities."""
    max_drop: Fraction = 0.03
    """Maximum drop of int8's balanced accuracy against the float model it was made from."""
