"""Where a network is quantized, and with which ranges.

`nncf.quantize` leaves squeeze-and-excite blocks in float and puts nothing between a convolution and a hard-swish. An
int8 LiteRT model rounds there all the same, and every rounding that training never saw costs agreement. So the
placement is completed here, from one table of operations, and anything the table does not know is refused by name.

NNCF's quantizers stay in charge of rounding and of the gradients of learned ranges; this module only adds points.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer
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
        added_activations: how many of `activations` NNCF had left out.
        added_weights: how many of `weights` NNCF had left out.

    """

    activations: tuple[str, ...]
    weights: tuple[str, ...]
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


@dataclass(frozen=True)
class _Operation:
    name: str
    kind: str
    consumers: tuple[str, ...]  # kinds of the operations that read its output; "output" for the network's end


def required_placement(model: nn.Module, example: Tensor) -> Placement:
    """Return every point at which an int8 runtime rounds, whatever is quantized now.

    The rule: each convolution's weight; each operation's output, except in front of a clamp that is fused into it, in
    front of a hard-sigmoid (int8 runtimes fuse it as ``relu6(x + 3)``), and around the classifier at the end, which
    stays float: it is a few kilobytes, and rounded logits would tie.

    Args:
        model: folded network, quantized already or not.
        example: float pixels ``[1, 3, H, W]``.

    Raises:
        CompressError: the network holds an operation that has no rule; the message names it.

    """
    activations: list[str] = []
    weights: list[str] = []
    for operation in _operations(model, example):
        behind = set(operation.consumers)
        if operation.kind in TRANSPARENT or operation.kind == CLASSIFIER:
            continue
        if operation.kind in WEIGHTED:
            weights.append(operation.name)
        elif operation.kind not in ROUNDED:
            raise CompressError(
                f"no quantization rule for operation {operation.kind!r} at {operation.name!r}; "
                f"known are {', '.join(sorted(WEIGHTED | ROUNDED | TRANSPARENT | {CLASSIFIER}))}"
            )
        if "hardsigmoid" in behind and not (behind == {"hardsigmoid"} and operation.kind in WEIGHTED):
            raise CompressError(f"the hard-sigmoid behind {operation.name!r} has no convolution to be fused into")
        fused = len(behind) == 1 and behind <= CLAMPS and operation.kind not in CLAMPS
        if fused or behind in ({"hardsigmoid"}, {CLASSIFIER}, {"output"}):
            continue
        activations.append(operation.name)
    return Placement(tuple(activations), tuple(weights))


def present_placement(model: nn.Module) -> Placement:
    """Return the points at which NNCF quantizers sit now (in hook order)."""
    points = [_point(name) for name, hook in get_hook_storage(model).named_hooks() if isinstance(hook, BaseQuantizer)]
    return Placement(
        activations=tuple(op for op, is_weight in points if not is_weight),
        weights=tuple(op for op, is_weight in points if is_weight),
    )


def complete_placement(model: nn.Module, calibration: Iterable[Tensor], example: Tensor) -> Placement:
    """Add the quantizers that `required_placement` asks for and that are missing, with ranges from ``calibration``.

    Args:
        model: network that `nncf.quantize` has returned; changed in place.
        calibration: batches of float pixels ``[N, 3, H, W]``.
        example: float pixels ``[1, 3, H, W]``.

    Raises:
        CompressError: an operation has no rule, NNCF has put a quantizer where int8 runtimes do not round, or a
            range is not finite.

    """
    required, present = required_placement(model, example), present_placement(model)
    surplus = (set(present.activations) - set(required.activations)) | (set(present.weights) - set(required.weights))
    if surplus:
        raise CompressError(f"NNCF quantizes where int8 runtimes do not: {', '.join(sorted(surplus))}")
    missing = [name for name in required.activations if name not in set(present.activations)]
    before_swish = {op.name for op in _operations(model, example) if set(op.consumers) == {"hardswish"}}

    for name in missing_weights(required, present):
        weight = weight_of(model, name)
        register_pre_function_hook(model, name, 1, _weight_quantizer(weight).to(weight.device))
    observers = {name: _Observer() for name in missing}
    handles = [register_post_function_hook(model, name, 0, observer) for name, observer in observers.items()]
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    for handle in handles:
        handle.remove()
    for name, observer in observers.items():
        low, high = observer.range()
        if not (low < float("inf") and high > low):
            raise CompressError(f"{name!r} has no usable range on the calibration pictures: {low}..{high}")
        if name in before_swish:
            low = max(low, HARD_ZERO)
        register_post_function_hook(model, name, 0, _activation_quantizer(low, high).to(example.device))
    return check_placement(model, example, present)


def missing_weights(required: Placement, present: Placement) -> list[str]:
    """Return the weighted operations of ``required`` that have no weight quantizer in ``present``."""
    return [name for name in required.weights if name not in set(present.weights)]


