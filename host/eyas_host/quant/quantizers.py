"""The quantizers of a network: where they sit, with which ranges, and what int8 backends need to know of them.

`nncf.quantize` leaves squeeze-and-excite blocks in float and puts nothing between a convolution and a hard-swish. An
int8 LiteRT model rounds there all the same, and every rounding that training never saw costs agreement. So the
placement is completed here to the one that `weighted_layers.required_placement` asks for.

NNCF's quantizers stay in charge of rounding and of the gradients of learned ranges; this module only adds points.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.function_hook import get_hook_storage, register_post_function_hook, register_pre_function_hook
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from eyas_host.quant.graph import Placement, layer_name, operations, required_placement, rounded_source, weighted_layers
from eyas_host.support.errors import CompressError

HARD_ZERO = -3.0
"""Hard-swish is zero at and below -3, so a range may be cut there without any loss (Howard et al., MobileNetV3)."""


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


def present_placement(model: nn.Module) -> Placement:
    """Return the points at which NNCF quantizers sit now (in hook order)."""
    points = [_point(name) for name, hook in get_hook_storage(model).named_hooks() if isinstance(hook, BaseQuantizer)]
    return Placement(
        activations=tuple(op for op, is_weight in points if not is_weight),
        weights=tuple(op for op, is_weight in points if is_weight),
    )


def complete_placement(
    model: nn.Module, calibration: Iterable[Tensor], example: Tensor, *, symmetric: bool = False
) -> Placement:
    """Make the placement the one that `required_placement` asks for: add what NNCF left out, drop what it has too much.

    Args:
        model: network that `nncf.quantize` has returned; changed in place.
        calibration: batches of float pixels ``[N, 3, H, W]``, for the ranges of added quantizers.
        example: float pixels ``[1, 3, H, W]``.
        symmetric: give every activation quantizer zero point 0. NNCF's are symmetric, but unsigned where a range has
            no negative part; signed ones use half of their grid there, which is the price of a zero point of 0.

    Raises:
        CompressError: an operation has no rule, or a range is not finite.

    """
    required = required_placement(model, example)
    _drop_surplus(model, required)
    present = present_placement(model)
    if symmetric:
        for quantizer in activation_quantizers(model).values():
            quantizer.signed = True
    found = operations(model, example)
    for name in [name for name in required.weights if name not in present.weights]:
        weight = weight_of(model, name)
        register_pre_function_hook(model, name, 1, _weight_quantizer(weight).to(weight.device))
    observers = {name: _Observer() for name in required.activations if name not in present.activations}
    handles = [register_post_function_hook(model, name, 0, observer) for name, observer in observers.items()]
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    for handle in handles:
        handle.remove()
    for name, observer in observers.items():
        low, high = observer.range()
        if not (low < float("inf") and high > low):
            raise CompressError(f"{name!r} has no usable range on the calibration images: {low}..{high}")
        if all(reader in found and found[reader].kind == "hardswish" for reader in found[name].readers):
            low = max(low, HARD_ZERO)
        quantizer = _symmetric_quantizer(low, high) if symmetric else _asymmetric_quantizer(low, high)
        register_post_function_hook(model, name, 0, quantizer.to(example.device))
    return check_placement(model, example, before=present)


def float_layers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the names of the layers of a QAT model whose weight is not quantized, in order of execution."""
    quantized = weight_quantizers(model)
    return tuple(layer.name for layer in weighted_layers(model, example) if layer.operation not in quantized)


def leave_float(model: nn.Module, example: Tensor, names: Collection[str]) -> Placement:
    """Take the quantizers of layers out of a QAT model, in place.

    With a layer's weight quantizer go the activation quantizers that round nothing for an integer operation any more.
    Layers that are float already stay so.

    Args:
        model: QAT model.
        example: float pixels ``[1, 3, H, W]``.
        names: names of layers, as `weighted_layers` lists them.

    Raises:
        CompressError: there is no layer of such a name; the message lists close ones.

    """
    keep_float = {*float_layers(model, example), *names}
    _drop_surplus(model, required_placement(model, example, keep_float))
    return check_placement(model, example, keep_float=keep_float)


def check_placement(
    model: nn.Module, example: Tensor, *, keep_float: Collection[str] = (), before: Placement | None = None
) -> Placement:
    """Return the placement, having checked that it is exactly the required one.

    Args:
        model: QAT model.
        example: float pixels ``[1, 3, H, W]``.
        keep_float: names of layers whose weight is not quantized.
        before: the points that NNCF had placed, to count those that were added.

    Raises:
        CompressError: a point is missing or there is one too many; the message names them.

    """
    required, present = required_placement(model, example, keep_float), present_placement(model)
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


def activation_quantizers(model: nn.Module) -> dict[str, BaseQuantizer]:
    """Return the activation quantizers by the name of the operation whose output they round."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if not is_weight and isinstance(hook, BaseQuantizer)}


def weight_quantizers(model: nn.Module) -> dict[str, SymmetricQuantizer]:
    """Return the weight quantizers by the name of the operation whose weight they round."""
    hooks = ((_point(name), hook) for name, hook in get_hook_storage(model).named_hooks())
    return {op: hook for (op, is_weight), hook in hooks if is_weight and isinstance(hook, SymmetricQuantizer)}


def feeding_quantizers(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Quantized weighted operation -> the operation whose quantizer rounds what it reads."""
    found, rounded = operations(model, example), set(activation_quantizers(model))
    return {name: rounded_source(found, found[name], rounded) for name in weight_quantizers(model)}


