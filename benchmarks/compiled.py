"""Compiled networks for timing: real graphs with random weights, made once. Speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from eyas_host.compile.litert import compile_litert_fp32, compile_litert_int8
from eyas_host.compress.fold import fold_for_deployment
from eyas_host.compress.qat import prepare_qat
from eyas_host.train.models import build


def network(name: str, precision: str, folder: Path, *, size: int = 224) -> Path:
    """The `.tflite` of timm's network `name` with two classes, `fp32` or `int8`, below `folder`.

    The ranges of an int8 network come from noise.
    """
    path = folder / f"{name}-{size}-{precision}.tflite"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    deploy = fold_for_deployment(build(name, 2, "random")[0].eval())
    if precision == "fp32":
        compile_litert_fp32(deploy, path, input_size=size)
        return path
    noise = [torch.randint(0, 256, (1, 3, size, size)).float() for _ in range(4)]
    compile_litert_int8(prepare_qat(deploy, noise, input_size=size), path, input_size=size)
    return path
