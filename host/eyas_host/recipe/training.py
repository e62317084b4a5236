"""`[teacher]` and `[student]`: how both networks are trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import (
    AtLeastOne,
    Count,
    Fraction,
    Gamma,
    LossName,
    Positive,
    Progressive,
    Rate,
    SamplerName,
    Weights,
)


class TeacherSection(Section, frozen=True):
    """`[teacher]`: transfer learning with staged unfreezing."""

    model: str = "tf_efficientnet_lite0"
    """Any timm model."""
    weights: Weights = "auto"
    """`auto`: hub, then packaged with eyas[train], then `weights_file`, then an error."""
    weights_file: str = ""
    """Initial weights, relative to the recipe: .safetensors or a torch file with timm's tensor names, or a teacher.pt
    of another run."""
    head_epochs: AtLeastOne = 30
    """Stage 1: only the head, on the frozen backbone's cached features (seconds)."""
    head_rate: Rate = 3e-3
    """Learning rate of stage 1."""
    epochs: Count = 8
    """Stage 2: the last blocks too, at rates that decrease towards the input."""
    progressive: Progressive = 0.0
    """Progressive resizing: the fraction of stage 2's epochs, at its start, that see images of three quarters of the
    side, which take less time (0: off). Patience counts from the first epoch of full size."""
    unfreeze: Annotated[str, Meta(pattern=r"^(all|[0-9]+)$")] = "all"
    """How many of the last blocks stage 2 trains, or `all`."""
    unfreeze_by: Literal["once", "plateau"] = "once"
    """`once`: stage 2 trains them together; `plateau`: from the top, the next one whenever validation stops
    improving."""
    open_blocks: AtLeastOne = 1
    """plateau: number of blocks to unfreeze at a time."""
    plateau_epochs: AtLeastOne = 2
    """Epochs without improvement before the next block is unfrozen, and before schedule = 'plateau' cuts the rate."""
    block_rate: Rate = 0.1
    """plateau: learning rate of the topmost block as a multiple of the head's; `layer_decay` applies below it."""
    rate: Rate = 1e-3
    """Learning rate of the head in stage 2; `layer_decay` lowers it block by block."""
    layer_decay: Rate = 0.8
    """Learning rate of each block below the head as a multiple of the rate of the block above it."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """Learning-rate schedule of stage 2: cosine to zero, or a tenth whenever validation stops improving."""
    accumulate: AtLeastOne = 1
    """Gradient accumulation of stage 2: batches per optimizer step."""
    clip: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """Maximum gradient norm (0: no clipping)."""
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Decay of the exponential moving average of the weights, which becomes the teacher (0: no averaging)."""
    batch: AtLeastOne = 32
    """Images in a batch, over all processes."""
    weight_decay: Fraction = 0.02
    """Weight decay of AdamW."""
    loss: LossName = "cross_entropy"
    """`bce`: one-vs-rest; `focal`: down-weights well-classified images."""
    focal_gamma: Gamma = 2.0
    """Focusing parameter gamma; 0 reduces to cross-entropy."""
    label_smoothing: Fraction = 0.05
    """Probability mass that is spread over the other classes."""
    class_weights: bool = True
    """Weight classes inversely to their counts, as balanced accuracy does."""
    sampler: SamplerName = "shuffled"
    """`balanced`: sample every class equally often, with replacement; needs class_weights = false."""
    patience: AtLeastOne = 3
    """Early stopping: epochs without improvement before stage 2 ends."""


class FeatureLayer(Section, frozen=True):
    """A pair of blocks whose feature maps the student matches to the teacher's."""

    student: Annotated[str, Meta(min_length=1)]
    """timm's name of the block, e.g. "blocks.3"; the error for a wrong name lists them all."""
    teacher: Annotated[str, Meta(min_length=1)]
    """Block of the teacher, likewise."""
    weight: Annotated[float, Meta(gt=0.0, le=1000.0)] = 0.5
    """Weight of its loss."""
    loss: Literal["cosine", "mse"] = "cosine"
    """`cosine`: direction only; `mse`: scale too."""


