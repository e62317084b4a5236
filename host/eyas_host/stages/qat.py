"""The `qat` stage: quantize the folded student to int8, by quantization-aware training or calibration alone."""

from __future__ import annotations

import msgspec
import torch

from eyas_host.compress.quantize.calibration import (
    calibration_batches,
    calibration_record,
    choose_images,
    prepare_rows,
)
from eyas_host.compress.quantize.fallback import fallback_layers
from eyas_host.compress.quantize.finetune import finetune_int8
from eyas_host.compress.quantize.mixed import drop_layers
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.pipeline import distributed
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.quant.checkpoints import load_deploy
from eyas_host.quant.qat import prepare_qat, save_qat
from eyas_host.stages.summary import format_metrics
from eyas_host.support.files import write_bytes
from eyas_host.train.schedule import Epoch


def run(context: RunContext) -> StageResult:
    """Quantize the pruned student, and write the model, its quantizer placement and its calibration to `qat/`."""
    if context.recipe.quantize.method != "qat" and not distributed.is_main():
        return StageResult("")
    torch.set_num_threads(training_threads(context.recipe))
    recipe, settings, folder = context.recipe, context.recipe.quantize, context.folder("qat")
    split = Split.load(context.root, recipe.image.preprocessing())
    deploy = load_deploy(context, len(split.labels))
    rows, why = choose_images(context, split)
    model = prepare_qat(
        deploy,
        calibration_batches(split.train, rows),
        input_size=recipe.image.size,
        preset=settings.preset,
        keep_float=settings.keep_float,
        weight_bits=settings.weight_bits,
    )
    history: list[Epoch] = finetune_int8(context, split, model, deploy) if settings.method == "qat" else []
    if not distributed.is_main():
        return StageResult("")
    model = model.cpu()
    validation = prepare_rows(split.validation, range(len(split.validation)))
    fallback: tuple[str, ...] = ()
    if settings.fallback:
        fallback = fallback_layers(model, deploy, validation, split.validation.targets, recipe).layers
        model = drop_layers(model, fallback, input_size=recipe.image.size)
    save_qat(model, folder)
    calibration = msgspec.json.encode(calibration_record(split.train, rows, model, why))
    write_bytes(folder / "calibration.json", msgspec.json.format(calibration, indent=1))
    device = pick_device(recipe.run.device)
    figures = validation_metrics(logits_of(model.to(device), validation, device), split.validation.targets)
    float_layers = (*settings.keep_float, *fallback)
    how = "by calibration alone" if settings.method == "ptq" else f"after {settings.epochs} epochs"
    kept = f", {len(float_layers)} layers in float" if float_layers else ""
    return StageResult(
        f"{how}{kept}: {format_metrics(figures)} on validation",
        {
            "method": settings.method,
            "preset": settings.preset,
            "float_layers": list(float_layers),
            "histories": {"qat": msgspec.to_builtins(history)},
        },
    )
