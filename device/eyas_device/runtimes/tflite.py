"""Older TFLite interpreters: tflite-runtime (numpy 1, up to Python 3.11) or the one in TensorFlow."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from eyas_device.runtimes.tflite_base import TfliteModel


class Tflite(TfliteModel):
    """`.tflite` models with tflite-runtime, which many Raspberry Pis have, else with TensorFlow."""

    name = "tflite"

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        self.interpreter, self.version = _find_interpreter()
        super().__init__(path, size=size, classes=classes, threads=threads)

    @classmethod
    def missing_feature(cls) -> str:
        try:
            _find_interpreter()
        except ImportError as error:
            return str(error)
        return ""


def _find_interpreter() -> tuple[Any, str]:
    """The interpreter class, and its library's name and version. Raises `ImportError` if there is neither."""
    try:
        interpreter = importlib.import_module("tflite_runtime.interpreter").Interpreter
        package = "tflite-runtime"
    except ModuleNotFoundError:
        interpreter = importlib.import_module("tensorflow").lite.Interpreter
        package = "tensorflow"
    return interpreter, f"{package} {metadata.version(package)}"