@torch.no_grad()
def halve_weight_grid(model: nn.Module) -> None:
    """Let every weight use -63..63 of its grid, with scales that training leaves alone.

    x86 int8 kernels without VNNI add two products of a byte and a weight in 16 bits and saturate (`vpmaddubsw`);
    2 x 255 x 63 still fits.
    """
    for operation, quantizer in weight_quantizers(model).items():
        largest = weight_of(model, operation).detach().abs().flatten(1).amax(dim=1)
        needed = largest.reshape(quantizer.scale.shape) * 127 / 63
        quantizer.scale.copy_(torch.maximum(quantizer.scale, needed))
        quantizer.scale.requires_grad_(False)


def weight_of(model: nn.Module, operation: str) -> Tensor:
    """Return the weight of a weighted operation."""
    weight = module_of(model, operation).weight
    assert isinstance(weight, Tensor)
    return weight


def module_of(model: nn.Module, operation: str) -> nn.Module:
    """Return the module that holds the weight of a weighted operation."""
    return model.get_submodule(layer_name(operation))


def set_range(quantizer: BaseQuantizer, low: float, high: float) -> None:
    """Set the range of an activation quantizer; a symmetric one takes the smallest that holds both ends."""
    with torch.no_grad():
        if isinstance(quantizer, SymmetricQuantizer):
            quantizer.scale.fill_(max(high, -low * 127 / 128))
        else:
            quantizer.input_low.fill_(low)
            quantizer.input_range.fill_(high - low)


@torch.no_grad()
def affine(quantizer: nn.Module) -> Affine:
    """Return scale and zero point of an NNCF quantizer, after the tuning it applies in each forward pass.

    Raises:
        CompressError: the quantizer is not one that int8 backends can follow.

    """
    if isinstance(quantizer, SymmetricQuantizer) and quantizer.level_high == 127:
        low = int(quantizer.level_low)
        scale = ((quantizer.scale.double().abs() + quantizer.eps) / 127).flatten()
        if low == -128 and scale.numel() == 1:
            return Affine(scale.reshape(()), torch.zeros((), dtype=torch.int64), low, False)
        if low == -127:
            return Affine(scale, torch.zeros_like(scale, dtype=torch.int64), low, True)
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


def _drop_surplus(model: nn.Module, required: Placement) -> None:
    """Remove the quantizers that are at no required point."""
    storage = get_hook_storage(model)
    places = quantizer_places(storage)
    for name, hook in list(storage.named_hooks()):
        operation, is_weight = _point(name)
        if isinstance(hook, BaseQuantizer) and operation not in (
            required.weights if is_weight else required.activations
        ):
            parent, attribute = places[id(hook)]
            delattr(parent, attribute)


def _point(hook_name: str) -> tuple[str, bool]:
    """The operation a hook sits at, and whether it rounds the operation's weight.

    A quantizer of one reader alone, at an argument of it, rounds no operation's output: it gets a name of its own.
    """
    kind, operation, port = decode_hook_name(hook_name)
    is_weight = kind == "pre_hooks" and port == 1
    return (operation if is_weight or kind == "post_hooks" else f"{operation} argument {port}"), is_weight


def _asymmetric_quantizer(low: float, high: float) -> AsymmetricQuantizer:
    quantizer = AsymmetricQuantizer(_spec(QuantizationScheme.ASYMMETRIC, (1,), narrow=False))
    set_range(quantizer, low, high)
    return quantizer


def _symmetric_quantizer(low: float, high: float) -> SymmetricQuantizer:
    quantizer = SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, (1,), narrow=False))
    set_range(quantizer, low, high)
    return quantizer


def _weight_quantizer(weight: Tensor) -> SymmetricQuantizer:
    shape = (weight.shape[0], *(1 for _ in weight.shape[1:]))
    quantizer = SymmetricQuantizer(_spec(QuantizationScheme.SYMMETRIC, shape, narrow=True))
    largest = weight.detach().abs().flatten(1).amax(dim=1).clamp(min=1e-8)
    quantizer.scale.data.copy_(largest.reshape(shape))
    return quantizer


def _spec(mode: QuantizationScheme, shape: tuple[int, ...], *, narrow: bool) -> PTQuantizerSpec:
    """Eight bits; symmetric ones are signed; `narrow` leaves out -128, as int8 weights do."""
    return PTQuantizerSpec(
        num_bits=8,
        mode=mode,
        signedness_to_force=True if mode == QuantizationScheme.SYMMETRIC else None,
        narrow_range=narrow,
        half_range=False,
        scale_shape=shape,
        logarithm_scale=False,
    )


def quantizer_places(storage: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Id of a hook -> the module that holds it and its name there."""
    return {id(child): (parent, name) for parent in storage.modules() for name, child in parent.named_children()}