class StudentSection(Section, frozen=True):
    """`[student]`: distillation into a small network."""

    model: str = "mobilenetv3_small_100"
    """A timm model; `eyas new --help` lists presets."""
    activation: Literal["default", "relu"] = "default"
    """`relu` replaces the network's own activations: int8 kernels fuse ReLU but not hard-swish."""
    weights: Weights = "auto"
    """`auto`: hub, then packaged, then `weights_file`, then pretrained, then random. `pretrained`: the weights that
    ship with Eyas, made by `eyas pretrain`."""
    weights_file: str = ""
    """Initial weights, as for the teacher."""
    checkpoint: str = ""
    """A student trained elsewhere, relative to the recipe: a .safetensors or torch file with timm's tensor names. No
    teacher is trained then, and the student is quantized by calibration only."""
    views: AtLeastOne = 6
    """Augmented views per image, cached with the teacher's predictions and reused every epoch."""
    cache_gb: Annotated[float, Meta(ge=0.0, le=1e6)] = 20.0
    """Maximum size of the view cache, GB; checked before anything is written (0: limited by the disk only)."""
    epochs: AtLeastOne = 30
    """Passes over the cached views; one view of each image an epoch."""
    progressive: Progressive = 0.0
    """Progressive resizing: the fraction of the epochs, at the start, that see views of three quarters of the side; the
    teacher's answers are those of the full size (0: off)."""
    rate: Rate = 3e-3
    """Learning rate."""
    batch: AtLeastOne = 32
    """Images in a batch, over all processes."""
    weight_decay: Fraction = 0.02
    """Weight decay of AdamW."""
    kd_ratio: Fraction = 0.9
    """Weight of the distillation loss; 1 - kd_ratio is the weight of the label loss."""
    kd: Literal["kl", "dist"] = "kl"
    """`kl`: KL divergence from the teacher; `dist`: correlation with it, over classes and over images (DIST)."""
    temperature: Positive = 2.0
    """`kl`: both networks' logits are divided by it."""
    feature_loss: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """Weight of the pooled-feature distillation loss (0: off)."""
    feature_layers: tuple[FeatureLayer, ...] = ()
    """Feature distillation between blocks: [{ student = "blocks.3", teacher = "blocks.4", weight = 0.5 }]."""
    loss: LossName = "cross_entropy"
    """Label loss, as for the teacher."""
    focal_gamma: Gamma = 2.0
    """Focusing parameter of the focal label loss, as for the teacher."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the label loss, as for the teacher."""
    class_weights: bool = True
    """Weights of rare classes in the label loss, as for the teacher."""
    sampler: SamplerName = "shuffled"
    """Order of the training images, as for the teacher."""
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.99
    """Decay of the exponential moving average of the weights, which becomes the student (0: no averaging)."""
    labels_only: bool = False
    """Also train the same student without a teacher, to measure the gain from distillation."""


def training_errors(teacher: TeacherSection, student: StudentSection) -> Iterable[str]:
    """Combinations of settings that cannot work, a line each."""
    for name, section in (("teacher", teacher), ("student", student)):
        if section.sampler == "balanced" and section.class_weights:
            yield (
                f"[{name}] sampler = 'balanced' with class_weights = true: rare classes would count twice; "
                "use one of them"
            )
        if section.weights == "file" and not section.weights_file:
            yield f"[{name}] weights = 'file': weights_file is missing (a .safetensors or torch file)"
        if section.weights_file and section.weights not in ("auto", "file"):
            yield f"[{name}] weights_file belongs to weights = 'file' or 'auto', not to {section.weights!r}"
    plateaus = "plateau" in (teacher.schedule, teacher.unfreeze_by)
    if plateaus and teacher.patience < teacher.plateau_epochs + (teacher.schedule == "plateau"):
        yield (
            f"[teacher] patience = {teacher.patience} stops the training before plateau_epochs = "
            f"{teacher.plateau_epochs} has an effect; take a larger patience"
        )
    if student.weights == "hub" and teacher.weights == "random":
        yield "[teacher] weights = 'random' with [student] weights = 'hub': an untrained teacher cannot teach"
