"""The folded and the quantized student as finished stages left them."""

from __future__ import annotations

from torch import nn

from eyas_host.models.checkpoints import load_pruned
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.qat import load_qat


def load_deploy(context: RunContext, classes: int) -> DeployModel:
    """The pruned student, folded: what is quantized and compiled."""
    return fold_for_deployment(load_pruned(context, classes))


def load_quantized(context: RunContext, classes: int) -> nn.Module:
    """The folded student with its int8 grid, as `qat` left it."""
    return load_qat(load_deploy(context, classes), context.folder("qat"))
