"""Where a network is quantized, and with which ranges.

`nncf.quantize` leaves squeeze-and-excite blocks in float and puts nothing between a convolution and a hard-swish. An
int8 LiteRT model rounds there all the same, and every rounding that training never saw costs agreement. So the
placement is completed here, from one table of operations, and anything the table does not know is refused by name.

NNCF's quantizers stay in charge of rounding and of the gradients of learned ranges; this module only adds points.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.function_hook import (
    build_graph,
    get_hook_storage,
    register_post_function_hook,
    register_pre_function_hook,
)
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from eyas_host.errors import CompressError

CLASSIFIER = "linear"
"""The operation that makes the logits; it and what it reads stay float."""

WEIGHTED = frozenset({"conv2d"})
"""Operations with a weight that is quantized per output channel, symmetric, -127..127."""

ROUNDED = frozenset({"sub", "add", "mul", "mean", "adaptive_avg_pool2d", "relu", "relu6", "hardswish", "hardsigmoid"})
"""Operations whose output is quantized per tensor, asymmetric."""

CLAMPS = frozenset({"relu", "relu6"})
"""Activations that int8 kernels fuse into the operation before them, so that only the clamped value is rounded."""

TRANSPARENT = frozenset({"flatten", "dropout", "pad", "reshape", "view", "contiguous"})
"""Operations that move values without changing them: the range before is the range behind."""

HARD_ZERO = -3.0
"""Hard-swish is zero at and below -3, so a range may be cut there without any loss (Howard et al., MobileNetV3)."""

_ALIASES = {"__add__": "add", "__iadd__": "add", "add_": "add", "__mul__": "mul", "__sub__": "sub", "relu_": "relu"}


@dataclass(frozen=True)
class Placement:
    """The quantizers of one network.

    Attributes:
        activations: operations whose output is quantized, in order of execution.
        weights: operations whose weight is quantized, in order of execution.
        before_swish: those of `activations` that only a hard-swish reads.
        added_activations: how many of `activations` NNCF had left out.
        added_weights: how many of `weights` NNCF had left out.
    """

    activations: tuple[str, ...]
    weights: tuple[str, ...]
    before_swish: tuple[str, ...] = ()
    added_activations: int = 0
    added_weights: int = 0


@dataclass(frozen=True)
class Affine:
    """What an int8 backend needs to know of a quantizer: ``real = scale * (integer - zero_point)``.

    Attributes:
        scale: float64, one value, or one per output channel.
        zero_point: int64, same shape, within -128..127; 0 for weights.
        low: smallest integer, -128 for activations and -127 for weights.
        per_channel: whether there is a scale for each index of axis 0.

    """

    scale: Tensor
    zero_point: Tensor
    low: int
    per_channel: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest real value of a per-tensor quantizer."""
        scale, zero = float(self.scale), int(self.zero_point)
        return scale * (self.low - zero), scale * (127 - zero)


def required_placement(deploy: nn.Module, example: Tensor) -> Placement:
    """Return every point at which an int8 runtime rounds.

    The rule: each weighted operation's weight; each operation's output, except in front of a clamp that is fused into
    it, in front of a hard-sigmoid (int8 runtimes fuse it as ``relu6(x + 3)``), and at the logits, which stay float.

    Args:
        deploy: folded network, not quantized yet.
        example: float pixels ``[1, 3, H, W]``.

    Raises:
        CompressError: the network holds an operation that has no rule; the message names it.
    """
    activations: list[str] = []
    weights: list[str] = []
    before_swish: list[str] = []
    for name, kind, behind in _operations(deploy, example):
        if kind in TRANSPARENT:
            continue
        if kind not in WEIGHTED | ROUNDED:
            raise CompressError(
                f"no quantization rule for operation {kind!r} at {name!r}; "
                f"known are {', '.join(sorted(WEIGHTED | ROUNDED | TRANSPARENT))}"
            )
        if kind in WEIGHTED:
            weights.append(name)
        if "hardsigmoid" in behind and (kind not in WEIGHTED or len(behind) > 1):
            raise CompressError(f"the hard-sigmoid behind {name!r} has no convolution to be fused into")
        fused = kind not in CLAMPS and len(behind) == 1 and behind <= CLAMPS | {"hardsigmoid"}
        if fused or behind == {"output"}:
            continue
        activations.append(name)
        if behind == {"hardswish"}:
            before_swish.append(name)
    return Placement(tuple(activations), tuple(weights), tuple(before_swish))


