"""Build every artefact that the recipe names: fp32 and int8 for each runtime."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eyas_device.bundle import Precision, RuntimeName
from eyas_host import checkpoints
from eyas_host.compile.litert import compile_litert_fp32, compile_litert_int8
from eyas_host.compile.onnx import compile_onnx
from eyas_host.compile.openvino import compile_openvino
from eyas_host.compress.qat import load_qat
from eyas_host.data.split import Split
from eyas_host.progress import meter
from eyas_host.stages import Context

_SUFFIX = {"litert": ".tflite", "openvino": ".xml", "onnx": ".onnx"}


class Built(msgspec.Struct, frozen=True):
    """What the compile stage made."""

    sizes: dict[str, int]
    """Artefact -> bytes of all its files."""
    notes: dict[str, str]


def artefact_name(runtime: RuntimeName, precision: Precision) -> str:
    """`litert-int8`."""
    return f"{runtime}-{precision}"


def artefact_files(folder: Path, runtime: RuntimeName, precision: Precision) -> list[Path]:
    """The files of an artefact, the one to load first."""
    main = folder / f"{artefact_name(runtime, precision)}{_SUFFIX[runtime]}"
    return [main, main.with_suffix(".bin")] if runtime == "openvino" else [main]


def build_artefacts(context: Context) -> Built:
    """Compile the folded student (fp32) and the QAT model (int8) into `compile/`. Raises `CompileError`."""
    folder = context.folder("compile")
    size = context.recipe.picture.size
    classes = len(Split.load(context.root).labels)
    deploy = checkpoints.load_deploy(context, classes)
    quantized = load_qat(checkpoints.load_deploy(context, classes), context.folder("qat"))
    runtimes = context.recipe.compile.runtimes
    sizes: dict[str, int] = {}
    notes: dict[str, str] = {}
    with meter("compiling", 2 * len(runtimes)) as bar:
        for runtime in runtimes:
            for precision in ("fp32", "int8"):
                files = artefact_files(folder, runtime, precision)
                model = quantized if precision == "int8" else deploy
                if runtime == "openvino":
                    info = compile_openvino(model, files[0], input_size=size, precision=precision)
                elif runtime == "onnx":
                    info = compile_onnx(model, files[0], input_size=size, precision=precision)
                elif precision == "int8":
                    info = compile_litert_int8(quantized, files[0], input_size=size)
                else:
                    info = compile_litert_fp32(deploy, files[0], input_size=size)
                name = artefact_name(runtime, precision)
                sizes[name] = sum(file.stat().st_size for file in files)
                notes[name] = info.notes
                bar.advance(name)
    return Built(sizes, notes)
