"""A short measurement of this machine: seconds that an image costs in each kind of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from torch import nn

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels
from eyas_host.data.image_bytes import read_pixels
from eyas_host.data.loader import worker_count
from eyas_host.data.transforms import Augmenter
from eyas_host.evaluation.inference import pick_device, torch_threads
from eyas_host.models.factory import build, move
from eyas_host.pipeline.distributed import training_threads
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import TeacherSection
from eyas_host.stages.estimate import Speed
from eyas_host.train.check import try_network
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze

_SECONDS = 0.7
"""Duration of a measurement."""
_MAX_STEPS = 50
_MAX_BATCH = 16
_IMAGES = 12
_COUNT_S = 0.027
"""Time of `_count` on the machine that the constants of `estimate` were measured on."""


def measure_speed(recipe: Recipe, images: Sequence[str]) -> Speed:
    """Time reading and augmenting some of `images`, and steps of both networks at random weights.

    Raises `RecipeError` for a network that timm does not know or that does not accept `[image] size`, and `TrainError`
    for `[run] device = "cuda"` without a GPU.
    """
    pixels = _read([*images[:: max(1, len(images) // _IMAGES)]][:_IMAGES])
    augmenter = Augmenter(recipe.augment, recipe.image.preprocessing())
    rng = np.random.default_rng(0)
    device = pick_device(recipe.run.device)
    with torch_threads(training_threads(recipe)):
        teacher = _network(recipe.teacher.model, recipe, recipe.teacher.batch, device, frozen=recipe.teacher)
        student = _network(recipe.student.model, recipe, recipe.student.batch, device)
        view = _seconds(lambda: [augmenter.view(image, rng) for image in pixels.images]) / len(pixels.images)
    return Speed(
        read=pixels.seconds,
        view=view / max(1, worker_count(recipe.run)),
        teacher=teacher[0],
        teacher_step=teacher[1],
        student=student[0],
        student_step=student[1],
        python=_seconds(_count) / _COUNT_S,
    )


class _Sample(msgspec.Struct):
    images: list[Pixels]
    seconds: float


def _read(paths: Sequence[str]) -> _Sample:
    """Decode some images; a grey one stands for those that cannot be read, which the split reports."""
    images, started = [], time.perf_counter()
    for path in paths:
        try:
            images.append(read_pixels(path))
        except ImageError:
            continue
    seconds = (time.perf_counter() - started) / max(1, len(images))
    return _Sample(images or [np.full((256, 256, 3), 128, np.uint8)], seconds)


def _network(
    name: str, recipe: Recipe, batch: int, device: torch.device, *, frozen: TeacherSection | None = None
) -> tuple[float, float]:
    """Seconds per image of a forward pass, and of a training step; `frozen` says which blocks the teacher trains."""
    network, size = build(name, 2, "random")[0], recipe.image.size
    try_network(network, name, size)
    model = move(network, device)
    prepare: Callable[[nn.Module], object] = nn.Module.train
    if frozen is not None:
        unfreeze(model, frozen)
        prepare = freeze_batch_norm
    batch = max(2, min(batch, _MAX_BATCH))
    pixels = torch.randint(0, 255, (batch, 3, size, size), device=device).float()
    pixels = pixels.to(memory_format=torch.channels_last)

    def step() -> None:
        prepare(model)
        model(pixels).square().mean().backward()

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(pixels)

    seconds = [_seconds(_synchronised(work, device)) / batch for work in (forward, step)]
    return seconds[0], seconds[1]


def _synchronised(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def wait() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def _count() -> None:
    total = 0
    for number in range(1_000_000):
        total += number


def _seconds(work: Callable[[], object]) -> float:
    """Mean duration after a first step, which prepares: a busy machine shows in some of many short steps."""
    work()
    started, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < _SECONDS and steps < _MAX_STEPS:
        work()
        steps += 1
    return elapsed / steps
