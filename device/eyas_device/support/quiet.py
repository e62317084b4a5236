"""Libraries report their usage to nobody, and do not chat on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


def disable_usage_reports() -> None:
    """Switch off the usage reports of OpenVINO and ONNX Runtime in this process.

    OpenVINO takes its own stub if the package that reports cannot be imported; that package would also leave a client
    id in the home folder, and fail without one. ONNX Runtime reads its variable at import.
    """
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@contextmanager
def quiet_native_code() -> Iterator[None]:
    """Discard what any thread writes to file descriptor 2 meanwhile; keep the block short.

    Native code writes there whatever Python's `sys.stderr` is, e.g. "INFO: Created TensorFlow Lite XNNPACK delegate".
    """
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        os.close(sink)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
