"""Diagnostics of a device: checks of system, libraries, model, camera, broker and service, each with a fix.

Each check is a function from a `Context` to a `Finding`. What may hang or crash (importing libraries, running a model,
opening a camera) runs in a child process, so this one needs neither numpy nor OpenCV.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

import msgspec

from eyas_device.doctor import probes, service_user, signed_updates, software, system
from eyas_device.doctor.finding import CheckStatus, Context, Finding, red
from eyas_device.errors import EyasError
from eyas_device.support.redact import redact
from eyas_device.telemetry.tls import ClosedFileError

__all__ = ["CHECKS", "CheckResult", "Context", "Finding", "check_name", "examine", "run_checks", "running_check"]

Check = Callable[[Context], Finding]
_Context = TypeVar("_Context")

CHECKS: tuple[Check, ...] = (
    software.configuration,
    service_user.user,
    software.operating_system,
    software.python,
    software.userland,
    software.c_library,
    software.libraries,
    software.conflicts,
    probes.runtime("litert"),
    probes.runtime("tflite"),
    probes.runtime("openvino"),
    probes.runtime("onnx"),
    probes.runtime("onnx-cuda"),
    probes.runtime("onnx-tensorrt"),
    probes.golden,
    probes.camera,
    probes.view,
    probes.broker,
    signed_updates.updates,
    system.clock,
    system.disk,
    system.inodes,
    system.temperature,
    system.processor,
    system.memory,
    system.descriptors,
    system.service,
    system.agent,
)
"""All checks, in the order in which they are run and shown; a check has the name of its function."""

LIMIT_S = 75.0
"""Time limit of a check; after it the check is red and its thread is abandoned."""
_MAX_CHARS = 400


class CheckResult(msgspec.Struct, frozen=True):
    """Result of a check, sanitised for display: single lines, no control characters, no credentials."""

    check: str
    status: CheckStatus
    finding: str
    fix: str
    seconds: float


def examine(
    context: Context,
    checks: Sequence[Check] = CHECKS,
    *,
    limit_s: float = LIMIT_S,
    on_start: Callable[[str], object] = lambda name: None,
) -> Iterator[CheckResult]:
    """Run checks of a device one after the other; a check that raises or takes longer than `limit_s` is red."""
    return run_checks(context, checks, limit_s=limit_s, on_start=on_start)


def run_checks(
    context: _Context,
    checks: Sequence[Callable[[_Context], Finding]],
    *,
    limit_s: float = LIMIT_S,
    on_start: Callable[[str], object] = lambda name: None,
) -> Iterator[CheckResult]:
    """Run checks with any kind of context, like `examine`; `on_start` gets the name of each before it runs."""
    for check in checks:
        on_start(check_name(check))
        started = time.monotonic()
        finding = _run_bounded(check, context, limit_s)
        seconds = round(time.monotonic() - started, 3)
        yield CheckResult(check_name(check), finding.status, _sanitise(finding.text), _sanitise(finding.fix), seconds)


@contextmanager
def running_check(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Show the name of the check that runs on a terminal: call with a name to show it, with none to remove it."""
    clear = "\r\x1b[K"

    def show(name: str) -> None:
        if stream.isatty():
            stream.write(f"{clear}checking {name} ..." if name else clear)
            stream.flush()

    yield show
    show("")


def check_name(check: Callable[..., Finding]) -> str:
    """Name of a check for display."""
    return check.__name__.replace("_", " ")


def _run_bounded(check: Callable[[_Context], Finding], context: _Context, limit_s: float) -> Finding:
    findings: list[Finding] = []

    def work() -> None:
        try:
            findings.append(check(context))
        except ClosedFileError as error:
            findings.append(red(error.problem, error.fix))
        except EyasError as error:
            findings.append(red(str(error), "see the message"))
        except Exception as error:  # a bug in one check must not hide the results of the others
            findings.append(red(f"the check failed: {type(error).__name__}: {error}", "report this as a bug of Eyas"))

    thread = threading.Thread(target=work, name=f"check-{check_name(check)}", daemon=True)
    thread.start()
    thread.join(limit_s)
    return (
        findings[0] if findings else red(f"no result within {limit_s:g} s", "something that it reads hangs: see dmesg")
    )


def _sanitise(text: str) -> str:
    text = re.sub(r"[^\S ]+", " ", redact(text))
    return "".join(c if c.isprintable() else "?" for c in text)[:_MAX_CHARS]
