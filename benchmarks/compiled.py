"""Compiled networks for timing: real graphs, made once for the code that makes them.

Weights are Eyas's own where it has some, otherwise random: an int8 graph's operators depend on ranges of activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from eyas_device.bundle import Precision, RuntimeName
from eyas_host.compress.prune.magnitude import prune_evenly
from eyas_host.export.artefacts import artefact_files
from eyas_host.export.build import compile_artefact
from eyas_host.models.factory import build
from eyas_host.models.pretrained import networks
from eyas_host.pipeline.code import dependencies
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from eyas_host.recipe.types import Weights


def network(
    name: str,
    precision: Precision,
    folder: Path,
    *,
    size: int = 224,
    runtime: RuntimeName = "litert",
    activation: Literal["default", "relu"] = "default",
    keep: float = 1.0,
) -> Path:
    """The artefact of timm's network `name` with two classes, below `folder`; made if it is not there.

    `keep` is the part of each layer's channels that stays. The ranges of an int8 network come from noise. What an
    earlier exporter made is not taken for today's: the folder's name has a hash of the code.
    """
    own = folder / f"{name}-{activation}-{keep:g}-{size}-{dependencies('eyas_host.export.build').code[:12]}"
    path = artefact_files(own, runtime, precision)[0]
    if path.exists():
        return path
    own.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights: Weights = "pretrained" if name in networks() and activation == "default" else "random"
    model = build(name, 2, weights, activation=activation)[0].eval()
    if keep < 1:
        model, _ = prune_evenly(model, keep=keep, size=size)
    deploy = fold_for_deployment(model)
    noise = [torch.randint(0, 256, (1, 3, size, size)).float() for _ in range(4)]
    made = deploy if precision == "fp32" else prepare_qat(deploy, noise, input_size=size)
    compile_artefact(runtime, precision, made, path, size)
    return path
