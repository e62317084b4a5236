"""Initial ranges of activation quantizers: grids that round the calibration images best, or reach to mean extremes.

Training hardly moves a range: a step of AdamW is the learning rate, whatever the range's size. What a range clips, the
weights have to make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from eyas_host.quant.graph import operations
from eyas_host.quant.quantizers import HARD_ZERO, activation_quantizers, set_range, weight_quantizers
from eyas_host.support.errors import CompressError

Values = npt.NDArray[np.float32]

_VALUES = 2048
"""Values of an image that are looked at in each tensor, besides its smallest and largest."""
_BINS = 4096
_FRACTIONS = 0.9 ** np.arange(16)
"""Fractions of the smallest and the largest value that are tried as ends of the grid: 1 to 0.21."""
_POWER = 1.2
"""Of an error. With squares a few large values decide, the steps become wider, and so does what two correct
implementations of the network differ by; with 1 so many values are clipped that training does not make up for it."""
_LEVELS = 256
"""Steps of a grid, of which one is 0."""
_MIN_RANGE = 8e-4
"""A narrower range is widened by this on both sides, as NNCF's `fix_zero_filters_asymmetric` does: the output of a dead
layer is 0 on every image."""


class _Ends(NamedTuple):
    """Two ranges of a quantizer."""

    rounding: tuple[float, float]
    """That rounds best."""
    extremes: tuple[float, float]
    """The mean over the images of their smallest and largest value."""


@torch.no_grad()
def fit_ranges(model: nn.Module, calibration: Iterable[Tensor], example: Tensor) -> None:
    """Set the range of every activation quantizer of a network, from its values without any quantization.

    Two sets of ranges are tried: those that round best, and the mean extremes of the images, NNCF's estimate; the one
    whose logits are nearer to the float network's on the calibration images stays.

    Args:
        model: network with quantizers; changed in place, all ranges may be trained afterwards.
        calibration: batches of float pixels [n, 3, h, w].
        example: float pixels [1, 3, h, w].

    Raises:
        CompressError: a value is not finite.

    """
    found = operations(model, example)
    quantizers = activation_quantizers(model)
    images = list(calibration)
    with _without_quantization(model):
        expected = [model(batch) for batch in images]
        seen = _observe(model, quantizers, images)
    ranges: dict[str, _Ends] = {}
    for name, (values, weights, extremes) in seen.items():
        if not np.isfinite(values).all():
            raise CompressError(f"{name!r} has values that are not finite on the calibration images")
        readers = found[name].readers
        floor = HARD_ZERO if all(one in found and found[one].kind == "hardswish" for one in readers) else -np.inf
        symmetric = isinstance(quantizers[name], SymmetricQuantizer)
        ranges[name] = _Ends(best_range(values.clip(min=floor), weights, symmetric=symmetric), _usable(extremes, floor))
    errors = []
    for way in range(2):
        for name, quantizer in quantizers.items():
            set_range(quantizer, *ranges[name][way])
        got = [model(batch) for batch in images]
        errors.append(sum(float(((own - his) ** 2).sum()) for own, his in zip(got, expected, strict=True)))
    if errors[0] <= errors[1]:
        for name, quantizer in quantizers.items():
            set_range(quantizer, *ranges[name].rounding)


def _usable(extremes: tuple[float, float], floor: float) -> tuple[float, float]:
    """Mean extremes with 0 between them, and not too near to each other."""
    low, high = max(min(extremes[0], 0.0), floor), max(extremes[1], 0.0)
    return (low - _MIN_RANGE, high + _MIN_RANGE) if high - low < _MIN_RANGE else (low, high)


def best_range(values: Values, weights: Values | None = None, *, symmetric: bool = False) -> tuple[float, float]:
    """The range, 0 included, whose 256 steps round `values` [n] with the smallest mean error (to the power of 1.2).

    Values beyond its ends are clipped, which pays where few are large. `weights` [n]: how many each value stands for.
    With `symmetric` the grid reaches equally far on both sides of 0.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low < _MIN_RANGE:
        return low - _MIN_RANGE, high + _MIN_RANGE
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high), weights=weights)
    centres = ((edges[:-1] + edges[1:]) / 2)[counts > 0]
    if symmetric:
        largest = max(-low, high)
        ends = [(-largest * fraction * 128 / 127, largest * fraction) for fraction in _FRACTIONS]
    else:
        lows = low * _FRACTIONS if low < 0 else np.zeros(1)
        highs = high * _FRACTIONS if high > 0 else np.zeros(1)
        ends = [(bottom, top) for bottom in lows for top in highs]
    bottoms, tops = np.array(ends).T[:, :, None]
    steps = (tops - bottoms) / (_LEVELS - 1)
    zeros = np.round(-bottoms / steps)
    rounded = (np.round(centres / steps).clip(-zeros, _LEVELS - 1 - zeros)) * steps
    errors = (np.abs(rounded - centres) ** _POWER) @ counts[counts > 0]
    bottom, top = ends[int(errors.argmin())]
    return float(bottom), float(top)


def _observe(
    model: nn.Module, quantizers: dict[str, BaseQuantizer], calibration: Iterable[Tensor]
) -> dict[str, tuple[Values, Values, tuple[float, float]]]:
    """Operation -> a sample of the values that reach its quantizer, how many each stands for, and mean extremes.

    The extremes of each image are among them.
    """
    seen: dict[str, list[tuple[Values, Values]]] = {name: [] for name in quantizers}
    chosen: dict[int, Tensor] = {}
    extremes: dict[str, list[Tensor]] = {name: [] for name in quantizers}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].flatten(1)
            size = values.shape[1]
            if size not in chosen:
                chosen[size] = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:_VALUES]
            ends = torch.stack(values.aminmax(dim=1), dim=1)
            extremes[name].append(ends)
            sample = torch.cat([values[:, chosen[size].to(values.device)], ends], dim=1)
            weights = torch.tensor([max(size / _VALUES, 1.0)] * (sample.shape[1] - 2) + [1.0, 1.0])
            seen[name].append((sample.flatten().cpu().numpy(), weights.repeat(len(sample)).numpy()))

        return observe

    handles = [quantizer.register_forward_pre_hook(observer(name)) for name, quantizer in quantizers.items()]
    for batch in calibration:
        model(batch)
    for handle in handles:
        handle.remove()
    return {
        name: (
            np.concatenate([values for values, _ in batches]),
            np.concatenate([weights for _, weights in batches]),
            tuple(torch.cat(extremes[name]).mean(0).tolist()),
        )
        for name, batches in seen.items()
    }


@contextmanager
def _without_quantization(model: nn.Module) -> Iterator[None]:
    """The network in float."""
    quantizers = [*activation_quantizers(model).values(), *weight_quantizers(model).values()]
    for quantizer in quantizers:
        quantizer.disable_quantization()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable_quantization()
