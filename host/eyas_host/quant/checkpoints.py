"""Load the folded and the quantized student of a run."""

from __future__ import annotations

from torch import nn

from eyas_host.models.checkpoints import load_pruned
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.qat import load_qat


def load_deploy(context: RunContext, classes: int) -> DeployModel:
    """Load the pruned student and fold it for quantization and compilation."""
    return fold_for_deployment(load_pruned(context, classes))


def load_quantized(context: RunContext, classes: int) -> nn.Module:
    """Load the QAT model that the stage `qat` saved."""
    return load_qat(load_deploy(context, classes), context.folder("qat"))
