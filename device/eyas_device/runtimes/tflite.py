"""The older readers of `.tflite` files: tflite-runtime (numpy 1, up to Python 3.11) or TensorFlow's interpreter."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from eyas_device.runtimes.tflite_base import TfliteModel


class Tflite(TfliteModel):
    """tflite-runtime, which many Raspberry Pis have, or TensorFlow, whichever is installed."""

    name = "tflite"

    def __init__(self, path: Path, *, size: int, classes: int, threads: int) -> None:
        self.interpreter, self.version = _reader()
        super().__init__(path, size=size, classes=classes, threads=threads)

    @classmethod
    def lacks(cls) -> str:
        """Why neither library can be used."""
        try:
            _reader()
        except ImportError as error:
            return str(error)
        return ""


def _reader() -> tuple[Any, str]:
    """The interpreter's class, and name and version of its library. Raises `ImportError` if there is neither."""
    try:
        interpreter = importlib.import_module("tflite_runtime.interpreter").Interpreter
        package = "tflite-runtime"
    except ModuleNotFoundError:
        interpreter = importlib.import_module("tensorflow").lite.Interpreter
        package = "tensorflow"
    return interpreter, f"{package} {metadata.version(package)}"
