"""Compile every artefact of a recipe: each precision for each runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import nn

from eyas_device.bundle import Precision, RuntimeName
from eyas_host.data.split import Split
from eyas_host.export.artefacts import artefact_files, artefact_name, requested_artefacts
from eyas_host.export.sizes import ArtefactSize, LayerSize, artefact_size, layer_sizes
from eyas_host.export.stored import check_stored
from eyas_host.export.tensorrt import check_tensorrt
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_deploy, load_quantized
from eyas_host.quant.integers import check_accumulators
from eyas_host.quant.quantizers import float_layers
from eyas_host.support.beside import beside, has_room_beside
from eyas_host.support.progress import meter

_PROCESS_BYTES = 2e9
"""What a process needs that compiles."""


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


def build_artefacts(context: RunContext) -> Built:
    """Compile the folded student (fp32) and the QAT model (int8) into `compile/`. Raises `CompileError`.

    What takes longest, LiteRT, is compiled in a process of its own where there is room for one.
    """
    wanted = requested_artefacts(context.recipe.compile)
    in_child = [artefact for artefact in wanted if artefact[0] == "litert"]
    here = [artefact for artefact in wanted if artefact not in in_child]
    apart = bool(in_child and here) and has_room_beside(_PROCESS_BYTES)
    networks = _Networks(context)
    with beside("compiling for LiteRT", _compile_all, networks, in_child, apart=apart) as other:
        built = {**_compile_all(networks, here), **other.result()}
    ordered = [(artefact_name(*artefact), built[artefact]) for artefact in wanted]
    return Built(
        {name: one.size for name, one in ordered},
        {name: one.note for name, one in ordered},
        layer_sizes(networks.quantized),
        {name: one.parts for name, one in ordered},
    )


class _Artefact(msgspec.Struct, frozen=True):
    """A compiled artefact."""

    size: int
    """Bytes of all its files."""
    note: str
    parts: ArtefactSize


class _Networks:
    """The networks of a run, each loaded when it is needed; another process loads its own."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def __reduce__(self) -> tuple[type[_Networks], tuple[RunContext]]:
        return _Networks, (self.context,)

    @cached_property
    def _classes(self) -> int:
        return len(Split.load(self.context.root).labels)

    @cached_property
    def deploy(self) -> nn.Module:
        """The folded student in float."""
        return load_deploy(self.context, self._classes)

    @cached_property
    def quantized(self) -> nn.Module:
        """The QAT model."""
        return load_quantized(self.context, self._classes)


def _compile_all(
    networks: _Networks, wanted: Sequence[tuple[RuntimeName, Precision]]
) -> dict[tuple[RuntimeName, Precision], _Artefact]:
    """Compile these artefacts."""
    context, recipe, built = networks.context, networks.context.recipe, {}
    size = recipe.image.size
    with meter("compiling", len(wanted)) as bar:
        for runtime, precision in wanted:
            files = artefact_files(context.folder("compile"), runtime, precision)
            model = networks.deploy if precision == "fp32" else networks.quantized
            note = compile_artefact(runtime, precision, model, files[0], size)
            if (runtime, precision, recipe.quantize.preset) == ("onnx", "int8", "symmetric"):
                note += f"; {_tensorrt_note(files[0], model, size)}"
            bytes_of_all = sum(file.stat().st_size for file in files)
            built[runtime, precision] = _Artefact(bytes_of_all, note, artefact_size(runtime, files))
            bar.advance(artefact_name(runtime, precision))
    return built


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
    """Convert with the runtime's own framework, which is imported here: what compiles for one needs no other."""
    if runtime == "openvino":
        from eyas_host.export.openvino import compile_openvino

        return compile_openvino(model, path, input_size=size, precision=precision)
    if runtime == "onnx":
        from eyas_host.export.onnx import compile_onnx

        return compile_onnx(model, path, input_size=size, precision=precision)
    from eyas_host.export.litert import compile_litert_fp32, compile_litert_int8, compile_litert_int16

    build = {"fp32": compile_litert_fp32, "int8": compile_litert_int8, "int16": compile_litert_int16}[precision]
    return build(model, path, input_size=size)
