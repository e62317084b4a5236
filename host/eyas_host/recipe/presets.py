"""Presets: networks with short names and initial settings, for `eyas new --teacher NAME --student NAME`.

Any other timm network works too, with settings of your own. The settings follow common practice for each family with
AdamW and small batches; they are starting points, not measured optima. Transformers and ConvNeXt need lower learning
rates than networks with BatchNorm, deep networks a layer decay closer to 1, because it applies once for each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from msgspec import Struct

from eyas_device.support.toml import did_you_mean
from eyas_host.support.errors import RecipeError


class Teacher(Struct, frozen=True):
    """Preset of a teacher: a network and `[teacher]` settings that suit it."""

    model: str
    """timm's name."""
    why: str
    rate: float = 1e-3
    head_rate: float = 3e-3
    layer_decay: float = 0.8
    unfreeze: str = "all"
    batch: int = 32
    size: int = 128
    """Smallest image side without a large loss of accuracy, pixels."""
    min_size: int = 128
    """Side for smaller images: more than half of what it was trained at, below which its knowledge is of little use."""


class Student(Struct, frozen=True):
    """Preset of a student: a network for devices and `[student]` settings that suit it."""

    model: str
    why: str
    rate: float = 3e-3
    batch: int = 32


TEACHERS: Mapping[str, Teacher] = {
    "efficientnet_lite0": Teacher("tf_efficientnet_lite0", "the default; weights come with eyas[train], no hub needed"),
    "efficientnet_lite1": Teacher(
        "tf_efficientnet_lite1", "a little stronger; weights come with eyas[train]", layer_decay=0.85
    ),
    "efficientnet_lite2": Teacher(
        "tf_efficientnet_lite2",
        "stronger still; weights come with eyas[train]",
        layer_decay=0.85,
        size=160,
        min_size=160,
    ),
    "efficientnet_b3": Teacher(
        "efficientnet_b3", "strong on fine textures", rate=5e-4, layer_decay=0.9, size=160, min_size=160
    ),
    "resnet50": Teacher("resnet50", "the plain reference, fast on GPUs", rate=3e-4, layer_decay=0.85),
    "densenet201": Teacher(
        "densenet201", "good with few images and X-rays; slow", rate=3e-4, layer_decay=0.97, unfreeze="34", batch=16
    ),
    "vit_small": Teacher(
        "vit_small_patch16_224",
        "sees the whole image at once; needs 224 px and a GPU",
        rate=1e-4,
        head_rate=1e-3,
        layer_decay=0.75,
        size=224,
    ),
    "convnext_tiny": Teacher(
        "convnext_tiny", "the strongest of these; needs a GPU", rate=1e-4, head_rate=1e-3, layer_decay=0.8, batch=16
    ),
}
STUDENTS: Mapping[str, Student] = {
    "mobilenetv3_small": Student("mobilenetv3_small_100", "the default; smallest and fastest"),
    "mobilenetv3_large": Student("mobilenetv3_large_100", "more accurate, about three times the work", rate=2e-3),
    "mobilenetv4_conv_small": Student(
        "mobilenetv4_conv_small", "plain ReLU convolutions; gains most from int8 and accelerators"
    ),
}
_Network = TypeVar("_Network", Teacher, Student)


def pick(networks: Mapping[str, _Network], name: str) -> _Network:
    """Find a preset by its short name or by timm's name. Raises `RecipeError`, with all names, if there is none."""
    found = networks.get(name) or next((one for one in networks.values() if one.model == name), None)
    if found is None:
        raise RecipeError(
            f"{name!r}: not a preset; {did_you_mean(name, networks)}allowed: {', '.join(networks)}. "
            "Name any other timm network in the recipe"
        )
    return found
