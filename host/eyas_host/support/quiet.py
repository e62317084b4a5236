"""Silences libraries: no usage statistics, no start-up messages, no files at places of their own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from eyas_device.support.quiet import disable_usage_reports, quiet_native_code
from eyas_host.support.caches import place_caches
from eyas_host.support.progress import keep_printing

_NO_REPORTS = {
    "NNCF_CI": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}
"""Switches of usage reports: NNCF, Hugging Face's libraries, the trackers, and those who heed https://donottrack.sh."""


def quiet_libraries() -> None:
    """Disable usage statistics and start-up messages, and place caches; call it before importing frameworks.

    Child processes inherit it. Optuna has no reports; what a tracker sends goes to the server that the recipe asks for.
    """
    disable_usage_reports()
    for name, value in _NO_REPORTS.items():
        os.environ[name] = value
    place_caches()
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # an image that cannot be decoded is listed by us
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nncf = logging.getLogger("nncf")
    if _is_error not in nncf.filters:
        nncf.addFilter(_is_error)  # it sets its own level when it is imported


def quiet_warnings() -> None:
    """Silence Python's warnings, which speak to those who write programs, in a process of ours; -W shows them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Silence converters that print each pass and their own deprecation warnings; errors are still raised.

    What native code prints is discarded too. Our own progress is still shown.
    """
    sink = io.StringIO()
    with (
        keep_printing(),
        quiet_native_code(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
