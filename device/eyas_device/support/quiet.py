"""Libraries report their usage to nobody: call this before one of them is imported."""

from __future__ import annotations

import os
import sys
from typing import Any, cast


def disable_usage_reports() -> None:
    """Switch off the usage reports of OpenVINO and ONNX Runtime in this process.

    OpenVINO takes its own stub if the package that reports cannot be imported; that package would also leave a client
    id in the home folder, and fail without one. ONNX Runtime reads its variable at import.
    """
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
