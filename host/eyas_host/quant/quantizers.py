"""The quantizers of a network: their placement, their ranges, and their parameters for int8 backends.

`nncf.quantize` leaves squeeze-and-excite blocks in float and places no quantizer between a convolution and a
hard-swish. An int8 LiteRT model quantizes there all the same, and every quantization that training never saw costs
agreement. This module therefore completes the placement to `graph.required_placement`.

Rounding and the gradients of learned ranges remain NNCF's; this module only adds and removes quantizers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.function_hook import get_hook_storage, register_post_function_hook, register_pre_function_hook
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from eyas_host.quant.graph import (
    Placement,
    layer_name,
    operations,
    quantized_source,
    required_placement,
    weighted_layers,
)
from eyas_host.support.errors import CompressError

HARD_ZERO = -3.0
"""Hard-swish is 0 at and below -3, so a range may be clipped there without loss (Howard et al., MobileNetV3)."""

_MAX_CHANGE = 0.125
"""Largest relative change of a hard-swish input's step that `fit_hard_swishes` makes."""

_MIN_RANGE, _MIN_WEIGHT_RANGE = 0.01, 8e-5
"""Floor of a channel's weight range: this fraction of the layer's largest, and an absolute value. The bias of a dead
channel is stored in steps of the weights' scale, which would be far too many (the floor is that of NNCF,
`fix_zero_filters_symmetric`)."""


@dataclass(frozen=True)
class Affine:
    """Parameters of a quantizer for an int8 backend: ``real = scale * (integer - zero_point)``.

    Attributes:
        scale: float64, one value, or one per output channel.
        zero_point: int64, same shape, within -128..127; 0 for weights.
        low: smallest integer: -128 for activations, `-high` for weights.
        high: largest integer: 127, or 63 for weights of 7 bits.
        per_channel: whether there is a scale for each index of axis 0.

    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    per_channel: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest real value of a per-tensor quantizer."""
        scale, zero = float(self.scale), int(self.zero_point)
        return scale * (self.low - zero), scale * (self.high - zero)

    def integers(self, values: Tensor) -> Tensor:
        """Round weights ``[channels, ...]`` to the grid and clamp them to its ends: int64, same shape."""
        steps = values.detach().double() / self.scale.reshape(-1, *(1 for _ in values.shape[1:]))
        return steps.round().clamp(self.low, self.high).long()


def present_placement(model: nn.Module) -> Placement:
    """Return the present placement of NNCF quantizers, in hook order."""
    points = [_point(name) for name, hook in get_hook_storage(model).named_hooks() if isinstance(hook, BaseQuantizer)]
    return Placement(
        activations=tuple(op for op, is_weight in points if not is_weight),
        weights=tuple(op for op, is_weight in points if is_weight),
    )


def complete_placement(model: nn.Module, example: Tensor, *, symmetric: bool = False) -> Placement:
    """Complete the placement to `required_placement`: add missing quantizers and remove surplus ones.

    Activation quantizers that are added have no range yet (`ranges.fit_ranges`).

    Args:
        model: network that `nncf.quantize` has returned; changed in place.
        example: float pixels ``[1, 3, H, W]``.
        symmetric: give every activation quantizer zero point 0. NNCF's symmetric quantizers are unsigned where a range
            has no negative values; signed ones use only half of their grid there, the price of zero point 0.

    Raises:
        CompressError: an operation has no rule.

    """
    required = required_placement(model, example)
    _drop_surplus(model, required)
    present = present_placement(model)
    if symmetric:
        for quantizer in activation_quantizers(model).values():
            quantizer.signed = True
    for name in [name for name in required.weights if name not in present.weights]:
        weight = weight_of(model, name)
        register_pre_function_hook(model, name, 1, _weight_quantizer(weight).to(weight.device))
    for name in [name for name in required.activations if name not in present.activations]:
        quantizer = _symmetric_quantizer() if symmetric else _asymmetric_quantizer()
        register_post_function_hook(model, name, 0, quantizer.to(example.device))
    return check_placement(model, example, before=present)


def float_layers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the names of a QAT model's layers in float, in order of execution."""
    quantized = weight_quantizers(model)
    return tuple(layer.name for layer in weighted_layers(model, example) if layer.operation not in quantized)


