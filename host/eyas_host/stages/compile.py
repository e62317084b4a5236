"""The `compile` stage: build the artefacts for each runtime."""

from __future__ import annotations

import msgspec
import torch

from eyas_device.board.limits import usable_cores
from eyas_host.export.build import build_artefacts
from eyas_host.pipeline.runner import RunContext, StageResult


def run(context: RunContext) -> StageResult:
    """Compile every precision for every runtime that the recipe names into `compile/`."""
    torch.set_num_threads(usable_cores())
    built = build_artefacts(context)
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in built.sizes.items())
    return StageResult(sizes, msgspec.to_builtins(built))
