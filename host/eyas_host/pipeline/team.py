"""Training processes that a command starts by itself: small networks train faster in several than with more threads.

The main process starts companions (`eyas_host.stages.companion`), which train along in the stages that run together, as
if a launcher had started them, and end after the last of these stages, with an error, or with the main process. They
meet in a folder of this machine and talk over loopback and Unix sockets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from eyas_device.board.limits import usable_cores, usable_memory
from eyas_device.errors import EXIT_USER_ERROR
from eyas_host.pipeline import distributed
from eyas_host.recipe import Recipe
from eyas_host.support.errors import StageError

COMPANION = "eyas_host.stages.companion"
WORTH_S = 60.0
"""Estimated seconds of training from which companions are worth their start."""
_MAX_PROCESSES = 4
_PROCESS_BYTES = 2e9
_SHARD = 16
"""Fewest images of a batch that are worth a process."""
_END_S, _LOOK_S = 20.0, 0.05
_LONGEST, _SHORT = 70, "/tmp"


def training_processes(recipe: Recipe) -> int:
    """Processes that train together: `[run] processes`; for `auto` what cores, memory and batch allow, 1 on a GPU.

    Raises `StageError` if several are asked for on a GPU.
    """
    import torch

    asked = recipe.run.processes
    on_gpu = recipe.run.device != "cpu" and torch.cuda.is_available()
    if asked != "auto":
        if on_gpu and asked > 1:
            raise StageError(
                f"[run] processes = {asked}: they share the batches on a processor, and this trains on a GPU; set "
                '[run] device = "cpu", or start one a GPU by torchrun'
            )
        return asked
    if on_gpu or recipe.image.size > distributed.SINGLE_THREAD_SIZE or recipe.run.threads > 1:
        return 1
    fitting = min(usable_cores(), int(usable_memory() / _PROCESS_BYTES), recipe.student.batch // _SHARD)
    return max(1, min(fitting, _MAX_PROCESSES))


class Team:
    """The processes of one training; a context manager that ends those that it started."""

    def __init__(self, count: int, root: Path) -> None:
        self.count, self.root = count, root
        self._companions: list[subprocess.Popen[bytes]] = []
        self._errors: list[IO[bytes]] = []
        self._joined = False
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.dismiss()
        self._end()

    def start(self) -> None:
        """Start the companions, which import what they need meanwhile."""
        if self.count == 1 or self._companions:
            return
        self._place = tempfile.TemporaryDirectory(prefix="eyas-team-", dir=_short_folder())
        for rank in range(1, self.count):
            command = [sys.executable, "-m", COMPANION, str(self.root), str(rank), str(self.count), str(self._folder)]
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
            self._errors.append(errors)
            self._companions.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Train with the companions while the block runs. Raises `StageError` if one of them ends meanwhile."""
        try:
            self.start()
            if self._companions and not self._joined:
                self._wait_until_ready()
                distributed.join_team(0, self.count, self._folder)
                self._joined = True
            yield
        except RuntimeError:
            if reason := self._why_one_ended():
                raise StageError(reason) from None
            raise

    def dismiss(self) -> None:
        """Let companions go that have trained along."""
        if self._joined:
            distributed.from_main("")
            for companion in self._companions:
                with suppress(subprocess.TimeoutExpired):
                    companion.wait(_END_S)
            self._end()

    @property
    def _folder(self) -> Path:
        """Where they meet."""
        assert self._place is not None
        return Path(self._place.name)

    def _wait_until_ready(self) -> None:
        """Wait until all companions are about to join: who joins waits for them, for ever if one has ended."""
        ready = False
        while not ready:
            ready = all(ready_file(self._folder, rank).exists() for rank in range(1, self.count))
            if any(companion.poll() is not None for companion in self._companions):
                raise StageError(self._why_one_ended())
            time.sleep(0 if ready else _LOOK_S)

    def _why_one_ended(self) -> str:
        """What a companion said last that has ended; empty if all go on."""
        for companion, errors in zip(self._companions, self._errors, strict=True):
            with suppress(subprocess.TimeoutExpired):
                companion.wait(2.0)
            if companion.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                text = f"a training process ended ({lines[-1] if lines else 'killed: too little memory?'})"
                if companion.returncode == EXIT_USER_ERROR:
                    return text
                return f"{text}; [run] processes = {self.count - 1} needs less memory"
        return ""

    def _end(self) -> None:
        for companion in self._companions:
            if companion.poll() is None:
                companion.kill()
            companion.wait()
            if companion.stdin is not None:
                companion.stdin.close()
        for errors in self._errors:
            errors.close()
        self._companions, self._errors = [], []
        if self._joined:
            self._joined = False
            distributed.leave()
        if self._place is not None:
            self._place.cleanup()
            self._place = None


def _short_folder() -> str:
    """A folder for temporary files; a socket's path may have 100 characters, which some TMPDIR exceeds."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST or not os.access(_SHORT, os.W_OK) else _SHORT


def ready_file(folder: Path, rank: int) -> Path:
    """What a companion writes when it is about to join."""
    return folder / f"ready-{rank}"


def arguments(values: Sequence[str]) -> tuple[Path, int, int, Path]:
    """Root of the run, rank, number of processes and the folder where they meet, of a companion's command line."""
    root, rank, count, folder = values
    return Path(root), int(rank), int(count), Path(folder)
