"""Load every variant of a run, and measure their logits and latency on the same images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from eyas_device.bundle import Bundle
from eyas_device.preprocess import prepare
from eyas_device.runtimes import open_runtime
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.transforms import Batch, prepared
from eyas_host.evaluate.inference import logits_of
from eyas_host.evaluate.parity import reference_of
from eyas_host.evaluate.verdict import Latency, Logits
from eyas_host.models import checkpoints
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.quant.qdq import exact_int8
from eyas_host.support.progress import meter

NETWORKS = ("teacher", "student-labels-only", "student", "pruned", "qat", "exact-int8")
"""Variants that are torch networks, in the order of the comparison."""
_ROUNDS = 30
_FRAMES_A_ROUND = 5


def load_networks(context: RunContext, classes: int) -> dict[str, torch.nn.Module]:
    """The torch variants of the comparison, by name, those that exist."""
    networks: dict[str, torch.nn.Module] = {}
    if (context.root / checkpoints.TEACHER).exists():
        networks["teacher"] = checkpoints.load_teacher(context, classes)
    if (context.root / checkpoints.LABELS_ONLY).exists():
        networks["student-labels-only"] = checkpoints.load_student(context, classes, checkpoints.LABELS_ONLY)
    networks["student"] = checkpoints.load_student(context, classes)
    networks["pruned"] = checkpoints.load_pruned(context, classes)
    networks["qat"] = load_quantized(context, classes)
    networks["exact-int8"] = exact_int8(networks["qat"], input_size=context.recipe.image.size)
    return {name: net.eval() for name, net in networks.items()}


def shipped_network(context: RunContext, classes: int, artefact: str) -> torch.nn.Module:
    """The torch network that an artefact was made from."""
    if reference_of(artefact) == "pruned":
        return checkpoints.load_pruned(context, classes)
    return load_quantized(context, classes)


def all_logits(networks: Mapping[str, torch.nn.Module], bundle: Bundle, part: ImageDataset) -> dict[str, Logits]:
    """Logits of every variant for the images of a part, prepared as the device prepares them."""
    spec = bundle.manifest.preprocessing
    pixels = prepared(part.pixels, spec)
    logits: dict[str, Logits] = {}
    with meter("answers of every variant", len(networks) + len(bundle.manifest.artefacts)) as bar:
        for name, network in networks.items():
            logits[name] = logits_of(network, pixels, torch.device("cpu"), batch=1 if name == "exact-int8" else 32)
            bar.advance(name)
        for artefact in bundle.manifest.artefacts:
            with open_runtime(bundle, artefact.runtime, artefact.name, threads=1) as runtime:
                answers = [runtime.infer(prepare(frame, spec)).copy() for frame in part.pixels]
            logits[artefact.name] = np.stack(answers)
            bar.advance(artefact.name)
    return logits


def measure_latency(networks: Mapping[str, torch.nn.Module], bundle: Bundle, part: ImageDataset) -> dict[str, Latency]:
    """One image at a time at one thread; all variants take turns, so that a busy machine hits all alike."""
    spec = bundle.manifest.preprocessing
    pixels = prepared(part.pixels[:_FRAMES_A_ROUND], spec)
    calls: dict[str, Callable[[int], object]] = {}
    for name in ("teacher", "student", "pruned"):
        if name in networks:
            calls[name] = _torch_call(networks[name], pixels)
    runtimes = [open_runtime(bundle, a.runtime, a.name, threads=1) for a in bundle.manifest.artefacts]
    for artefact, runtime in zip(bundle.manifest.artefacts, runtimes, strict=True):
        calls[artefact.name] = lambda row, runtime=runtime: runtime.infer(pixels[row])  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    with meter("latency", _ROUNDS) as bar:
        for number in range(_ROUNDS + 1):
            for name, call in calls.items():
                for row in range(len(pixels)):
                    started = time.perf_counter()
                    call(row)
                    if number:  # the first round warms up
                        times[name].append(1000 * (time.perf_counter() - started))
            if number:
                bar.advance()
    for runtime in runtimes:
        runtime.close()
    return {name: Latency(*(float(q) for q in np.quantile(values, (0.5, 0.9)))) for name, values in times.items()}


def _torch_call(network: torch.nn.Module, pixels: Batch) -> Callable[[int], Any]:
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()

    def call(row: int) -> torch.Tensor:
        with torch.inference_mode():
            answer: torch.Tensor = network(tensors[row : row + 1])
        return answer

    return call
