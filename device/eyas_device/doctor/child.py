"""Work that may hang, crash or eat the processor, in a process of its own that is ended when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from eyas_device.support.processes import command

_GRACE_S = 5
_LAST_WORDS_S = 5.0
_QUOTED = 200


class JobError(Exception):
    """A job gave no result. `kind` is the name of the exception that it raised, or `timeout`, `killed` or `crash`."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


def in_child(
    job: str, arguments: Mapping[str, object], timeout_s: float, *, module: str = "eyas_device.doctor.jobs"
) -> Any:
    """The result of `JOBS[job](**arguments)` of a module like `eyas_device.doctor.jobs`, worked out in a child process.

    Arguments and result are plain JSON. Raises `JobError` if it fails, crashes, or takes longer than `timeout_s`; the
    child and what it started are ended then.
    """
    words = command(module, job, str(int(timeout_s) + _GRACE_S))
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = process.communicate(json.dumps(arguments).encode(), timeout_s)
    except subprocess.TimeoutExpired:
        raise JobError(f"no result within {timeout_s:g} s; it was stopped", "timeout") from None
    finally:
        with suppress(ProcessLookupError):  # also what the child left behind
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WORDS_S)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
    if process.returncode < 0:
        raise JobError(f"the process was ended by {_signal(-process.returncode)}", "killed")
    try:
        answer = json.loads(output)
    except ValueError:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise JobError(f"the process ended with code {process.returncode}: {lines[-1][:_QUOTED]}", "crash") from None
    if "error" in answer:
        raise JobError(answer["error"], answer["kind"])
    return answer["result"]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