def leave_float(model: nn.Module, example: Tensor, names: Collection[str]) -> Placement:
    """Remove the quantizers of layers from a QAT model, in place.

    Activation quantizers that no integer operation needs any more are removed too. Layers already in float stay so.

    Args:
        model: QAT model.
        example: float pixels ``[1, 3, H, W]``.
        names: names of layers (see `graph.weighted_layers`).

    Raises:
        CompressError: a layer does not exist; the message lists similar names.

    """
    keep_float = {*float_layers(model, example), *names}
    _drop_surplus(model, required_placement(model, example, keep_float))
    return check_placement(model, example, keep_float=keep_float)


def check_placement(
    model: nn.Module, example: Tensor, *, keep_float: Collection[str] = (), before: Placement | None = None
) -> Placement:
    """Check that the placement is exactly the required one, and return it.

    Args:
        model: QAT model.
        example: float pixels ``[1, 3, H, W]``.
        keep_float: names of layers in float.
        before: NNCF's own placement, to count the quantizers that were added.

    Raises:
        CompressError: a quantizer is missing or surplus; the message names them.

    """
    required, present = required_placement(model, example, keep_float), present_placement(model)
    for what, wanted, have in (
        ("activation", required.activations, present.activations),
        ("weight", required.weights, present.weights),
    ):
        if sorted(wanted) != sorted(have):
            raise CompressError(
                f"{what} quantizers do not match the network: missing {sorted(set(wanted) - set(have))}, "
                f"unexpected {sorted(set(have) - set(wanted))}, {len(have)} of {len(wanted)}"
            )
    if before is None:
        return required
    return Placement(
        required.activations,
        required.weights,
        len(required.activations) - len(before.activations),
        len(required.weights) - len(before.weights),
    )


def activation_quantizers(model: nn.Module) -> dict[str, BaseQuantizer]:
    """Return the activation quantizers by the operation whose output they quantize."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if not is_weight and isinstance(hook, BaseQuantizer)}


def weight_quantizers(model: nn.Module) -> dict[str, SymmetricQuantizer]:
    """Return the weight quantizers by the operation whose weight they quantize."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if is_weight and isinstance(hook, SymmetricQuantizer)}


