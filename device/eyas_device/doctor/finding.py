"""Finding and context of a check: everything that a check reads from the machine can be replaced in a test."""

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

from eyas_device.board.reading import CommandRunner, text
from eyas_device.config import SERVICE_USER, Config
from eyas_device.support.processes import run_command, run_job

CheckStatus = Literal["green", "yellow", "red", "grey"]
"""green: ok; yellow: works, with a warning; red: does not work; grey: not checked."""


class Finding(msgspec.Struct, frozen=True):
    """Result of one check, and how to fix what is wrong: one line each."""

    status: CheckStatus
    text: str
    fix: str = ""


def green(text: str) -> Finding:
    """Finding without a problem."""
    return Finding("green", text)


def yellow(text: str, fix: str) -> Finding:
    """Finding of something that works, with a warning."""
    return Finding("yellow", text, fix)


def red(text: str, fix: str) -> Finding:
    """Finding of something that does not work."""
    return Finding("red", text, fix)


def grey(text: str, fix: str = "") -> Finding:
    """Finding of something that was not checked."""
    return Finding("grey", text, fix)


def installed(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Judge(msgspec.Struct, frozen=True):
    """As whom the doctor judges."""

    user: str
    closed: str = ""
    """Path that is closed to the service's user, because of which root did not become it."""

    @property
    def is_service(self) -> bool:
        """Whether the checks see what the service sees."""
        return self.user == SERVICE_USER


_run_job = partial(run_job, "eyas_device.doctor.jobs")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is checked, and the functions through which the checks read the machine."""

    config: Config
    """Configuration with command-line overrides."""
    config_path: Path | None = None
    """File that it was read from; None: the defaults."""
    config_error: str = ""
    """Why the file could not be read; empty if it could."""
    root: Path = Path("/")
    """Parent of `proc`, `sys`, `run` and `etc`."""
    now: Callable[[], float] = time.time
    uname: Callable[[], Any] = os.uname
    version: Callable[[str], str | None] = installed
    """Version of an installed package."""
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    run: CommandRunner = run_command
    """Runs a system command."""
    judge: Judge | None = None
    """As whom the checks see the machine; None: as the user of this process."""
    job: Callable[[str, Mapping[str, object], float], Any] = _run_job
    """Runs one of `eyas_device.doctor.jobs.JOBS` in a child process."""

    @property
    def state(self) -> Path:
        """The device's state folder."""
        return Path(self.config.device.state)

    def read(self, path: str) -> str | None:
        """The text of a small file below `root`; None if it cannot be read."""
        return text(self.root / path)
