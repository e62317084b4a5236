"""`[teacher]` and `[student]`: the sections of a recipe that say how both networks are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.sections import Section

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1000.0)]
Rate = Annotated[float, Meta(gt=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]


class TeacherSection(Section, frozen=True):
    """`[teacher]`: transfer learning with staged unfreezing."""

    model: str = "tf_efficientnet_lite0"
    """Any timm model."""
    weights: Literal["auto", "hub", "packaged", "random"] = "auto"
    """`auto`: hub, then packaged with eyas[host], then an error."""
    head_epochs: AtLeastOne = 30
    """Stage 1: the head alone, on the frozen backbone's cached features (seconds)."""
    head_rate: Rate = 3e-3
    epochs: Count = 8
    """Stage 2: the last blocks too, slower than the head's stage and slower the further down."""
    unfreeze: Annotated[str, Meta(pattern=r"^(all|[0-9]+)$")] = "all"
    """How many of the last blocks stage 2 trains, or `all`."""
    rate: Rate = 1e-3
    layer_decay: Rate = 0.8
    """Each block below the head learns at this multiple of the next one's rate."""
    batch: AtLeastOne = 32
    weight_decay: Fraction = 0.02
    label_smoothing: Fraction = 0.05
    class_weights: bool = True
    """Weigh the classes inversely to their counts: balanced accuracy is what is chosen by."""
    patience: AtLeastOne = 3
    """Epochs without a better validation before stage 2 ends."""


class StudentSection(Section, frozen=True):
    """`[student]`: distillation into a small network."""

    model: str = "mobilenetv3_small_100"
    activation: Literal["default", "relu"] = "default"
    """`relu` in place of the network's own activations: int8 kernels fuse it, a hard-swish they do not."""
    weights: Literal["auto", "hub", "packaged", "random"] = "auto"
    """`auto`: hub, then packaged, then random."""
    ready: str = ""
    """A trained student from elsewhere, relative to the recipe: a .safetensors or torch file of its weights under
    timm's names. No teacher is trained then; it is quantized by calibration."""
    views: AtLeastOne = 6
    """Augmented views a picture, made once with the teacher's answers and used again every epoch."""
    epochs: AtLeastOne = 30
    rate: Rate = 3e-3
    batch: AtLeastOne = 32
    weight_decay: Fraction = 0.02
    kd_ratio: Fraction = 0.9
    """Part of the loss that follows the teacher; the rest follows the labels."""
    temperature: Positive = 2.0
    hint: Annotated[float, Meta(ge=0.0, le=1000.0)] = 1.0
    """Weight of the pooled-feature hint (0: none)."""
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.99
    """Decay of the weights' moving average that is kept as the student (0: none)."""
    labels_only: bool = True
    """Also train the same student without a teacher, to see what distillation buys."""
