"""What a check says, and what it may ask: everything that it reads of the machine can be replaced in a test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from eyas_device.board.reading import Runner, text
from eyas_device.config import Config
from eyas_device.support.processes import run_command, run_job

Status = Literal["green", "yellow", "red", "grey"]
"""green: well; yellow: works, but look at it; red: does not work; grey: not checked."""


class Finding(msgspec.Struct, frozen=True):
    """What one check found, and how to fix it: one line each."""

    status: Status
    text: str
    fix: str = ""


def green(text: str) -> Finding:
    """All is well."""
    return Finding("green", text)


def yellow(text: str, fix: str) -> Finding:
    """It works, but somebody should look at it."""
    return Finding("yellow", text, fix)


def red(text: str, fix: str) -> Finding:
    """It does not work."""
    return Finding("red", text, fix)


def grey(text: str, fix: str = "") -> Finding:
    """Not checked."""
    return Finding("grey", text, fix)


def installed(package: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_run_job = partial(run_job, "eyas_device.doctor.jobs")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is examined, and through which eyes."""

    config: Config
    """With what the command line said put over it."""
    config_path: Path | None = None
    """Where it was read from; None: the defaults."""
    config_fault: str = ""
    """Why the file was not read."""
    username: str = ""
    password: str = ""
    """For the broker."""
    root: Path = Path("/")
    """Above `proc`, `sys`, `run` and `etc`."""
    now: Callable[[], float] = time.time
    uname: Callable[[], Any] = os.uname
    version: Callable[[str], str | None] = installed
    """Of an installed package."""
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    run: Runner = run_command
    """Runs a command of the system."""
    job: Callable[[str, Mapping[str, object], float], Any] = _run_job
    """Runs one of `eyas_device.doctor.jobs.JOBS` where it may hang and crash."""

    @property
    def state(self) -> Path:
        """The device's state folder."""
        return Path(self.config.device.state)

    def read(self, path: str) -> str | None:
        """The text of a small file below `root`, None if it cannot be read."""
        return text(self.root / path)
