"""What XNNPACK computes of a .tflite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ai_edge_litert.interpreter import Interpreter


def partitions(path: Path) -> int:
    """How many pieces of a .tflite XNNPACK computes; what lies between them leaves its layout and comes back."""
    interpreter: Any = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    kinds = [operation["op_name"] for operation in interpreter._get_ops_details()]
    assert len(kinds) > 10
    return kinds.count("DELEGATE")
