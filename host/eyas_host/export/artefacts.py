"""The artefacts of a recipe: their names and files."""

from __future__ import annotations

from pathlib import Path

from eyas_device.bundle import Precision, RuntimeName
from eyas_host.recipe.export import CompileSection

_SUFFIX = {"litert": ".tflite", "openvino": ".xml", "onnx": ".onnx"}


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
