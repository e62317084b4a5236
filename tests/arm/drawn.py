"""A real bundle without a training run: a small network, compiled for LiteRT and ONNX in fp32 and int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from torch import nn

from eyas_device.bundle import GOLDEN, MANIFEST, SCHEMA, Confidence, Manifest, Precision, RuntimeName
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import Pixels, Preprocessing, decode, prepare
from eyas_device.runtimes import load
from eyas_host.export.artefacts import artefact_files
from eyas_host.export.golden import golden_image, write_golden
from eyas_host.export.litert import compile_litert_fp32, compile_litert_int8, compile_litert_int16
from eyas_host.export.manifest import artefacts_of, file_entry
from eyas_host.export.onnx import compile_onnx
from eyas_host.quant.fold import DeployModel
from tests.support.shapes import SHAPES, draw_shape

TEMPERATURE = 2.0
Variant = tuple[RuntimeName, Precision]
VARIANTS: tuple[Variant, ...] = (("litert", "fp32"), ("litert", "int8"), ("onnx", "fp32"), ("onnx", "int8"))
_USE = {"litert": "litert-int8", "onnx": "onnx-fp32"}
_LITERT = {"fp32": compile_litert_fp32, "int8": compile_litert_int8, "int16": compile_litert_int16}


def write_bundle(
    root: Path,
    deploy: DeployModel,
    quantized: nn.Module,
    *,
    size: int,
    variants: Sequence[Variant] = VARIANTS,
    temperature: float = TEMPERATURE,
) -> Path:
    """Compile the folded network and its int8 counterpart into `root`, with golden answers of this machine."""
    root.mkdir()
    for runtime, precision in variants:
        model = deploy if precision == "fp32" else quantized
        path = artefact_files(root, runtime, precision)[0]
        if runtime == "onnx":
            compile_onnx(model, path, input_size=size, precision=precision)
        else:
            _LITERT[precision](model, path, input_size=size)
    spec = Preprocessing(size=size)
    images = [golden_image(draw_shape(label, 500 + seed), spec, 20) for label in SHAPES for seed in range(4)]
    frames = [decode(image) for image in images]
    artefacts = artefacts_of(root, variants)
    probabilities: dict[str, np.ndarray] = {}
    for artefact in artefacts:
        path = artefact_files(root, artefact.runtime, artefact.precision)[0]
        probabilities[artefact.name] = answers(artefact.runtime, path, frames, spec, temperature)
    manifest = Manifest(
        schema=SCHEMA,
        name="drawn-shapes",
        version="1.0.0",
        labels=SHAPES,
        preprocessing=spec,
        artefacts=tuple(artefacts),
        use={artefact.runtime: _USE[artefact.runtime] for artefact in artefacts},
        # a network that was trained for seconds amplifies the last bit far more than a finished one
        confidence=Confidence(temperature=temperature),
        golden_tolerance=0.2,
        notices=("Trained for a few seconds, for a test.",),
    )
    write_golden(root / GOLDEN, images, probabilities, manifest)
    manifest = msgspec.structs.replace(manifest, golden=file_entry(root / GOLDEN, root))
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return root


def answers(runtime: str, path: Path, frames: list[Pixels], spec: Preprocessing, temperature: float) -> np.ndarray:
    """Probabilities of this machine, float32 [images, classes]."""
    with load(runtime)(path, size=spec.size, classes=len(SHAPES), threads=1) as loaded:  # type: ignore[call-arg]
        logits = np.stack([loaded.infer(prepare(frame, spec)).copy() for frame in frames])
    return calibrated_probabilities(logits, Confidence(temperature=temperature)).astype(np.float32)