def check_placement(model: nn.Module, example: Tensor, before: Placement | None = None) -> Placement:
    """Return the placement, having checked that it is exactly the required one.

    Raises:
        CompressError: a point is missing or there is one too many; the message names them.

    """
    required, present = required_placement(model, example), present_placement(model)
    for what, want, have in (
        ("activation", required.activations, present.activations),
        ("weight", required.weights, present.weights),
    ):
        if sorted(want) != sorted(have):
            raise CompressError(
                f"{what} quantizers do not match the network: missing {sorted(set(want) - set(have))}, "
                f"unexpected {sorted(set(have) - set(want))}, {len(have)} of {len(want)}"
            )
    if before is None:
        return required
    return Placement(
        required.activations,
        required.weights,
        len(required.activations) - len(before.activations),
        len(required.weights) - len(before.weights),
    )


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


def _operations(model: nn.Module, example: Tensor) -> list[_Operation]:
    graph = build_graph(model, example)
    kinds: dict[int, str] = {}
    for node, data in graph.nodes(data=True):
        node_type = data["type"].value
        kinds[node] = node_type if node_type != "function_call" else _kind(data["meta"].op_name)
    found = []
    for node, data in graph.nodes(data=True):
        if data["type"].value == "function_call" and "__nncf_hooks" not in data["meta"].op_name:
            if _is_hook(data["meta"].op_name):
                continue
            consumers = tuple(kinds[reader] for reader in _readers(graph, node, kinds))
            found.append(_Operation(data["meta"].op_name, kinds[node], consumers))
    return found


def _point(hook_name: str) -> tuple[str, bool]:
    """The operation a hook sits at, and whether it rounds the operation's weight."""
    kind, operation, port = decode_hook_name(hook_name)
    return operation, kind == "pre_hooks" and port == 1


def _kind(operation: str) -> str:
    """`backbone/conv_stem/conv2d/0` -> `conv2d`."""
    name = operation.split("/")[-2]
    return _ALIASES.get(name, name)


def _is_hook(operation: str) -> bool:
    return "pre_hook__" in operation or "post_hook__" in operation


def _readers(graph: Any, node: int, kinds: dict[int, str]) -> Iterator[int]:
    """The operations that read a node's output, seen through hooks and operations that only move values."""
    for reader in graph.successors(node):
        name = getattr(graph.nodes[reader]["meta"], "op_name", "")
        if _is_hook(name) or kinds[reader] in TRANSPARENT:
            yield from _readers(graph, reader, kinds)
        else:
            yield reader


def _activation_quantizer(low: float, high: float) -> AsymmetricQuantizer:
    quantizer = AsymmetricQuantizer(_spec(QuantizationScheme.ASYMMETRIC, (1,)))
    quantizer.input_low.data.fill_(low)
    quantizer.input_range.data.fill_(high - low)
    return quantizer


def _weight_quantizer(weight: Tensor) -> SymmetricQuantizer:
    shape = (weight.shape[0], *(1 for _ in weight.shape[1:]))
    quantizer = SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, shape))
    largest = weight.detach().abs().flatten(1).amax(dim=1).clamp(min=1e-8)
    quantizer.scale.data.copy_(largest.reshape(shape))
    return quantizer


def _spec(mode: QuantizationScheme, shape: tuple[int, ...]) -> PTQuantizerSpec:
    """Eight bits; symmetric ones are signed and leave out -128, as int8 weights do."""
    symmetric = mode == QuantizationScheme.SYMMETRIC
    return PTQuantizerSpec(
        num_bits=8,
        mode=mode,
        signedness_to_force=True if symmetric else None,
        narrow_range=symmetric,
        half_range=False,
        scale_shape=shape,
        logarithm_scale=False,
    )


def feeding_quantizers(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Weighted operation -> the operation whose quantizer rounds what it reads."""
    graph = build_graph(model, example)
    names = {node: getattr(data["meta"], "op_name", "") for node, data in graph.nodes(data=True)}
    rounded = set(activation_quantizers(model))
    feeds: dict[str, str] = {}
    for node, name in names.items():
        if not name or _is_hook(name) or _kind(name) not in WEIGHTED:
            continue
        source = _first_input(graph, node)
        while names[source] not in rounded:
            source = _first_input(graph, source)
        feeds[name] = names[source]
    return feeds


def _first_input(graph: Any, node: int) -> int:
    """The node that a node's first argument comes from."""
    sources = ((data["meta"].input_port, source) for source, _, data in graph.in_edges(node, data=True))
    return int(min(sources)[1])


def quantizer_places(storage: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Id of a hook -> the module that holds it and its name there."""
    return {id(child): (parent, name) for parent in storage.modules() for name, child in parent.named_children()}
