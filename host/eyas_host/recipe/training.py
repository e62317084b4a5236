"""`[teacher]` and `[student]`: the sections of a recipe that say how both networks are trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import AtLeastOne, Count, Fraction, Gamma, LossName, Positive, Rate, SamplerName, Weights

_Training = TypeVar("_Training", "TeacherSection", "StudentSection")


class TeacherSection(Section, frozen=True):
    """`[teacher]`: transfer learning with staged unfreezing."""

    model: str = "tf_efficientnet_lite0"
    """Any timm model."""
    weights: Weights = "auto"
    """`auto`: hub, then packaged with eyas[train], then `weights_file`, then an error."""
    weights_file: str = ""
    """Weights to start from, relative to the recipe: .safetensors or a torch file under timm's names, or a teacher.pt
    of another run."""
    head_epochs: AtLeastOne = 30
    """Stage 1: the head alone, on the frozen backbone's cached features (seconds)."""
    head_rate: Rate = 3e-3
    epochs: Count = 8
    """Stage 2: the last blocks too, slower than the head's stage and slower the further down."""
    unfreeze: Annotated[str, Meta(pattern=r"^(all|[0-9]+)$")] = "all"
    """How many of the last blocks stage 2 trains, or `all`."""
    unfreeze_by: Literal["once", "plateau"] = "once"
    """`once`: stage 2 trains them together; `plateau`: from the top, the next where validation gets no better."""
    open_blocks: AtLeastOne = 1
    """plateau: how many blocks open at a time."""
    plateau_epochs: AtLeastOne = 2
    """Epochs without a better validation before the next block opens, and before schedule = 'plateau' cuts the rate."""
    block_rate: Rate = 0.1
    """plateau: the rate of the uppermost block as a multiple of the head's; `layer_decay` goes on from there."""
    rate: Rate = 1e-3
    layer_decay: Rate = 0.8
    """Each block below the head learns at this multiple of the next one's rate."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """How stage 2's rate falls: half a cosine to zero, or to a tenth where validation gets no better."""
    accumulate: AtLeastOne = 1
    """Batches whose gradients make one step of stage 2."""
    clip: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """Largest norm of the gradient (0: not clipped)."""
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Decay of the weights' moving average that is kept as the teacher (0: none)."""
    batch: AtLeastOne = 32
    weight_decay: Fraction = 0.02
    loss: LossName = "cross_entropy"
    """`bce`: each class against the rest; `focal`: images that are answered well count little."""
    focal_gamma: Gamma = 2.0
    """focal: how little; 0 is cross-entropy."""
    label_smoothing: Fraction = 0.05
    class_weights: bool = True
    """Weigh the classes inversely to their counts: balanced accuracy is what is chosen by."""
    sampler: SamplerName = "shuffled"
    """`balanced`: every class is drawn equally often, with repetition; then class_weights = false."""
    patience: AtLeastOne = 3
    """Epochs without a better validation before stage 2 ends."""


class Hint(Section, frozen=True):
    """One block of the student that is to tell what a block of the teacher tells."""

    student: Annotated[str, Meta(min_length=1)]
    """The block by timm's name, e.g. "blocks.3"; a wrong one is answered with all of them."""
    teacher: Annotated[str, Meta(min_length=1)]
    weight: Annotated[float, Meta(gt=0.0, le=1000.0)] = 0.5
    loss: Literal["cosine", "mse"] = "cosine"
    """`cosine`: direction alone; `mse`: the teacher's scale too."""


class StudentSection(Section, frozen=True):
    """`[student]`: distillation into a small network."""

    model: str = "mobilenetv3_small_100"
    activation: Literal["default", "relu"] = "default"
    """`relu` in place of the network's own activations: int8 kernels fuse it, a hard-swish they do not."""
    weights: Weights = "auto"
    """`auto`: hub, then packaged, then `weights_file`, then warm, then random. `warm`: what ships with Eyas for the
    network, made by `eyas warm-start`."""
    weights_file: str = ""
    """Weights to start from, as for the teacher."""
    ready: str = ""
    """A trained student from elsewhere, relative to the recipe: a .safetensors or torch file of its weights under
    timm's names. No teacher is trained then; it is quantized by calibration."""
    views: AtLeastOne = 6
    """Augmented views an image, made once with the teacher's answers and used again every epoch."""
    cache_gb: Annotated[float, Meta(ge=0.0, le=1e6)] = 20.0
    """Largest size of those views on the disk, GB; more is refused before any is made (0: what the disk holds)."""
    epochs: AtLeastOne = 30
    rate: Rate = 3e-3
    batch: AtLeastOne = 32
    weight_decay: Fraction = 0.02
    kd_ratio: Fraction = 0.9
    """Part of the loss that follows the teacher; the rest follows the labels."""
    kd: Literal["kl", "dist"] = "kl"
    """`kl`: the teacher's probabilities; `dist`: only how they rank, over classes and over images."""
    temperature: Positive = 2.0
    hint: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """Weight of the pooled-feature hint (0: none)."""
    hints: tuple[Hint, ...] = ()
    """Hints between blocks: [{ student = "blocks.3", teacher = "blocks.4", weight = 0.5 }]."""
    loss: LossName = "cross_entropy"
    """Of the part that follows the labels; as for the teacher."""
    focal_gamma: Gamma = 2.0
    label_smoothing: Fraction = 0.0
    class_weights: bool = True
    sampler: SamplerName = "shuffled"
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.99
    """Decay of the weights' moving average that is kept as the student (0: none)."""
    labels_only: bool = True
    """Also train the same student without a teacher, to see what distillation buys."""


def training_faults(teacher: TeacherSection, student: StudentSection) -> Iterable[str]:
    """Combinations that no type forbids."""
    for name, section in (("teacher", teacher), ("student", student)):
        if section.sampler == "balanced" and section.class_weights:
            yield (
                f"[{name}] sampler = 'balanced' with class_weights = true: rare classes would count twice over; "
                "take one of them"
            )
        if section.weights == "file" and not section.weights_file:
            yield f"[{name}] weights = 'file': weights_file is missing, a .safetensors or torch file"
        if section.weights_file and section.weights not in ("auto", "file"):
            yield f"[{name}] weights_file belongs to weights = 'file' or 'auto', not to {section.weights!r}"
    plateaus = "plateau" in (teacher.schedule, teacher.unfreeze_by)
    if plateaus and teacher.patience < teacher.plateau_epochs + (teacher.schedule == "plateau"):
        yield (
            f"[teacher] patience = {teacher.patience} ends the training before plateau_epochs = "
            f"{teacher.plateau_epochs} has an effect; take a larger patience"
        )
    if student.weights == "hub" and teacher.weights == "random":
        yield "[teacher] weights = 'random' with [student] weights = 'hub': an untrained teacher cannot teach"


def with_weights_beside(section: _Training, base: Path) -> _Training:
    """The same with its file of weights beside the recipe."""
    if not section.weights_file:
        return section
    return msgspec.structs.replace(section, weights_file=str(base / section.weights_file))
