"""The doctor: whether this device is fit to run a camera, and if not, what has to be done.

Each check is a function from a `Context` to a `Finding`. What may hang or crash (importing libraries, running a model,
opening a camera) happens in a process of its own, so that this one needs neither numpy nor OpenCV.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from eyas_device.doctor import probes, software, system
from eyas_device.doctor.finding import Context, Finding, Status, red
from eyas_device.errors import EyasError

__all__ = ["CHECKS", "Context", "Finding", "Row", "examine", "rows", "title"]

Check = Callable[[Context], Finding]
_Seen = TypeVar("_Seen")

CHECKS: tuple[Check, ...] = (
    software.configuration,
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
    system.clock,
    system.disk,
    system.inodes,
    system.temperature,
    system.processor,
    system.memory,
    system.descriptors,
    system.service,
)
"""In the order in which they are run and shown; a check's name is its function's."""

LIMIT_S = 75.0
"""A check that has not ended by then is red and left behind."""
_LONGEST = 400


class Row(msgspec.Struct, frozen=True):
    """A check's finding, fit to be shown: one line each, no control characters, no passwords of addresses."""

    check: str
    status: Status
    finding: str
    fix: str
    seconds: float


def examine(context: Context, checks: Sequence[Check] = CHECKS, *, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """Run the checks one after the other; one that fails, or takes longer than `limit_s`, is red and stops no other."""
    return rows(context, checks, limit_s=limit_s)


def rows(context: _Seen, checks: Sequence[Callable[[_Seen], Finding]], *, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """As `examine`, for checks of something else than a device."""
    for check in checks:
        started = time.monotonic()
        found = _bounded(check, context, limit_s)
        seconds = round(time.monotonic() - started, 3)
        yield Row(title(check), found.status, _plain(found.text), _plain(found.fix), seconds)


def title(check: Callable[..., Finding]) -> str:
    """What a check is called."""
    return check.__name__.replace("_", " ")


def _bounded(check: Callable[[_Seen], Finding], context: _Seen, limit_s: float) -> Finding:
    found: list[Finding] = []

    def work() -> None:
        try:
            found.append(check(context))
        except EyasError as error:
            found.append(red(str(error), "see the message"))
        except Exception as error:  # a defect of one check must not hide what the others find
            found.append(red(f"the check failed: {type(error).__name__}: {error}", "report this as a defect of Eyas"))

    thread = threading.Thread(target=work, name=f"check-{title(check)}", daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else red(f"no finding within {limit_s:g} s", "something that it reads hangs: see dmesg")


def _plain(text: str) -> str:
    text = re.sub(r"(//[^/@\s:]*):[^/@\s]*@", r"\1:***@", text)
    text = re.sub(r"[^\S ]+", " ", text)
    return "".join(c if c.isprintable() else "?" for c in text)[:_LONGEST]
