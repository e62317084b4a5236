"""Quantization-aware training: put the int8 grid into a folded network, save it, load it again.

The training itself is the ordinary loop; ranges and scales are parameters like any other.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from nncf.torch import get_config, load_from_config
from torch import Tensor, nn

from eyas_host.compress.fold import DeployModel
from eyas_host.compress.quantizers import CLASSIFIER, activation_quantizers, complete_placement
from eyas_host.errors import CompressError
from eyas_host.files import write_bytes
from eyas_host.quiet import quiet_tools

_STATE, _CONFIG = "qat.pt", "qat.json"
_INPUT = "/sub/0"
"""The operation `pixels - mean`; the pixels themselves are whole numbers and need no rounding."""


def prepare_qat(deploy: DeployModel, calibration: Sequence[Tensor], *, input_size: int) -> nn.Module:
    """A copy of `deploy` with a quantizer at every point where an int8 runtime rounds.

    `calibration` are float pixels [1, 3, input_size, input_size], 0..255, that set the first ranges; the range behind
    `pixels - mean` follows from the mean alone. Raises `CompressError` where a network cannot be placed completely.
    """
    example = torch.zeros(1, 3, input_size, input_size)
    with quiet_tools():
        quantized: nn.Module = nncf.quantize(
            copy.deepcopy(deploy).cpu().eval(),
            nncf.Dataset(list(calibration)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(types=[CLASSIFIER], validate=False),
            advanced_parameters=AdvancedQuantizationParameters(
                activations_quantization_params=QuantizationParameters(per_channel=False)
            ),
        )
    complete_placement(quantized, calibration, example)
    _fix_input_range(quantized, deploy)
    return quantized


def save_qat(model: nn.Module, directory: Path) -> None:
    """Write `qat.pt` (state) and `qat.json` (where the quantizers sit)."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_bytes(directory / _STATE, buffer.getvalue())
    write_bytes(directory / _CONFIG, json.dumps(get_config(model)).encode())


def load_qat(deploy: DeployModel, directory: Path) -> nn.Module:
    """Rebuild a saved QAT model around a folded network of the same shape.

    Raises `CompressError` if the files are missing, damaged or of another network.
    """
    try:
        config = json.loads((directory / _CONFIG).read_bytes())
        state = torch.load(directory / _STATE, map_location="cpu", weights_only=True)
        model: nn.Module = load_from_config(copy.deepcopy(deploy).cpu().eval(), config)
        model.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, LookupError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise CompressError(f"{directory}: no QAT model of this network ({error}); run with --from qat") from None
    return model.eval()


def _fix_input_range(model: nn.Module, deploy: DeployModel) -> None:
    """The exact range of `pixels - mean` for pixels 0..255, and no training of it."""
    quantizer: Any = activation_quantizers(model).get(_INPUT)
    if quantizer is None:
        raise CompressError(f"no quantizer behind {_INPUT}: the network does not begin with pixels - mean")
    low, high = -float(deploy.mean.max()), 255 - float(deploy.mean.min())
    quantizer.input_low.data.fill_(low)
    quantizer.input_range.data.fill_(high - low)
    quantizer.disable_gradients()
