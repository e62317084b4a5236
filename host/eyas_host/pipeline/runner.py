"""Stages: a chain of steps that read files and write files, run only where something changed.

Each stage owns `runs/<name>/<stage>/`. When it ends it writes `stage.json` with the hashes of its inputs and outputs,
its recipe sections, the code's version, the seed and the time; a stage whose `stage.json` still fits is not run again.
While it runs, `running.json` says for which fingerprint: a stage that was killed goes on from its checkpoints, one
whose inputs changed since starts afresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from eyas_device import __version__
from eyas_device.bundle import sha256
from eyas_host.pipeline import distributed
from eyas_host.recipe import Recipe
from eyas_host.support.errors import StageError
from eyas_host.support.files import remove_partial_files, sync_files, write_bytes
from eyas_host.support.progress import say

RECORD = "stage.json"
RECIPE = "recipe.json"
"""The recipe as it was loaded, below the run's folder."""
REPORT = "report.json"
"""What the report stage writes, below the run's folder."""
BUNDLE_STAGES = ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack")
"""The stages up to a packed bundle, in order."""
BUNDLE = "bundle"
"""Folder of the bundle, below the run's folder."""
_RUNNING = "running.json"


class StageRecord(msgspec.Struct, frozen=True):
    """`stage.json`."""

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    """File, relative to the run -> sha256."""
    outputs: dict[str, str]
    sizes: dict[str, int]
    recipe: dict[str, Any]
    code_version: str
    seed: int
    finished: float
    seconds: float
    """Total time, including interrupted attempts."""
    peak_rss_mb: float
    summary: str
    facts: dict[str, Any]
    """Values for later stages and the report."""


class _Running(msgspec.Struct, frozen=True):
    fingerprint: str
    seconds: float = 0.0


def read_stage_record(folder: Path) -> StageRecord | None:
    """`stage.json` of the finished stage in `folder`, or None."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=StageRecord)
    except (OSError, msgspec.DecodeError):
        return None


class RunContext:
    """A run: its recipe, its folder, and the records of finished stages."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self.recipe = recipe
        self.root = root

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.root / stage

    def record(self, stage: str) -> StageRecord | None:
        """`stage.json` of a finished stage, or None."""
        return read_stage_record(self.folder(stage))


class StageResult(msgspec.Struct, frozen=True):
    """Result of a stage: a one-line summary, and facts for later stages."""

    summary: str
    facts: dict[str, Any] = {}


class Stage(msgspec.Struct, frozen=True):
    """One step of the chain."""

    name: str
    sections: tuple[str, ...]
    """Sections of the recipe, or single settings (`gate.max_drop`), that affect its result."""
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""
    run: Callable[[RunContext], StageResult]
    source: Callable[[Recipe], str] | None = None
    """A cheap hash of inputs outside the run (the images)."""
    places: tuple[str, ...] = ()
    """Files and folders of the run that it writes besides its own folder."""
    together: bool = False
    """Whether all processes of the job run it; otherwise only the main one does."""


def run_chain(
    stages: Sequence[Stage],
    context: RunContext,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
) -> None:
    """Run the stages that need it, in order.

    `start` runs that stage and all behind it rerun, `only` just that one rerun, `until` ends the chain with that one.
    Of several processes the main one decides, writes the records and holds the folder; the others do not return.
    Raises `StageError` if another run holds the folder or an earlier stage is missing for `only`.
    """
    distributed.join(context.recipe.run.device)
    if not distributed.is_main():
        _follow(stages, context)
    context.root.mkdir(parents=True, exist_ok=True)
    with _lock(context.root):
        remove_partial_files(context.root)
        write_bytes(context.root / RECIPE, msgspec.json.format(msgspec.json.encode(context.recipe), indent=1))
        rerun = False
        for stage in stages:
            rerun = rerun or stage.name == start or stage.name == only
            if only is None or stage.name == only:
                _run_stage(stage, context, rerun=rerun)
            if stage.name in (only, until):
                break
    distributed.from_main("")
    distributed.leave()


def _follow(stages: Sequence[Stage], context: RunContext) -> NoReturn:
    """Run the stages that the main process announces, then exit.

    If the main process fails, the launcher ends this one.
    """
    work = {stage.name: stage.run for stage in stages}
    while name := distributed.from_main(""):
        work[name](context)
    distributed.leave()
    sys.exit(0)


