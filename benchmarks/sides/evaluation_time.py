"""How long `verify` and `report` take for many images: what grows with the images is measured on some and scaled."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from compiled import network
from eyas_device.board.limits import usable_cores
from eyas_device.bundle import SCHEMA, Bundle, Manifest, sha256
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import Preprocessing
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.sources import LabelledImage
from eyas_host.evaluation.calibration import calibrate
from eyas_host.evaluation.metrics import score
from eyas_host.evaluation.networks import all_logits, measure_latency
from eyas_host.evaluation.parity import compare
from eyas_host.evaluation.verdict import Logits
from eyas_host.export.artefacts import artefact_files, requested_artefacts
from eyas_host.export.manifest import artefacts_of, write_manifest
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.quant.exact import exact_int8
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from eyas_host.recipe.export import CompileSection
from sides.large_images import draw

LABELS = ("a", "b")
STUDENT = "mobilenetv3_small_100"


def candidate(folder: Path, work: Path, size: int) -> Bundle:
    """A bundle of every default artefact of the student with random weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = requested_artefacts(CompileSection())
    for runtime, precision in wanted:
        made = network(STUDENT, precision, work, size=size, runtime=runtime)
        for path in artefact_files(made.parent, runtime, precision):
            shutil.copy(path, folder)
    write_manifest(
        Manifest(
            schema=SCHEMA,
            name="evaluation",
            version="0.0.0",
            labels=LABELS,
            preprocessing=Preprocessing(size=size),
            artefacts=tuple(artefacts_of(folder, wanted)),
            use={},
        ),
        folder,
    )
    return Bundle.open(folder)


def networks_like_a_run(teacher: str, size: int) -> dict[str, nn.Module]:
    """The networks of a finished run, with random weights: speed does not depend on them."""
    student = build(STUDENT, len(LABELS), "random")[0].eval()
    noise = [torch.randint(0, 256, (1, 3, size, size)).float() for _ in range(4)]
    qat = prepare_qat(fold_for_deployment(student), noise, input_size=size).eval()
    names = ("student-labels-only", "student", "pruned")
    return {
        "teacher": _random(teacher),
        **{name: _random(STUDENT) for name in names},
        "qat": qat,
        "exact-int8": exact_int8(qat, input_size=size),
    }


class Estimate(NamedTuple):
    """Duration of `verify` and `report` together, minutes."""

    wall: float
    """By the clock of this machine, as busy as it was."""
    idle: float
    """If this process had had its cores for itself: processor time over cores, where several work."""
    parts: str


def estimate(images: int, bundle: Bundle, networks: dict[str, nn.Module], dataset: ImageDataset) -> Estimate:
    """Estimate `verify` and `report` for `images` validation and as many test images.

    The predictions of all variants are measured on `dataset` and scaled, the statistics on `images` random logits, the
    latency as it is. Left out: loading the networks, and the pages.
    """
    count, cores = len(dataset), usable_cores()
    latency = _timed(lambda: measure_latency(networks, bundle, dataset))
    predictions = _timed(lambda: all_logits(networks, bundle, dataset.pixels, torch.device("cpu")))
    variants = [*networks, *(artefact.name for artefact in bundle.manifest.artefacts)]
    statistics = _timed(lambda: _statistics(variants, bundle.manifest.labels, images))
    scale = 2 * images / count
    return Estimate(
        wall=(latency.wall_s + scale * predictions.wall_s + statistics.wall_s) / 60,
        idle=(latency.cpu_s + scale * predictions.cpu_s / cores + statistics.cpu_s) / 60,
        parts=f"an image in {1000 * predictions.wall_s / count:.0f} ms ({1000 * predictions.cpu_s / count:.0f} ms of "
        f"processor time) for {len(variants)} variants, twice; statistics {statistics.wall_s:.0f} s "
        f"({statistics.cpu_s:.0f}), latency {latency.wall_s:.0f} s ({latency.cpu_s:.0f})",
    )


class _Time(NamedTuple):
    wall_s: float
    cpu_s: float


def _timed(call: Callable[[], object]) -> _Time:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return _Time(time.perf_counter() - wall, time.process_time() - cpu)


def _statistics(variants: list[str], labels: tuple[str, ...], images: int) -> None:
    """What both stages compute from the logits of `images` images."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, len(labels), images)
    logits: dict[str, Logits] = {
        name: (rng.normal(size=(images, len(labels))) + 2 * np.eye(len(labels))[targets]).astype(np.float32)
        for name in variants
    }
    calibrated = calibrate(logits, targets, np.arange(images), labels, threshold=0.6)
    for name, values in logits.items():
        probabilities = calibrated_probabilities(values, calibrated.confidence[name])
        for _ in ("validation", "test"):
            score(probabilities, targets, predicted=values.argmax(axis=1))
        if name.startswith(("litert", "openvino", "onnx")):
            compare(logits, name, targets, confidence=calibrated.confidence[name])


def dataset_of(folder: Path, count: int, size: int) -> ImageDataset:
    """`count` JPEGs of 640 x 480 pixels, drawn below `folder` if they are not there."""
    draw(folder, count, width=640, height=480)
    paths = sorted(folder.glob("*/*.jpg"))[:count]
    images = [LabelledImage(path=str(path), label=path.parent.name, sha256=sha256(path)) for path in paths]
    return ImageDataset(images, LABELS, Preprocessing(size=size))


def _random(name: str) -> PixelClassifier:
    return build(name, len(LABELS), "random")[0].eval()
