"""Prepare, save and load a network for quantization-aware training. The training loop itself is an ordinary one.

While it trains, the network computes in float, with every weight and activation rounded to 256 levels on the way
(the ranges are parameters and learn with the weights). After it, `eyas_host.compile` carries ranges and weights to
each backend, so that all of them round where training did.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import nncf
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from torch import Tensor, nn

from eyas_host.compress.fold import DeployModel
from eyas_host.compress.quantizers import Placement, check_placement, complete_placement, required_placement
from eyas_host.errors import CompressError

WEIGHTS_FILE = "qat.pt"
CONFIG_FILE = "qat.json"
_SCHEMA = 1


def prepare_qat(deploy: DeployModel, calibration: Iterable[Tensor], *, input_size: int) -> tuple[nn.Module, Placement]:
    """Return a quantized copy of ``deploy``, calibrated and ready to be trained, and where its quantizers are.

    Weights are symmetric per output channel, activations asymmetric per tensor: the only combination that LiteRT,
    OpenVINO and ONNX Runtime all execute.

    Args:
        deploy: what `fold_for_deployment` returned; not changed.
        calibration: batches of float pixels ``[N, 3, input_size, input_size]``, values 0..255, BGR.
        input_size: height and width of a picture in pixels.

    Raises:
        CompressError: no calibration pictures, or the network cannot be quantized completely.
    """
    batches = list(calibration)
    if not batches:
        raise CompressError("no calibration pictures: quantization ranges come from them")
    example = _example(deploy, input_size)
    required = required_placement(deploy, example)
    _quiet_nncf()
    model = nncf.quantize(
        copy.deepcopy(deploy).eval(),
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
        advanced_parameters=AdvancedQuantizationParameters(
            # the 7-bit weights of the default would cost accuracy on every CPU to spare the oldest ones
            overflow_fix=OverflowFix.DISABLE,
            # NNCF's default for depthwise inputs is one range per channel, which no int8 runtime has
            activations_quantization_params=QuantizationParameters(per_channel=False),
        ),
    )
    placement = complete_placement(model, required, batches)
    return cast(nn.Module, model), placement


def save_qat(model: nn.Module, directory: Path) -> None:
    """Write ``qat.pt`` (tensors only) and ``qat.json`` (where the quantizers are) into ``directory``.

    Args:
        model: what `prepare_qat` returned, trained or not.
        directory: is created if need be; files of an earlier model in it are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {"schema": _SCHEMA, "nncf": nncf.__version__, "config": nncf.torch.get_config(model)}
    for name, write in (
        (WEIGHTS_FILE, lambda path: torch.save(model.state_dict(), path)),
        (CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=1), encoding="utf-8")),
    ):
        temporary = directory / f".{name}.part"
        write(temporary)
        temporary.replace(directory / name)


def load_qat(deploy: DeployModel, directory: Path, *, input_size: int) -> nn.Module:
    """Return the model that `save_qat` wrote, in evaluation mode; its outputs are bit for bit those of the saved one.

    Args:
        deploy: a fold of the same architecture, whatever its weights; not changed.
        directory: where the model was saved.
        input_size: height and width of a picture in pixels.

    Raises:
        CompressError: the files are missing or damaged, or belong to another architecture or NNCF version.
    """
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        state = torch.load(directory / WEIGHTS_FILE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CompressError(f"cannot read a quantized model from {directory}: {error}") from error
    if config.get("schema") != _SCHEMA:
        raise CompressError(f"{directory / CONFIG_FILE} has schema {config.get('schema')}, expected {_SCHEMA}")
    required = required_placement(deploy, _example(deploy, input_size))
    _quiet_nncf()
    model = nncf.torch.load_from_config(copy.deepcopy(deploy), config["config"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CompressError(
            f"the quantized model in {directory} (NNCF {config.get('nncf')}, here {nncf.__version__}) "
            f"does not fit this network: {error}"
        ) from error
    check_placement(model, required)
    return cast(nn.Module, model.eval())


def _example(deploy: nn.Module, input_size: int) -> Tensor:
    return torch.zeros(1, 3, input_size, input_size, device=next(deploy.parameters()).device)


def _quiet_nncf() -> None:
    """Keep NNCF's progress notes out of the user's terminal; its warnings and errors stay."""
    logging.getLogger("nncf").setLevel(logging.WARNING)