def up_to_date(stage: Stage, context: RunContext) -> bool:
    """Whether the stage's record fits the recipe, its inputs and the files on disk."""
    record = context.record(stage.name)
    if record is None or record.fingerprint != _fingerprint(stage, context):
        return False
    return all(_size(context.root / path) == size for path, size in record.sizes.items())


def _run_stage(stage: Stage, context: RunContext, *, rerun: bool) -> None:
    if not rerun and up_to_date(stage, context):
        record = context.record(stage.name)
        say(f"[dim]{stage.name:8} unchanged    {record.summary if record else ''}[/dim]")
        return
    missing = [name for name in stage.needs if context.record(name) is None]
    if missing:
        raise StageError(f"{context.root}: stage {stage.name!r} needs {', '.join(missing)} first; run without --only")
    folder = context.folder(stage.name)
    fingerprint = _fingerprint(stage, context)
    spent = _resume_or_clear(folder, fingerprint, rerun=rerun)
    started = time.monotonic()
    _reset_peak_rss()
    if stage.together:
        distributed.from_main(stage.name)
    try:
        with contextlib.nullcontext() if stage.together else distributed.single_process():
            outcome = stage.run(context)
    finally:
        seconds = spent + time.monotonic() - started
        if folder.exists():
            write_bytes(folder / _RUNNING, msgspec.json.encode(_Running(fingerprint, seconds)))
    names = {str(path.relative_to(context.root)): path for path in _outputs(stage, context)}
    sync_files(names.values(), context.root)
    record = StageRecord(
        stage=stage.name,
        fingerprint=fingerprint,
        inputs=_inputs(stage, context),
        outputs={name: sha256(path) for name, path in names.items()},
        sizes={name: path.stat().st_size for name, path in names.items()},
        recipe=_recipe_part(stage, context.recipe),
        code_version=__version__,
        seed=context.recipe.run.seed,
        finished=time.time(),
        seconds=seconds,
        peak_rss_mb=_peak_rss_mb(),
        summary=outcome.summary,
        facts=outcome.facts,
    )
    write_bytes(folder / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=1))
    (folder / _RUNNING).unlink()
    say(f"[bold]{stage.name:8}[/bold] {_duration(seconds):>10}   {outcome.summary}")


def _outputs(stage: Stage, context: RunContext) -> Iterator[Path]:
    """Files that the stage wrote: those of its folder and of `places`."""
    for place in (context.folder(stage.name), *(context.root / name for name in stage.places)):
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        yield from (path for path in found if path.name not in (RECORD, _RUNNING))


def _resume_or_clear(folder: Path, fingerprint: str, *, rerun: bool) -> float:
    """Elapsed time of an interrupted run to resume; otherwise clears the stage's folder."""
    try:
        running = msgspec.json.decode((folder / _RUNNING).read_bytes(), type=_Running)
    except (OSError, msgspec.DecodeError):
        running = None
    if rerun or running is None or running.fingerprint != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        running = _Running(fingerprint)
        write_bytes(folder / _RUNNING, msgspec.json.encode(running))
    remove_partial_files(folder)
    return running.seconds


def _fingerprint(stage: Stage, context: RunContext) -> str:
    content = {
        "stage": stage.name,
        "code": __version__,
        "seed": context.recipe.run.seed,
        "device": context.recipe.run.device,
        "recipe": _recipe_part(stage, context.recipe),
        "inputs": _inputs(stage, context),
        "source": stage.source(context.recipe) if stage.source else "",
    }
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def _inputs(stage: Stage, context: RunContext) -> dict[str, str]:
    records = [record for name in stage.needs if (record := context.record(name)) is not None]
    return {path: digest for record in records for path, digest in record.outputs.items()}


def _recipe_part(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    return {name: msgspec.to_builtins(attrgetter(name)(recipe)) for name in stage.sections}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _reset_peak_rss() -> None:
    """Return freed memory to the system and reset the peak memory, where Linux allows it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_rss_mb() -> float:
    """Peak resident memory of this process since the stage began, plus that of its largest child, MB."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), own)
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Lock the run's folder; the system releases the lock when the process ends."""
    with (root / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(
                f"{root}: another run uses this folder; wait for it or give this one another name"
            ) from None
        yield
