"""Child processes with a time limit: modules of the agent, JSON jobs that may hang or crash, commands of the system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

_BOOTSTRAP = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
importlib.import_module(sys.argv.pop(1)).main(sys.argv[1:])
"""
_MAX_OUTPUT_BYTES = 1 << 20
_MAX_QUOTED_CHARS = 200
_ALARM_MARGIN_S = 5
_REAP_S = 5.0


class JobError(Exception):
    """A job gave no result. `kind` is the name of the exception that it raised, or `timeout`, `killed` or `crash`."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


def module_command(module: str, *arguments: str) -> list[str]:
    """The argv that calls `main(arguments)` of `module` in a new interpreter.

    The child gets this process's `sys.path`: `python -m` would import from whatever folder the agent was started in.
    """
    return [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), module, *arguments]


def run_command(command: Sequence[str], timeout_s: float) -> str | None:
    """Standard output (at most 1 MiB) of a command; None if it is missing, fails or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout[:_MAX_OUTPUT_BYTES].decode(errors="replace") if done.returncode == 0 else None


def run_group(command: Sequence[str], timeout_s: float, *, data: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run a command with `data` on its standard input; return its exit code, standard output and standard error.

    The command leads a process group of its own; on return it and everything that it started are gone. Raises
    `subprocess.TimeoutExpired` if it takes longer than `timeout_s`, and `OSError` if it cannot be started.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = process.communicate(data, timeout_s)
    finally:
        with suppress(ProcessLookupError):  # also what the command left behind
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_REAP_S)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
    return process.returncode, output, errors


def run_job(module: str, job: str, arguments: Mapping[str, object], timeout_s: float) -> Any:
    """Run `JOBS[job](**arguments)` of a module like `eyas_device.doctor.jobs` in a child process and return its result.

    Arguments and result are plain JSON. On return the child and everything it started are gone. Raises `JobError` if
    the job fails, crashes or takes longer than `timeout_s`.
    """
    command = module_command(module, job, str(int(timeout_s) + _ALARM_MARGIN_S))
    try:
        code, output, errors = run_group(command, timeout_s, data=json.dumps(arguments).encode())
    except subprocess.TimeoutExpired:
        raise JobError(f"no result within {timeout_s:g} s; it was stopped", "timeout") from None
    if code < 0:
        raise JobError(f"the process was killed by {signal_name(-code)}", "killed")
    try:
        reply = json.loads(output)
    except ValueError:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no error output"]
        text = f"the process ended with code {code}: {lines[-1][:_MAX_QUOTED_CHARS]}"
        raise JobError(text, "crash") from None
    if "error" in reply:
        raise JobError(reply["error"], reply["kind"])
    return reply["result"]


def signal_name(number: int) -> str:
    """Name of a signal, e.g. SIGKILL; of one that has none, its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
