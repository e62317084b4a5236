"""Compile every artefact of a recipe: each precision for each runtime."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import nn

from eyas_device.bundle import Precision, RuntimeName
from eyas_host.data.split import Split
from eyas_host.export.litert import compile_litert_fp32, compile_litert_int8, compile_litert_int16
from eyas_host.export.onnx import compile_onnx
from eyas_host.export.openvino import compile_openvino
from eyas_host.export.sizes import ArtefactSize, LayerSize, artefact_size, layer_sizes
from eyas_host.export.stored import check_stored
from eyas_host.export.tensorrt import check_tensorrt
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_deploy, load_quantized
from eyas_host.quant.integers import check_accumulators
from eyas_host.quant.quantizers import float_layers
from eyas_host.recipe.export import CompileSection
from eyas_host.support.progress import meter

_SUFFIX = {"litert": ".tflite", "openvino": ".xml", "onnx": ".onnx"}


class Built(msgspec.Struct, frozen=True):
    """Result of the compile stage."""

    sizes: dict[str, int]
    """Artefact -> bytes of all its files."""
    notes: dict[str, str]
    """Artefact -> a note on the file."""
    layers: tuple[LayerSize, ...]
    """Bytes of each layer in fp32 and in int8."""
    artefact_sizes: dict[str, ArtefactSize]
    """Artefact -> bytes of its constants and of the rest."""


def artefact_name(runtime: RuntimeName, precision: Precision) -> str:
    """`litert-int8`."""
    return f"{runtime}-{precision}"


def requested_artefacts(settings: CompileSection) -> list[tuple[RuntimeName, Precision]]:
    """The (runtime, precision) pairs to build: every precision for every runtime, int16 for LiteRT only."""
    return [
        (runtime, precision)
        for runtime in settings.runtimes
        for precision in settings.precisions
        if precision != "int16" or runtime == "litert"
    ]


def artefact_files(folder: Path, runtime: RuntimeName, precision: Precision) -> list[Path]:
    """The files of an artefact; the first is the one to load."""
    main = folder / f"{artefact_name(runtime, precision)}{_SUFFIX[runtime]}"
    return [main, main.with_suffix(".bin")] if runtime == "openvino" else [main]


def build_artefacts(context: RunContext) -> Built:
    """Compile the folded student (fp32) and the QAT model (int8) into `compile/`. Raises `CompileError`."""
    folder = context.folder("compile")
    size = context.recipe.image.size
    classes = len(Split.load(context.root).labels)
    deploy = load_deploy(context, classes)
    quantized = load_quantized(context, classes)
    wanted = requested_artefacts(context.recipe.compile)
    sizes: dict[str, int] = {}
    notes: dict[str, str] = {}
    artefact_sizes: dict[str, ArtefactSize] = {}
    with meter("compiling", len(wanted)) as bar:
        for runtime, precision in wanted:
            files = artefact_files(folder, runtime, precision)
            model = deploy if precision == "fp32" else quantized
            name = artefact_name(runtime, precision)
            notes[name] = compile_artefact(runtime, precision, model, files[0], size)
            sizes[name] = sum(file.stat().st_size for file in files)
            if (runtime, precision, context.recipe.quantize.preset) == ("onnx", "int8", "symmetric"):
                notes[name] += f"; {_tensorrt_note(files[0], quantized, size)}"
            artefact_sizes[name] = artefact_size(runtime, files)
            bar.advance(name)
    return Built(sizes, notes, layer_sizes(quantized), artefact_sizes)


def _tensorrt_note(path: Path, quantized: nn.Module, size: int) -> str:
    """A note on how a symmetric Q/DQ file suits TensorRT. Raises `CompileError` if TensorRT would refuse it."""
    floats = float_layers(quantized, torch.zeros(1, 3, size, size))
    fit = check_tensorrt(path, float_convolutions=len(floats))
    return f"structure fit for TensorRT: opset {fit.opset}, {fit.activations} quantizers; not run there"


def compile_artefact(runtime: RuntimeName, precision: Precision, model: nn.Module, path: Path, size: int) -> str:
    """Compile one artefact from a folded network (fp32) or a QAT model (int8, int16).

    Returns a note for the report, or an empty string. Raises `CompressError` if a bias does not fit into the integer
    sums, and `CompileError` if the conversion fails or the file does not store the integers of the QAT model.
    """
    if precision == "fp32":
        return _convert(runtime, precision, model, path, size)
    check_accumulators(model, input_size=size, activation_bits=16 if precision == "int16" else 8)
    note = _convert(runtime, precision, model, path, size)
    check_stored(runtime, path, model)
    return note


def _convert(runtime: RuntimeName, precision: Precision, model: nn.Module, path: Path, size: int) -> str:
    if runtime == "openvino":
        return compile_openvino(model, path, input_size=size, precision=precision)
    if runtime == "onnx":
        return compile_onnx(model, path, input_size=size, precision=precision)
    build = {"fp32": compile_litert_fp32, "int8": compile_litert_int8, "int16": compile_litert_int16}[precision]
    return build(model, path, input_size=size)
