"""Load all variants of a run, and measure their logits and latency on the same images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eyas_device.board.limits import usable_cores
from eyas_device.bundle import Bundle
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.runtimes import Runtime, open_runtime
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import forward, full_float32, to_tensor, torch_threads
from eyas_host.evaluation.parity import reference_of
from eyas_host.evaluation.turns import take_turns
from eyas_host.evaluation.verdict import Latency, Logits
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.quant.exact import ExactNetwork, exact_int8
from eyas_host.support.progress import meter

NETWORKS = ("teacher", "student-labels-only", "student", "pruned", "qat", "exact-int8")
"""Variants that are torch networks, in the order of the comparison."""
_BATCH, _CPU_CHUNK = 64, 16
"""Images that are prepared together, and images of one forward pass on a CPU core."""
_ROUNDS = 30
_CALLS_PER_TURN = 5


def load_networks(context: RunContext, classes: int) -> dict[str, nn.Module]:
    """Name -> network of those torch variants that the run has."""
    networks: dict[str, nn.Module] = {}
    if (context.root / checkpoints.TEACHER).exists():
        networks["teacher"] = checkpoints.load_teacher(context, classes)
    if (context.root / checkpoints.LABELS_ONLY).exists():
        networks["student-labels-only"] = checkpoints.load_student(context, classes, checkpoints.LABELS_ONLY)
    networks["student"] = checkpoints.load_student(context, classes)
    networks["pruned"] = checkpoints.load_pruned(context, classes)
    networks["qat"] = load_quantized(context, classes)
    networks["exact-int8"] = exact_int8(networks["qat"], input_size=context.recipe.image.size)
    return {name: net.eval() for name, net in networks.items()}


def reference_network(context: RunContext, classes: int, artefact: str) -> nn.Module:
    """The torch network that an artefact was made from."""
    if reference_of(artefact) == "pruned":
        return checkpoints.load_pruned(context, classes)
    return load_quantized(context, classes)


class _Variant(NamedTuple):
    """Something that predicts prepared pixels uint8 [n, size, size, 3] as logits [n, classes]."""

    name: str
    predict: Callable[[Batch], Logits]
    chunk: int
    """Images of one job; less than a batch for what several threads may call at once."""


def all_logits(
    networks: Mapping[str, nn.Module], bundle: Bundle, images: Sequence[Pixels], device: torch.device
) -> dict[str, Logits]:
    """Variant -> logits float32 [n, classes] of decoded images, each read and prepared once, as on the device.

    Images stream in batches that all variants share: networks compute on `device` in float32 (and stay there),
    artefacts in the device's own runtimes. Each core works on one variant at a time, at one thread.
    """
    shape = len(images), len(bundle.manifest.labels)
    with ExitStack() as stack:
        variants = [*_artefact_variants(bundle, stack), *_network_variants(networks, device)]
        logits = {variant.name: np.empty(shape, dtype=np.float32) for variant in variants}
        stack.enter_context(full_float32())
        stack.enter_context(torch_threads(1))
        pool = stack.enter_context(ThreadPoolExecutor(usable_cores()))
        bar = stack.enter_context(meter("predictions of every variant", -(-len(images) // _BATCH)))
        for start, pixels in _prepared_ahead(images, bundle.manifest.preprocessing, pool):
            jobs = [
                pool.submit(_fill, logits[name][start + first :], predict, pixels[first : first + chunk])
                for name, predict, chunk in variants
                for first in range(0, len(pixels), chunk)
            ]
            for job in jobs:
                job.result()
            bar.advance()
    return logits


def _artefact_variants(bundle: Bundle, stack: ExitStack) -> Iterator[_Variant]:
    """Each artefact in its runtime, which closes with `stack`; a runtime takes one call at a time."""
    for artefact in bundle.manifest.artefacts:
        runtime = stack.enter_context(open_runtime(bundle, artefact.runtime, artefact.name, threads=1))
        yield _Variant(artefact.name, partial(_run_artefact, runtime), _BATCH)


def _run_artefact(runtime: Runtime, pixels: Batch) -> Logits:
    return np.stack([runtime.infer(image).copy() for image in pixels])


def _network_variants(networks: Mapping[str, nn.Module], device: torch.device) -> Iterator[_Variant]:
    for name, network in networks.items():
        placed = network.place(device) if isinstance(network, ExactNetwork) else move(network, device)
        # NNCF wraps a quantized network's modules during a call, which a second thread must not see.
        chunk = _CPU_CHUNK if isinstance(network, PixelClassifier) and device.type == "cpu" else _BATCH
        yield _Variant(name, partial(_run_network, placed.eval(), device), chunk)


def _run_network(network: nn.Module, device: torch.device, pixels: Batch) -> Logits:
    step = _CPU_CHUNK if device.type == "cpu" else _BATCH
    passes = [forward(network, pixels[first : first + step], device) for first in range(0, len(pixels), step)]
    return torch.cat(passes).cpu().numpy()


def _fill(rows: Logits, predict: Callable[[Batch], Logits], pixels: Batch) -> None:
    rows[: len(pixels)] = predict(pixels)


def _prepared_ahead(images: Sequence[Pixels], spec: Preprocessing, pool: Executor) -> Iterator[tuple[int, Batch]]:
    """First row and prepared pixels of each batch; the following one is prepared meanwhile."""
    frames = iter(images)  # read in order, which keeps none of them in memory

    def prepare_batch() -> Batch:
        return np.stack([prepare(frame, spec) for frame in islice(frames, _BATCH)])

    starts = range(0, len(images), _BATCH)
    ahead = deque([pool.submit(prepare_batch) for _ in starts[:1]])
    for start in starts:
        pixels = ahead.popleft().result()
        if start != starts[-1]:
            ahead.append(pool.submit(prepare_batch))
        yield start, pixels


def measure_latency(networks: Mapping[str, nn.Module], bundle: Bundle, images: ImageDataset) -> dict[str, Latency]:
    """Variant -> latency of one image at one thread, all variants measured in turns."""
    spec = bundle.manifest.preprocessing
    pixels = np.stack([prepare(frame, spec) for frame in islice(images.pixels, _CALLS_PER_TURN)])
    tensors = to_tensor(pixels, torch.device("cpu")).float()
    calls: dict[str, Callable[[], object]] = {}
    for name in ("teacher", "student", "pruned"):
        if name in networks:
            network: Any = networks[name]
            network.to("cpu", memory_format=torch.contiguous_format)
            calls[name] = partial(_infer_next, network, cycle([tensor[None] for tensor in tensors]))
    with ExitStack() as stack, torch_threads(1), meter("latency", _ROUNDS) as bar:
        for artefact in bundle.manifest.artefacts:
            runtime = stack.enter_context(open_runtime(bundle, artefact.runtime, artefact.name, threads=1))
            calls[artefact.name] = partial(_infer_next, runtime.infer, cycle(pixels))
        with torch.inference_mode():
            times = take_turns(calls, _ROUNDS, calls_per_turn=len(pixels), progress=bar.advance)
    return {name: _latency(values, len(pixels)) for name, values in times.items()}


def _latency(times: Sequence[float], calls_per_turn: int) -> Latency:
    """Quantiles of all calls in milliseconds, and the median of each turn."""
    p50, p90 = np.quantile(times, (0.5, 0.9)).tolist()
    return Latency(p50, p90, tuple(np.median(np.reshape(times, (-1, calls_per_turn)), axis=1).tolist()))


def _infer_next(infer: Callable[[Any], object], images: Iterator[Any]) -> object:
    return infer(next(images))