def input_quantizers(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Map each quantized layer's operation to the operation whose quantizer applies to its input."""
    found, placed = operations(model, example), set(activation_quantizers(model))
    return {name: quantized_source(found, found[name], placed) for name in weight_quantizers(model)}


def narrow_weight_grid(model: nn.Module) -> None:
    """Give every weight quantizer 7 bits: integers -63..63, in training and in every artefact.

    x86 int8 kernels without VNNI add two products of a byte and a weight in 16 bits and saturate (`vpmaddubsw`);
    2 x 255 x 63 still fits. The scales still span the largest weight and are trained like those of 8 bits; weights that
    grow beyond them are clamped.
    """
    for quantizer in weight_quantizers(model).values():
        quantizer.num_bits = 7


def weight_of(model: nn.Module, operation: str) -> Tensor:
    """Return the weight of a weighted operation."""
    weight = module_of(model, operation).weight
    assert isinstance(weight, Tensor)
    return weight


def module_of(model: nn.Module, operation: str) -> nn.Module:
    """Return the module that holds the weight of a weighted operation."""
    return model.get_submodule(layer_name(operation))


def set_range(quantizer: BaseQuantizer, low: float, high: float) -> None:
    """Set the range of an activation quantizer; a symmetric one gets the smallest range that contains both ends."""
    with torch.no_grad():
        if isinstance(quantizer, SymmetricQuantizer):
            quantizer.scale.fill_(max(high, -low * 127 / 128))
        else:
            quantizer.input_low.fill_(low)
            quantizer.input_range.fill_(high - low)


@torch.no_grad()
def affine(quantizer: nn.Module) -> Affine:
    """Return scale and zero point of an NNCF quantizer, with the adjustment it makes in each forward pass.

    Raises:
        CompressError: int8 backends cannot represent the quantizer.

    """
    if isinstance(quantizer, SymmetricQuantizer):
        low, high = int(quantizer.level_low), int(quantizer.level_high)
        scale = ((quantizer.scale.double().abs() + quantizer.eps) / high).flatten()
        if (low, high) == (-128, 127) and scale.numel() == 1:
            return Affine(scale.reshape(()), torch.zeros((), dtype=torch.int64), low, high, False)
        if low == -high and high in (63, 127):
            return Affine(scale, torch.zeros_like(scale, dtype=torch.int64), low, high, True)
    if isinstance(quantizer, AsymmetricQuantizer) and quantizer.levels == 256 and quantizer.input_low.numel() == 1:
        bottom, top = (end.double().reshape(()) for end in quantizer.get_input_low_input_high())
        scale = (top - bottom) / 255
        zero = torch.round(-bottom / scale).long() - 128
        return Affine(scale, zero, -128, 127, False)
    raise CompressError(f"int8 backends cannot represent this quantizer: {quantizer}")


@torch.no_grad()
def fit_hard_swishes(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Fit the grids of hard-swish inputs, so that -3, 0 and 3 are integers, and freeze them; returns those that fit.

    On such a grid hard-swish is a product of two integers, which takes less time than its float form. A grid whose step
    would change by more than an eighth (a sixth of a bit), because its range ends well above -3 or because it is
    coarse, stays as it is.

    Args:
        model: QAT model before its training; changed in place.
        example: float pixels ``[1, 3, H, W]``.

    """
    found = operations(model, example)
    fitted = []
    for name, quantizer in activation_quantizers(model).items():
        readers = found[name].readers
        swishes = [reader for reader in readers if reader in found and found[reader].kind == "hardswish"]
        if not isinstance(quantizer, AsymmetricQuantizer) or len(swishes) != len(readers):
            continue
        grid = affine(quantizer)
        low, high = grid.bounds
        steps = max(round(-HARD_ZERO * 255 / (high - min(low, HARD_ZERO))), 1)
        zero = max(int(grid.zero_point) + 128, steps)
        scale = -HARD_ZERO / steps
        if zero <= 255 and abs(scale / float(grid.scale) - 1) <= _MAX_CHANGE:
            set_range(quantizer, -zero * scale, (255 - zero) * scale)
            quantizer.disable_gradients()
            fitted.append(name)
    return tuple(fitted)


def _drop_surplus(model: nn.Module, required: Placement) -> None:
    """Remove the quantizers that the required placement does not have."""
    storage = get_hook_storage(model)
    owners = hook_owners(storage)
    for name, hook in list(storage.named_hooks()):
        operation, is_weight = _point(name)
        if isinstance(hook, BaseQuantizer) and operation not in (
            required.weights if is_weight else required.activations
        ):
            parent, attribute = owners[id(hook)]
            delattr(parent, attribute)


def _point(hook_name: str) -> tuple[str, bool]:
    """The operation a hook belongs to, and whether it quantizes the operation's weight.

    A quantizer at an argument of a single reader does not quantize an operation's output; it gets a distinct name.
    """
    kind, operation, port = decode_hook_name(hook_name)
    is_weight = kind == "pre_hooks" and port == 1
    return (operation if is_weight or kind == "post_hooks" else f"{operation} argument {port}"), is_weight


def _asymmetric_quantizer() -> AsymmetricQuantizer:
    return AsymmetricQuantizer(_spec(QuantizationScheme.ASYMMETRIC, (1,), narrow=False))


def _symmetric_quantizer() -> SymmetricQuantizer:
    return SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, (1,), narrow=False))


def _weight_quantizer(weight: Tensor) -> SymmetricQuantizer:
    shape = (weight.shape[0], *(1 for _ in weight.shape[1:]))
    quantizer = SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, shape, narrow=True))
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    floor = (_MIN_RANGE * largest.max()).clamp(min=_MIN_WEIGHT_RANGE)
    quantizer.scale.data.copy_(torch.maximum(largest, floor).reshape(shape))
    return quantizer


def _spec(mode: QuantizationScheme, shape: tuple[int, ...], *, narrow: bool) -> PTQuantizerSpec:
    """An 8-bit quantizer; symmetric ones are signed; `narrow` excludes -128, as for int8 weights."""
    return PTQuantizerSpec(
        num_bits=8,
        mode=mode,
        signedness_to_force=True if mode == QuantizationScheme.SYMMETRIC else None,
        narrow_range=narrow,
        half_range=False,
        scale_shape=shape,
        logarithm_scale=False,
    )


def hook_owners(storage: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Map the id of a hook to the module that holds it and its attribute name there."""
    return {id(child): (parent, name) for parent in storage.modules() for name, child in parent.named_children()}
