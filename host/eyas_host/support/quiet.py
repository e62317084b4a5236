"""Silences libraries: no usage statistics, no start-up messages."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from eyas_device.support.quiet import disable_usage_reports


def quiet_libraries() -> None:
    """Disable usage statistics and start-up messages; call it before importing frameworks.

    Optuna's reports need a package of their own, which nothing of ours installs.
    """
    disable_usage_reports()
    os.environ["NNCF_CI"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # an image that cannot be decoded is listed by us
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree", "nncf"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Silence converters that print each pass and their own deprecation warnings; errors are still raised."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
