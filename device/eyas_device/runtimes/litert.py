"""LiteRT, formerly TensorFlow Lite."""

from __future__ import annotations

from importlib import metadata

from ai_edge_litert.interpreter import Interpreter

from eyas_device.runtimes.tflite_base import TfliteModel


class LiteRT(TfliteModel):
    """`.tflite` models with ai-edge-litert, the maintained interpreter."""

    name = "litert"
    version = metadata.version("ai-edge-litert")
    interpreter = Interpreter
