"""The `qat` stage: the folded student in int8, by training with the grid in the graph or by calibration alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_host.compress.prune.magnitude import ZeroKeeper
from eyas_host.compress.quantize.calibration import covering_images, random_images, record
from eyas_host.compress.quantize.fallback import fallback_layers
from eyas_host.compress.quantize.mixed import drop_layers
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.split import Split
from eyas_host.data.transforms import Batch, prepared
from eyas_host.evaluate.inference import logits_of, pick_device, to_tensor
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.pipeline.distributed import training_threads
from eyas_host.pipeline.runner import RunContext, StageResult
from eyas_host.quant.checkpoints import load_deploy
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.qat import prepare_qat, save_qat
from eyas_host.support.errors import CompressError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say
from eyas_host.train.engine import fit, validation_figures
from eyas_host.train.losses import DistillationLoss, divergence_of
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.student import DistillationTask
from eyas_host.train.trackers import Curves
from eyas_host.train.view_cache import ViewCache

_COVERAGE = "as many of each class, far apart in the student's features"
_RANDOM = "drawn at random"
_BATCH = 64


def run(context: RunContext) -> StageResult:
    """Quantize what `prune` left, and write `qat/`: the model, where its quantizers sit, what calibrated it."""
    torch.set_num_threads(training_threads(context.recipe))
    recipe, settings, folder = context.recipe, context.recipe.quantize, context.folder("qat")
    split = Split.load(context.root, recipe.image.preprocessing())
    deploy = load_deploy(context, len(split.labels))
    rows, why = _calibration_rows(context, split)
    batches = calibration_batches(split.train, rows)
    model = prepare_qat(
        deploy,
        batches,
        input_size=recipe.image.size,
        preset=settings.preset,
        keep_float=settings.keep_float,
        weight_bits=settings.weight_bits,
    )
    history: list[Epoch] = []
    if settings.method == "qat":
        history = _train(context, split, model, deploy)
    model = model.cpu()
    validation = _prepared(split.validation, range(len(split.validation)))
    floats: tuple[str, ...] = ()
    if settings.fallback:
        floats = fallback_layers(model, deploy, validation, split.validation.targets, recipe).layers
        model = drop_layers(model, floats, input_size=recipe.image.size)
    save_qat(model, folder)
    calibration = msgspec.json.encode(record(split.train, rows, model, why))
    write_bytes(folder / "calibration.json", msgspec.json.format(calibration, indent=1))
    device = pick_device(recipe.run.device)
    figures = validation_figures(logits_of(model.to(device), validation, device), split.validation.targets)
    floats = (*settings.keep_float, *floats)
    how = "by calibration alone" if settings.method == "ptq" else f"after {settings.epochs} epochs"
    return StageResult(
        f"{how}{f', {len(floats)} layers float' if floats else ''}: balanced accuracy "
        f"{figures['balanced_accuracy']:.3f}, AUC {figures['auc']:.3f} on validation",
        {
            "method": settings.method,
            "preset": settings.preset,
            "float_layers": list(floats),
            "histories": {"qat": msgspec.to_builtins(history)},
        },
    )


def calibration_batches(part: ImageDataset, rows: Sequence[int]) -> list[Tensor]:
    """Images of a part as the device prepares them: float pixels [1, 3, size, size], 0..255, one a batch."""
    pixels = _prepared(part, rows)
    return [to_tensor(pixels[i : i + 1], torch.device("cpu")).float() for i in range(len(pixels))]


def _calibration_rows(context: RunContext, split: Split) -> tuple[list[int], str]:
    """Rows of the training part, and why those."""
    settings = context.recipe.quantize
    if settings.choose == "random":
        return random_images(len(split.train), settings.calibration, context.recipe.run.seed), _RANDOM
    student = checkpoints.load_pruned(context, len(split.labels))
    features = _features(student, split.train, pick_device(context.recipe.run.device))
    return covering_images(features, split.train.targets, settings.calibration), _COVERAGE


@torch.inference_mode()
def _features(model: PixelClassifier, part: ImageDataset, device: torch.device) -> npt.NDArray[np.float32]:
    """Pooled features float32 [images, channels], batch by batch: images are not held."""
    model = move(model, device)
    parts = []
    for start in range(0, len(part), _BATCH):
        pixels = _prepared(part, range(start, min(start + _BATCH, len(part))))
        parts.append(model.pooled(to_tensor(pixels, device)).float().cpu())
    return np.asarray(torch.cat(parts).numpy())


def _prepared(part: ImageDataset, rows: Iterable[int]) -> Batch:
    """Images of a part as the device prepares them."""
    if part.spec is None:
        raise CompressError("the split was opened without the model's preprocessing")
    return prepared((part.pixels[row] for row in rows), part.spec)


def _train(context: RunContext, split: Split, model: nn.Module, deploy: DeployModel) -> list[Epoch]:
    """Fine-tune `model` in place until it answers as the float student `deploy`; zeros of magnitude pruning stay.

    The float student is the teacher here: the distillation teacher and the labels would pull the answers away from
    the network whose answers int8 is to keep. The epoch whose answers diverge least on validation is kept, the start
    (calibration alone) among them.
    """
    settings = context.recipe.quantize
    lesson = DistillationTask(context.recipe, split, ViewCache(context.folder("distill")))
    follow = DistillationLoss(kd_ratio=1.0, temperature=context.recipe.student.temperature)
    checkpoint = context.folder("qat") / "qat.ckpt"
    model, deploy = model.to(lesson.device), deploy.to(lesson.device).eval()
    wanted = torch.from_numpy(logits_of(deploy, lesson.validation, lesson.device))

    def steps(epoch: int) -> Iterator[Tensor]:
        for pixels, _, _, labels in lesson.batches(epoch):
            with torch.no_grad():
                answers = deploy(pixels.float())
            yield follow(model(pixels.float()), answers, labels)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        logits = logits_of(candidate, lesson.validation, lesson.device)
        divergence = divergence_of(torch.from_numpy(logits), wanted)
        figures = validation_figures(logits, lesson.validation_targets)
        return figures | {"divergence": divergence, "combined": -divergence}

    start, at_start = evaluate(model), copy.deepcopy(model.state_dict())
    history = fit(
        model,
        [{"params": [p for p in model.parameters() if p.requires_grad]}],
        steps=steps,
        evaluate=evaluate,
        schedule=Schedule(epochs=settings.epochs, rate=settings.rate, weight_decay=0.0, seed=context.recipe.run.seed),
        steps_an_epoch=lesson.steps_an_epoch,
        checkpoint=checkpoint,
        title="int8 student",
        curves=Curves(context.recipe, context.root),
        after_step=ZeroKeeper(model) if context.recipe.prune.method == "nncf" else None,
    )
    if start["combined"] >= max(epoch.metrics["combined"] for epoch in history):
        say("  no epoch answers closer to the float student than calibration alone: that is kept")
        model.load_state_dict(at_start)
    checkpoint.unlink()
    return history
