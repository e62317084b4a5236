"""Load all variants of a run, and measure their logits and latency on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from eyas_device.bundle import Bundle
from eyas_device.preprocess import prepare
from eyas_device.runtimes import open_runtime
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.latency import take_turns
from eyas_host.evaluation.parity import reference_of
from eyas_host.evaluation.verdict import Latency, Logits
from eyas_host.models import checkpoints
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.quant.qdq import exact_int8
from eyas_host.support.progress import meter

NETWORKS = ("teacher", "student-labels-only", "student", "pruned", "qat", "exact-int8")
"""Variants that are torch networks, in the order of the comparison."""
_ROUNDS = 30
_CALLS_PER_TURN = 5


def load_networks(context: RunContext, classes: int) -> dict[str, torch.nn.Module]:
    """Name -> network of those torch variants that the run has."""
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


def reference_network(context: RunContext, classes: int, artefact: str) -> torch.nn.Module:
    """The torch network that an artefact was made from."""
    if reference_of(artefact) == "pruned":
        return checkpoints.load_pruned(context, classes)
    return load_quantized(context, classes)


def all_logits(networks: Mapping[str, torch.nn.Module], bundle: Bundle, images: ImageDataset) -> dict[str, Logits]:
    """Variant -> logits float32 [n, classes] of the images, prepared as on the device."""
    spec = bundle.manifest.preprocessing
    pixels = prepared(images.pixels, spec)
    logits: dict[str, Logits] = {}
    with meter("predictions of every variant", len(networks) + len(bundle.manifest.artefacts)) as bar:
        for name, network in networks.items():
            logits[name] = logits_of(network, pixels, torch.device("cpu"), batch=1 if name == "exact-int8" else 32)
            bar.advance(name)
        for artefact in bundle.manifest.artefacts:
            with open_runtime(bundle, artefact.runtime, artefact.name, threads=1) as runtime:
                rows = [runtime.infer(prepare(frame, spec)).copy() for frame in images.pixels]
            logits[artefact.name] = np.stack(rows)
            bar.advance(artefact.name)
    return logits


def measure_latency(
    networks: Mapping[str, torch.nn.Module], bundle: Bundle, images: ImageDataset
) -> dict[str, Latency]:
    """Variant -> latency of one image at one thread, all variants measured in turns."""
    pixels = prepared(images.pixels[:_CALLS_PER_TURN], bundle.manifest.preprocessing)
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    calls: dict[str, Callable[[], object]] = {}
    for name in ("teacher", "student", "pruned"):
        if name in networks:
            calls[name] = partial(_infer_next, networks[name], cycle([tensor[None] for tensor in tensors]))
    with ExitStack() as stack, meter("latency", _ROUNDS) as bar:
        for artefact in bundle.manifest.artefacts:
            runtime = stack.enter_context(open_runtime(bundle, artefact.runtime, artefact.name, threads=1))
            calls[artefact.name] = partial(_infer_next, runtime.infer, cycle(pixels))
        with torch.inference_mode():
            times = take_turns(calls, _ROUNDS, calls_per_turn=len(pixels), progress=bar.advance)
    return {name: Latency(*(float(q) for q in np.quantile(values, (0.5, 0.9)))) for name, values in times.items()}


def _infer_next(infer: Callable[[Any], object], images: Iterator[Any]) -> object:
    return infer(next(images))
