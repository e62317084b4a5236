"""Weights from files, and how well a network's weights suit the images."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from msgspec import Struct
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from eyas_device.bundle import sha256
from eyas_host.models import pretrained
from eyas_host.recipe.image import ImageSection
from eyas_host.support.errors import WeightsError

_PRETRAINED_ON = (1000, 11_821, 21_841, 21_843)
"""Numbers of classes in ImageNet editions: such a head is replaced, any other one was trained for a purpose."""
_SMALL = 64
"""Image side below which the deepest feature maps, at 1/32 scale, have almost no cells, pixels."""
_PRETRAINED_CONFIG = {
    "input_size": (3, pretrained.TRAINED_AT, pretrained.TRAINED_AT),
    "interpolation": "bilinear",
    "mean": (128 / 255,) * 3,
    "std": (128 / 255,) * 3,
}
"""Training configuration of Eyas's own pretrained weights, in timm's form."""
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)
"""What torch and safetensors raise for a damaged file."""
_BLOB = re.compile(r"[0-9a-f]{64}")
"""Name of a file in the hub's cache: the sha256 of its content."""


class DamagedWeightsError(WeightsError):
    """A file of weights that is cut short, empty, or something else."""


def check_whole(path: Path) -> None:
    """Raise `DamagedWeightsError` for a file of weights that is cut short, empty, altered, or no such file.

    Checksums are compared where there are some: a file of the hub's cache is named by its own, a torch file has one for
    each tensor. Of a .safetensors file only a wrong length is noticed.
    """
    try:
        if _BLOB.fullmatch(name := path.resolve().name) and sha256(path) != name:
            raise ValueError("it is not what was downloaded")
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt"):
                pass
        elif not zipfile.is_zipfile(path):
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            with zipfile.ZipFile(path) as archive:
                if (entry := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum of {entry}")
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedWeightsError:
    why = " ".join((str(error) or type(error).__name__).split())[:200]
    if why.startswith("Weights only load failed"):  # torch goes on with advice to run what the file says
        why = "it is no file of tensors"
    return DamagedWeightsError(f"{path}: no weights can be read from it ({why})")


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or torch file, including timm checkpoints; no code in it is run.

    Raises `WeightsError`, for a damaged file `DamagedWeightsError`.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    check_whole(path)
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("not a dict of tensors")
    except UNREADABLE as error:
        raise _damaged(path, error) from None
    return state


def load_initial_weights(backbone: nn.Module, path: Path, name: str, classes: int) -> tuple[Tensor, Tensor] | None:
    """Load a file's weights into a network, including the head if its number of classes fits.

    Returns the normalisation stored in a teacher.pt of Eyas, or None. Raises `WeightsError` for weights of
    another network, and for a head that was trained for another number of classes than ImageNet's or `classes`.
    """
    state = read_weights(path)
    own = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    normalisation = (state["mean"], state["std"]) if own and {"mean", "std"} <= state.keys() else None
    state = own or state
    wanted = backbone.state_dict()
    head = _head_names(backbone)
    _check_same_network(state, {key: value for key, value in wanted.items() if key not in head}, head, path, name)
    found = {key: state[key] for key in head if key in state}
    if found:
        head_classes = next(iter(found.values())).shape[0]
        if head_classes == classes:
            wanted |= found
        elif head_classes not in _PRETRAINED_ON:
            raise WeightsError(
                f"{path}: trained for {head_classes} classes, the images have {classes}; to start from the rest, "
                f"remove its head from the file ({', '.join(found)})"
            )
    backbone.load_state_dict(wanted | {key: value for key, value in state.items() if key not in head})
    return normalisation


def _head_names(backbone: Any) -> list[str]:
    """Names of the classifier's tensors, weight first."""
    classifier = backbone.get_classifier()
    prefix = next(name for name, module in backbone.named_modules() if module is classifier)
    return [f"{prefix}.{key}" for key in classifier.state_dict()]


def _check_same_network(
    state: dict[str, Tensor], wanted: dict[str, Tensor], head: list[str], path: Path, name: str
) -> None:
    """Raise `WeightsError` unless all tensors except the head have the same names and shapes."""
    wrong = [f"{key} is missing" for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    wrong += [f"{key} is unknown" for key in state if key not in wanted and key not in head]
    wrong += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise WeightsError(
            f"{path}: weights of another network than {name}: {len(wrong)} of {len(wanted)} tensors do not fit, "
            f"e.g. {wrong[0]}"
        )


class WeightsFit(Struct, frozen=True):
    """How well a network's weights suit the images."""

    note: str
    """One line: training configuration and the recipe's preprocessing."""
    warnings: tuple[str, ...] = ()


def fit_to_images(backbone: nn.Module, name: str, origin: str, image: ImageSection) -> WeightsFit:
    """Compare the training configuration of a network's weights with the recipe's `[image]`.

    Mean and standard deviation always fit: they come from timm's configuration or from the file of a teacher.pt.
    """
    warnings = []
    if image.size < _SMALL:
        warnings.append(
            f"[image] size = {image.size}: {name} halves it five times and sees next to nothing; take {_SMALL} or "
            "more (128 is usual)"
        )
    if origin == "random":
        return WeightsFit(f"{name}: no weights, it starts from random ones", tuple(warnings))
    config = resolve_model_data_config(backbone) | (_PRETRAINED_CONFIG if origin == "pretrained" else {})
    trained, interpolation = config["input_size"][-1], config["interpolation"]
    if _SMALL <= image.size < trained / 2 or image.size > 2 * trained:
        warnings.append(
            f"[image] size = {image.size}: {name} was trained at {trained} px, and what it knows is of that scale; "
            f"between {trained // 2} and {2 * trained} px it helps most"
        )
    if image.interpolation == "linear" and interpolation in ("bicubic", "bilinear", "lanczos"):
        warnings.append(
            f"[image] interpolation = 'linear' leaves pixels out where it shrinks; {name} was trained with "
            f"{interpolation} that averages them; take 'area', or shrink by less than 2"
        )
    mean, std = (", ".join(f"{value:.3g}" for value in config[key]) for key in ("mean", "std"))
    return WeightsFit(
        f"{name}: {origin} weights, trained at {trained} px ({interpolation}), here {image.size} px "
        f"({image.interpolation}); pixels are normalised by mean {mean} and deviation {std} as they were",
        tuple(warnings),
    )
