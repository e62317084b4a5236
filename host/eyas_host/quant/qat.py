"""Models for quantization-aware training (QAT): insert quantizers into a folded network, save and load it.

The training itself is the ordinary loop; ranges and scales are parameters like any other.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import nncf
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.torch import get_config, load_from_config
from torch import Tensor, nn

from eyas_host.models.weights import UNREADABLE
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.graph import CLASSIFIER, required_placement
from eyas_host.quant.kernels import load_kernels
from eyas_host.quant.quantizers import (
    activation_quantizers,
    complete_placement,
    fit_hard_swishes,
    leave_float,
    narrow_weight_grid,
    set_range,
)
from eyas_host.quant.ranges import fit_ranges
from eyas_host.support.errors import CompressError
from eyas_host.support.files import write_bytes
from eyas_host.support.quiet import quiet_tools

_STATE, _CONFIG = "qat.pt", "qat.json"
MIN_IMAGES = 2
"""Fewest calibration images; a single one gives no usable range."""

_INPUT = "/sub/0"
"""The operation `pixels - mean`; the pixels themselves are integers and need no quantizer."""


def prepare_qat(
    deploy: DeployModel,
    calibration: Sequence[Tensor],
    *,
    input_size: int,
    preset: Literal["mixed", "symmetric"] = "mixed",
    keep_float: Collection[str] = (),
    weight_bits: Literal[7, 8] = 8,
) -> nn.Module:
    """A copy of `deploy` with a quantizer at every point where an int8 runtime quantizes.

    Args:
        deploy: folded network; it is not changed.
        calibration: float pixels [n, 3, input_size, input_size], 0..255, that set the initial ranges; the range of
            `pixels - mean` follows from the mean alone.
        input_size: side of the input, pixels.
        preset: with `symmetric` every zero point is 0, as TensorRT requires.
        keep_float: layers (see `graph.weighted_layers`) whose weight is not quantized.
        weight_bits: 7 keeps every weight within -63..63 (see `quantizers.narrow_weight_grid`).

    Raises:
        CompressError: the placement cannot be completed, a layer does not exist, or the images cannot set ranges.

    """
    _check_images(calibration, input_size)
    load_kernels()
    example = torch.zeros(1, 3, input_size, input_size)
    model = copy.deepcopy(deploy).cpu().eval()
    required_placement(model, example, keep_float)
    symmetric = preset == "symmetric"
    with quiet_tools():
        quantized: nn.Module = nncf.quantize(
            model,
            nncf.Dataset(list(calibration[:1])),
            preset=nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED,
            subset_size=1,
            ignored_scope=nncf.IgnoredScope(types=[CLASSIFIER], validate=False),
            advanced_parameters=AdvancedQuantizationParameters(
                # with 8 bits NNCF halves the grid of the first layer, where the largest sums occur
                overflow_fix=OverflowFix.DISABLE if weight_bits == 7 else OverflowFix.FIRST_LAYER,
                activations_quantization_params=QuantizationParameters(per_channel=False),
                disable_bias_correction=True,
            ),
        )
    complete_placement(quantized, example, symmetric=symmetric)
    fit_ranges(quantized, calibration, example)
    _fix_input_range(quantized, deploy)
    if weight_bits == 7:
        narrow_weight_grid(quantized)
    if keep_float:
        leave_float(quantized, example, keep_float)
    fit_hard_swishes(quantized, example)
    return quantized


def save_qat(model: nn.Module, directory: Path) -> None:
    """Write `qat.pt` (state) and `qat.json` (placement of the quantizers)."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_bytes(directory / _STATE, buffer.getvalue())
    write_bytes(directory / _CONFIG, json.dumps(get_config(model)).encode())


def load_qat(deploy: DeployModel, directory: Path) -> nn.Module:
    """Load a saved QAT model for a folded network of the same architecture.

    Raises `CompressError` if the files are missing, damaged or of another network.
    """
    load_kernels()
    try:
        config = json.loads((directory / _CONFIG).read_bytes())
        state = torch.load(directory / _STATE, map_location="cpu", weights_only=True)
        model: nn.Module = load_from_config(copy.deepcopy(deploy).cpu().eval(), config)
        model.load_state_dict(state)
    except UNREADABLE as error:
        raise CompressError(f"{directory}: no QAT model of this network ({error}); run with --from qat") from None
    return model.eval()


def _check_images(calibration: Sequence[Tensor], size: int) -> None:
    """Raise `CompressError` unless the images can set ranges."""
    allowed = f"float32 pixels [n, 3, {size}, {size}], 0..255, are needed"
    for index, batch in enumerate(calibration):
        if batch.ndim != 4 or batch.shape[1:] != (3, size, size) or batch.dtype != torch.float32:
            raise CompressError(f"calibration batch {index} is {batch.dtype} {list(batch.shape)}; {allowed}")
        if not (torch.isfinite(batch).all() and batch.min() >= 0 and batch.max() <= 255):
            raise CompressError(
                f"calibration batch {index} has values {float(batch.min()):g}..{float(batch.max()):g}; {allowed}"
            )
    count = sum(len(batch) for batch in calibration)
    if count < MIN_IMAGES:
        raise CompressError(f"{count} calibration images; at least {MIN_IMAGES} are needed, a few hundred are better")


def _fix_input_range(model: nn.Module, deploy: DeployModel) -> None:
    """Set the exact range of `pixels - mean` for pixels 0..255, and freeze it."""
    quantizer = activation_quantizers(model).get(_INPUT)
    if quantizer is None:
        raise CompressError(f"no quantizer after {_INPUT}: the network does not start with pixels - mean")
    set_range(quantizer, -float(deploy.mean.max()), 255 - float(deploy.mean.min()))
    quantizer.disable_gradients()
