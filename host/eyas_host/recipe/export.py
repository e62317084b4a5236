"""`[compile]` and `[gate]`: what is built, and what it must reach to be packed."""

from __future__ import annotations

from eyas_device.bundle import Precision, RuntimeName
from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.recipe.types import Fraction, Positive


class CompileSection(Section, frozen=True):
    """`[compile]`: which runtimes to build for."""

    runtimes: tuple[RuntimeName, ...] = ("litert", "openvino", "onnx")
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    """fp32 and int8; int16 besides builds a LiteRT artefact with int16 activations: more exact, slow."""


class GateSection(Section, frozen=True):
    """`[gate]`: bounds on validation below which an artefact is not packed."""

    min_agreement: Fraction = 0.95
    """Part of the images on which an artefact's answer equals its reference model's."""
    max_dp: Positive = 0.02
    """Largest allowed mean difference of a probability."""
    max_drop: Fraction = 0.03
    """Largest allowed loss of balanced accuracy of int8 against the float model it was made from."""
