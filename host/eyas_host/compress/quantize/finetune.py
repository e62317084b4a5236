"""Quantization-aware training: fine-tune the int8 student until it predicts as the float one does."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eyas_host.compress.prune.magnitude import ZeroKeeper
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.fold import DeployModel
from eyas_host.support.progress import say
from eyas_host.train.engine import fit
from eyas_host.train.losses import DistillationLoss, mean_divergence
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.student import DistillationTask
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache


def finetune_int8(context: RunContext, split: Split, model: nn.Module, deploy: DeployModel) -> list[Epoch]:
    """Fine-tune the QAT model in place towards the logits of the float student `deploy`.

    The float student is the teacher here: the distillation teacher and the labels would pull the predictions away from
    the network that int8 is to reproduce. The epoch with the lowest divergence on validation is kept; the start
    (calibration alone) is a candidate too. Zeros of magnitude pruning stay zero.
    """
    settings = context.recipe.quantize
    task = DistillationTask(context.recipe, split, ViewCache(context.folder("distill")))
    loss = DistillationLoss(kd_ratio=1.0, temperature=context.recipe.student.temperature)
    checkpoint = context.folder("qat") / "qat.ckpt"
    model, deploy = model.to(task.device), deploy.to(task.device).eval()
    reference = torch.from_numpy(logits_of(deploy, task.validation, task.device))

    def steps(epoch: int) -> Iterator[Tensor]:
        for pixels, _, _, labels in task.batches(epoch):
            with torch.no_grad():
                float_logits = deploy(pixels.float())
            yield loss(model(pixels.float()), float_logits, labels)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        logits = logits_of(candidate, task.validation, task.device)
        divergence = mean_divergence(torch.from_numpy(logits), reference)
        figures = validation_metrics(logits, task.validation_targets)
        return figures | {"divergence": divergence, "combined": -divergence}

    start, start_state = evaluate(model), copy.deepcopy(model.state_dict())
    history = fit(
        model,
        [{"params": [p for p in model.parameters() if p.requires_grad]}],
        steps=steps,
        evaluate=evaluate,
        schedule=Schedule(epochs=settings.epochs, rate=settings.rate, weight_decay=0.0, seed=context.recipe.run.seed),
        steps_per_epoch=task.steps_per_epoch,
        checkpoint=checkpoint,
        title="int8 student",
        curves=Curves(context.recipe, context.root),
        after_step=ZeroKeeper(model) if context.recipe.prune.method == "nncf" else None,
    )
    if start["combined"] >= max(epoch.metrics["combined"] for epoch in history):
        say("  no epoch comes closer to the float student than calibration alone, so that is kept")
        model.load_state_dict(start_state)
    checkpoint.unlink()
    return history
