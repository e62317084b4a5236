"""Quantization-aware training: fine-tune the int8 student until it predicts as the float one does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eyas_host.compress.prune.magnitude import ZeroKeeper
from eyas_host.data.split import Split
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import all_gather
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.fold import DeployModel
from eyas_host.train.engine import Hooks, Plan, fit
from eyas_host.train.losses import SoftLoss, mean_divergence
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.student import DistillationTask
from eyas_host.train.together import logits_together
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache


def finetune_int8(context: RunContext, split: Split, model: nn.Module, deploy: DeployModel) -> list[Epoch]:
    """Fine-tune the QAT model in place towards the logits of the float student `deploy`.

    The float student is the teacher here: the distillation teacher and the labels would pull the predictions away from
    the network that int8 is to reproduce. The epoch with the lowest divergence on validation is kept; the start
    (calibration alone) is a candidate too. Zeros of magnitude pruning stay zero.
    """
    recipe, settings = context.recipe, context.recipe.quantize
    task = DistillationTask(recipe, split, ViewCache(context.folder("distill")))
    loss = SoftLoss(temperature=recipe.student.temperature)
    model, deploy = model.to(task.device), deploy.to(task.device).eval()
    reference = torch.from_numpy(logits_together(deploy, task.validation, task.device))

    def steps(epoch: int, first: int) -> Iterator[Tensor]:
        for number, pixels in enumerate(task.pixels(epoch, first), first):
            with torch.no_grad():
                float_logits = deploy(pixels.float())
            rows = plan.sizes(range(number, number + 1))
            yield loss(all_gather(model(pixels.float()), rows), all_gather(float_logits, rows))

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        logits = logits_together(candidate, task.validation, task.device)
        divergence = mean_divergence(torch.from_numpy(logits), reference)
        figures = validation_metrics(logits, task.validation_targets)
        return figures | {"divergence": divergence, "combined": -divergence}

    plan = Plan(
        title="int8 student",
        schedule=Schedule(
            epochs=settings.epochs,
            rate=settings.rate,
            weight_decay=0.0,
            patience=settings.patience,
            save_minutes=recipe.run.checkpoint_minutes,
            seed=recipe.run.seed,
        ),
        images=task.images,
        batch=recipe.student.batch,
        checkpoint=context.folder("qat") / "qat.ckpt",
        start=evaluate(model),
        curves=Curves(recipe, context.root),
    )
    history = fit(
        model,
        [{"params": [p for p in model.parameters() if p.requires_grad]}],
        plan,
        steps=steps,
        evaluate=evaluate,
        hooks=Hooks(after_step=ZeroKeeper(model) if recipe.prune.method == "nncf" else None),
    )
    if distributed.is_main():
        plan.checkpoint.unlink()
    return history