def complete_placement(model: nn.Module, required: Placement, calibration: Iterable[Tensor]) -> Placement:
    """Add the quantizers that are missing, with ranges from ``calibration``, and return what was done.

    Args:
        model: network that `nncf.quantize` has returned; changed in place.
        required: what `required_placement` said of it before.
        calibration: batches of float pixels ``[N, 3, H, W]``.

    Raises:
        CompressError: NNCF has put a quantizer where int8 runtimes do not round, or a range is not usable.
    """
    activations, weights = set(activation_quantizers(model)), set(weight_quantizers(model))
    observers = {name: _Observer() for name in required.activations if name not in activations}
    for name in required.weights:
        if name not in weights:
            weight = cast(Tensor, module_of(model, name).weight)
            register_pre_function_hook(model, name, 1, _weight_quantizer(weight))
    handles = [register_post_function_hook(model, name, 0, observer) for name, observer in observers.items()]
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    for handle in handles:
        handle.remove()
    device = next(model.parameters()).device
    for name, observer in observers.items():
        low, high = observer.range()
        if not 0 < high - low < float("inf"):
            raise CompressError(f"{name!r} has no usable range on the calibration pictures: {low}..{high}")
        if name in required.before_swish:
            low = max(low, HARD_ZERO)
        register_post_function_hook(model, name, 0, _activation_quantizer(low, high).to(device))
    check_placement(model, required)
    return replace(
        required,
        added_activations=len(observers),
        added_weights=len(required.weights) - len(weights),
    )


def check_placement(model: nn.Module, required: Placement) -> None:
    """Check that quantizers sit at exactly the required points.

    Raises:
        CompressError: a point is missing or there is one too many; the message names them.
    """
    for what, want, have in (
        ("activation", set(required.activations), set(activation_quantizers(model))),
        ("weight", set(required.weights), set(weight_quantizers(model))),
    ):
        if want != have:
            raise CompressError(
                f"{what} quantizers do not fit the network: missing {sorted(want - have)}, "
                f"where int8 runtimes do not round {sorted(have - want)}"
            )
    hooks = sum(1 for _ in get_hook_storage(model).named_hooks())
    if hooks != len(required.activations) + len(required.weights):
        raise CompressError(f"{hooks} hooks on the network, more than its quantizers account for")


def activation_quantizers(model: nn.Module) -> dict[str, AsymmetricQuantizer]:
    """Return the activation quantizers by the name of the operation whose output they round."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if not is_weight and isinstance(hook, AsymmetricQuantizer)}


def weight_quantizers(model: nn.Module) -> dict[str, SymmetricQuantizer]:
    """Return the weight quantizers by the name of the operation whose weight they round."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if is_weight and isinstance(hook, SymmetricQuantizer)}


def weight_of(model: nn.Module, operation: str) -> Tensor:
    """Return the weight of a weighted operation."""
    weight = module_of(model, operation).weight
    assert isinstance(weight, Tensor)
    return weight


def module_of(model: nn.Module, operation: str) -> nn.Module:
    """Return the module that holds the weight of a weighted operation."""
    return model.get_submodule(".".join(operation.split("/")[:-2]))


