"""How XNNPACK partitions a .tflite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ai_edge_litert.interpreter import Interpreter


def partitions(path: Path) -> int:
    """Number of XNNPACK partitions of a .tflite; every gap between them costs a change of layout and back."""
    interpreter: Any = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    kinds = [operation["op_name"] for operation in interpreter._get_ops_details()]
    assert len(kinds) > 10
    return kinds.count("DELEGATE")