@torch.no_grad()
def affine(quantizer: nn.Module) -> Affine:
    """Return scale and zero point of an NNCF quantizer, after the tuning it applies in each forward pass.

    Raises:
        CompressError: the quantizer is not one that int8 backends can follow.

    """
    if isinstance(quantizer, SymmetricQuantizer) and quantizer.level_low == -127 and quantizer.level_high == 127:
        scale = ((quantizer.scale.abs() + quantizer.eps) / 127).double().flatten()
        return Affine(scale, torch.zeros_like(scale, dtype=torch.int64), -127, True)
    if isinstance(quantizer, AsymmetricQuantizer) and quantizer.levels == 256 and quantizer.input_low.numel() == 1:
        low, high = quantizer.get_input_low_input_high()
        scale = ((high.double() - low.double()) / 255).reshape(())
        zero = torch.round(-low.double().reshape(()) / scale).long() - 128
        return Affine(scale, zero, -128, False)
    raise CompressError(f"cannot express this quantizer in int8: {quantizer}")


class _Observer(nn.Module):
    """Means of the smallest and largest value of each batch, NNCF's own default estimate of an activation's range."""

    def __init__(self) -> None:
        super().__init__()
        self.lows: list[float] = []
        self.highs: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.lows.append(float(x.min()))
        self.highs.append(float(x.max()))
        return x

    def range(self) -> tuple[float, float]:
        count = max(len(self.lows), 1)
        return min(sum(self.lows) / count, 0.0), max(sum(self.highs) / count, 0.0)


def _operations(deploy: nn.Module, example: Tensor) -> list[tuple[str, str, set[str]]]:
    """Return (name, kind, kinds of the readers) of each operation; readers are looked up through `TRANSPARENT` ones."""
    graph = build_graph(deploy, example)
    kinds = {
        node: _kind(data["meta"].op_name) if data["type"].value == "function_call" else data["type"].value
        for node, data in graph.nodes(data=True)
    }

    def readers(node: int) -> set[str]:
        found: set[str] = set()
        for reader in graph.successors(node):
            found |= (readers(reader) if kinds[reader] in TRANSPARENT else set()) or {kinds[reader]}
        return found

    return [
        (data["meta"].op_name, kinds[node], readers(node))
        for node, data in graph.nodes(data=True)
        if data["type"].value == "function_call"
    ]


def _kind(operation: str) -> str:
    """Return the kind of "path/to/module/conv2d/0": conv2d."""
    kind = operation.split("/")[-2]
    return _ALIASES.get(kind, kind)


def _point(hook: str) -> tuple[str, bool]:
    """Return (operation, is it a weight) of "pre_hooks.path/conv2d/0__1.0"; NNCF writes a dot in a name as a colon."""
    side, point, _ = hook.split(".")
    operation, _, port = point.rpartition("__")
    return operation.replace(":", "."), side == "pre_hooks" and port == "1"


def _spec(mode: QuantizationScheme, *, scale_shape: tuple[int, ...], weight: bool) -> PTQuantizerSpec:
    return PTQuantizerSpec(
        num_bits=8,
        mode=mode,
        signedness_to_force=True if weight else None,
        narrow_range=weight,
        half_range=False,
        scale_shape=scale_shape,
        logarithm_scale=False,
        is_quantized_on_export=False,
    )


def _weight_quantizer(weight: Tensor) -> SymmetricQuantizer:
    shape = (weight.shape[0],) + (1,) * (weight.dim() - 1)
    quantizer = SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, scale_shape=shape, weight=True))
    with torch.no_grad():
        largest = weight.detach().abs().flatten(1).amax(1).reshape(shape)
        # a channel that pruning has emptied still needs a scale
        quantizer.scale.copy_(torch.where(largest > 0, largest, torch.ones_like(largest)))
    return quantizer.to(weight.device)


def _activation_quantizer(low: float, high: float) -> AsymmetricQuantizer:
    quantizer = AsymmetricQuantizer(_spec(QuantizationScheme.ASYMMETRIC, scale_shape=(1,), weight=False))
    with torch.no_grad():
        quantizer.input_low.fill_(low)
        quantizer.input_range.fill_(high - low)
    return quantizer
