"""Stages: a chain of steps that read files and write files, run only where something changed.

Each stage owns `runs/<name>/<stage>/`. When it ends it writes `stage.json` with the hashes of its inputs and outputs,
its recipe sections, its code and the versions of the libraries it imports, the seed, the time and the machine; a stage
whose `stage.json` still fits is not run again. While it runs, `running.json` says for which fingerprint: a stage that
was killed goes on from its checkpoints, one whose inputs changed since starts afresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
from rich.markup import escape

from eyas_device import __version__
from eyas_device.bundle import sha256
from eyas_device.support.interrupts import resumable
from eyas_host.pipeline import distributed
from eyas_host.pipeline.clock import ChainClock
from eyas_host.pipeline.code import dependencies
from eyas_host.pipeline.lock import RunLock
from eyas_host.pipeline.memory import PeakMemory, give_back_memory
from eyas_host.pipeline.team import WORTH_S, Team, training_processes
from eyas_host.recipe import Recipe
from eyas_host.support.errors import StageError
from eyas_host.support.files import remove_partial_files, sync_files, write_bytes
from eyas_host.support.machine import machine
from eyas_host.support.progress import say, show_clock

RECORD = "stage.json"
RECIPE = "recipe.json"
"""The recipe as it was loaded, below the run's folder."""
SETTINGS = "settings.json"
"""The settings that a command gave besides the recipe's, below the run's folder: `section.key` -> value."""
REPORT = "report.json"
"""What the report stage writes, below the run's folder."""
SENSITIVITY = "sensitivity/sensitivity.json"
"""What `eyas sensitivity` writes, below the run's folder."""
BUNDLE_STAGES = ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack")
"""The stages up to a packed bundle, in order."""
BUNDLE = "bundle"
"""Folder of the bundle, below the run's folder."""
LOCATIONS = "split/locations.json"
"""Where the images lie, below the run's folder."""
IMAGE_TABLE = "split/index.csv"
"""All images for other tools, below the run's folder."""
LINEAGE_RECIPE = Path("pack") / "recipe.json"
LINEAGE_SPLIT = Path("pack") / "split.json"
"""Copies of what the bundle was made from, in the run's folder."""
_RUNNING = "running.json"
_LOCAL = (LOCATIONS, IMAGE_TABLE)
"""Outputs that say where files lie on this machine: no input of later stages, which need not run again for a move."""
_FILE_SETTINGS = ("weights_file", "checkpoint", "table", "keep")
"""Settings that name a file: its content counts (`Stage.sources`), not where it lies."""
_MAX_REASONS = 3
ASKED, NEW = "asked for", "new"
"""Why a stage runs: `--from` or `--only` names it or one before it, or it has not finished yet."""


class Basis(msgspec.Struct, frozen=True):
    """What a stage's result depends on."""

    inputs: dict[str, str]
    """Output of an earlier stage, relative to the run -> sha256."""
    sources: dict[str, str]
    """Other input -> hash."""
    recipe: dict[str, Any]
    """Sections and settings of the recipe that affect the result."""
    seed: int
    device: str
    code: str
    """Hash of Eyas's code that it runs."""
    libraries: dict[str, str]
    """Distribution that this code imports -> version."""

    @property
    def fingerprint(self) -> str:
        """One hash of all of it."""
        basis = {name: getattr(self, name) for name in Basis.__struct_fields__}
        basis["recipe"] = _without_paths(self.recipe)
        return hashlib.sha256(msgspec.json.encode(basis, order="deterministic")).hexdigest()

    def changes_since(self, other: Basis) -> list[str]:
        """What differs, as text: `timm 1.0.20 -> 1.0.31`, `student.epochs 30 -> 31`, `split/manifest.json`."""
        before, now = (
            {"the seed": str(basis.seed), "the device": basis.device, **basis.libraries, **_settings(basis.recipe)}
            for basis in (other, self)
        )
        values = [name for name in {**now, **before} if now.get(name) != before.get(name)]
        files = [{**basis.inputs, **basis.sources, "Eyas's code": basis.code} for basis in (other, self)]
        contents = [name for name in {**files[1], **files[0]} if files[0].get(name) != files[1].get(name)]
        return [f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in values] + contents


class StageRecord(Basis, frozen=True, kw_only=True):
    """`stage.json`."""

    stage: str
    outputs: dict[str, str]
    """File, relative to the run -> sha256."""
    sizes: dict[str, int]
    """File -> bytes."""
    times_ns: dict[str, int]
    """File -> modification time; a file of another time is hashed before it counts as unchanged."""
    code_version: str
    finished: float
    seconds: float
    """Total time, including interrupted attempts."""
    peak_rss_mb: float
    """Largest memory in use by all processes of the run on this machine (`pipeline.memory`)."""
    machines: tuple[dict[str, str], ...]
    """The machines that ran it; more than one if it was interrupted and went on elsewhere."""
    summary: str
    facts: dict[str, Any]
    """Values for later stages and the report."""
    estimated_s: float = 0.0
    """What the plan said; 0 without one."""

    @property
    def content(self) -> dict[str, str]:
        """The outputs that later stages depend on."""
        return {name: digest for name, digest in self.outputs.items() if name not in _LOCAL}


class _Running(msgspec.Struct, frozen=True):
    fingerprint: str
    seconds: float = 0.0
    machines: tuple[dict[str, str], ...] = ()


def read_stage_record(folder: Path) -> StageRecord | None:
    """`stage.json` of the finished stage in `folder`, or None."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=StageRecord)
    except (OSError, msgspec.DecodeError):
        return None


class RunContext:
    """A run: its recipe, its folder, and the records of finished stages.

    `settings` were given besides the recipe's and are remembered with the run: `section.key` -> value.
    """

    def __init__(self, recipe: Recipe, root: Path, settings: Mapping[str, str] | None = None) -> None:
        self.recipe = recipe
        self.root = root
        self.settings = dict(settings or {})

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
    module: str = ""
    """The module whose code and libraries, and those that it imports, affect the result."""
    sources: Callable[[RunContext], dict[str, str]] | None = None
    """Cheap hashes of other inputs, by name: the images, weight files, records of earlier stages."""
    places: tuple[str, ...] = ()
    """Files and folders of the run that it writes besides its own folder."""
    together: bool = False
    """Whether all processes of the job run it; otherwise only the main one does."""


class Due(NamedTuple):
    """A stage that a command is about."""

    name: str
    reasons: tuple[str, ...]
    """Why it will run; empty if it is up to date."""
    record: StageRecord | None
    """Its last record, whose results are cleared if it runs."""
    spent: float = 0.0
    """Seconds of an interrupted attempt, which goes on where it stopped."""
    together: bool = False
    """Whether all processes of the job run it."""


Planner = Callable[[RunContext, Sequence[Due]], ChainClock | None]
"""Shows what will run, and returns a clock if that takes long enough for one."""


def run_chain(
    stages: Sequence[Stage],
    context: RunContext,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
    plan: Planner | None = None,
) -> None:
    """Run the stages that need it, in order; see `prepared_run`."""
    with prepared_run(stages, context, start=start, only=only, until=until, plan=plan):
        pass


@contextlib.contextmanager
def prepared_run(
    stages: Sequence[Stage],
    context: RunContext,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
    shared: bool = False,
    plan: Planner | None = None,
) -> Iterator[None]:
    """Run the stages that need it, in order, and keep the run locked while the block uses them.

    `start` runs that stage and all behind it rerun, `only` just that one rerun, `until` ends the chain with that one;
    `plan` shows beforehand what will run.
    A `shared` block only reads, beside others of the kind. Of several processes the main one decides, writes the
    records and holds the folder; the others do not return. Raises `StageError` if another command is in the way or an
    earlier stage is missing for `only`.
    """
    distributed.join(context.recipe.run.device)
    if not distributed.is_main():
        follow(stages, context)
    chosen = _chosen(stages, only=only, until=until)
    with RunLock(context.root) as lock:
        if lock.acquire():
            remove_partial_files(context.root)
            write_bytes(context.root / RECIPE, msgspec.json.format(msgspec.json.encode(context.recipe), indent=1))
            if not shared:
                write_bytes(context.root / SETTINGS, msgspec.json.format(msgspec.json.encode(context.settings)))
            due = due_stages(stages, context, start=start, only=only, until=until) if plan is not None else ()
            clock = plan(context, due) if plan is not None else None
            with (
                show_clock(clock) if clock is not None else contextlib.nullcontext(),
                Team(_processes(context, due, clock), context.root) as team,
            ):
                if any(one.together and one.reasons for one in due):
                    team.start()
                rerun = False
                for stage in chosen:
                    rerun = rerun or stage.name in (start, only)
                    _run_stage(stage, context, rerun=rerun, clock=clock or ChainClock({}), team=team)
        elif not shared:
            raise lock.busy()
        else:
            lock.require(shared=True)
            if stale := [stage.name for stage in chosen if not up_to_date(stage, context)]:
                raise lock.busy(f", and {', '.join(stale)} must run first")
        distributed.from_main("")
        distributed.leave()
        if shared:
            lock.require(shared=True)
        yield


def _processes(context: RunContext, due: Sequence[Due], clock: ChainClock | None) -> int:
    """Processes that train together, this one included; a launcher has started its own."""
    if distributed.world_size() > 1:
        return 1
    if context.recipe.run.processes == "auto":
        seconds = sum(clock.estimated(one.name) for one in due if one.reasons and one.together) if clock else 0.0
        if seconds < WORTH_S:
            return 1
    return training_processes(context.recipe)


def _chosen(stages: Sequence[Stage], *, only: str | None, until: str | None) -> list[Stage]:
    """The stages that a command is about."""
    names = [stage.name for stage in stages]
    if only is not None:
        return [stage for stage in stages if stage.name == only]
    return list(stages[: names.index(until) + 1] if until in names else stages)


def follow(stages: Sequence[Stage], context: RunContext) -> NoReturn:
    """Run the stages that the main process announces, then exit.

    If the main process fails, the launcher, or `team.Team`, ends this one.
    """
    work = {stage.name: stage.run for stage in stages}
    while name := distributed.from_main(""):
        work[name](context)
    distributed.leave()
    sys.exit(0)


def due_stages(
    stages: Sequence[Stage],
    context: RunContext,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
) -> list[Due]:
    """The stages of a command, and why each will run. One may turn out unchanged after all behind another that runs."""
    found: list[Due] = []
    for stage in _chosen(stages, only=only, until=until):
        record, before = context.record(stage.name), next((due.name for due in found if due.reasons), "")
        if stage.name in (start, only) or (start is not None and any(due.name == start for due in found)):
            reasons: tuple[str, ...] = (ASKED,)
        elif record is None:
            reasons = (NEW,)
        else:
            reasons = tuple(_reasons(stage, context, _basis(stage, context)))
            if not reasons and any(due.reasons and due.name in stage.needs for due in found):
                reasons = (f"after {before}",)
        spent = _spent(stage, context) if reasons and reasons != (ASKED,) else 0.0
        found.append(Due(stage.name, reasons, record, spent, stage.together))
    return found


def up_to_date(stage: Stage, context: RunContext) -> bool:
    """Whether the stage's record fits the recipe, its inputs, the code and the files on disk."""
    return not _reasons(stage, context, _basis(stage, context))


def _run_stage(stage: Stage, context: RunContext, *, rerun: bool, clock: ChainClock, team: Team) -> None:
    basis, record = _basis(stage, context), context.record(stage.name)
    if not rerun and record is not None:
        reasons = _reasons(stage, context, basis)
        if not reasons:
            _keep_times(context, record)
            say(f"[dim]{stage.name:8} unchanged    {escape(record.summary)}[/dim]")
            return
        more = f" and {len(reasons) - _MAX_REASONS} more" if len(reasons) > _MAX_REASONS else ""
        say(f"[dim]{stage.name:8} runs again   {escape(', '.join(reasons[:_MAX_REASONS]))}{more} changed[/dim]")
    missing = [name for name in stage.needs if context.record(name) is None]
    if missing:
        raise StageError(f"{context.root}: stage {stage.name!r} needs {', '.join(missing)} first; run without --only")
    folder = context.folder(stage.name)
    attempt = _resume_or_clear(folder, basis.fingerprint, rerun=rerun)
    started = time.monotonic()
    give_back_memory()
    if not stage.together:
        team.dismiss()
    clock.enter(stage.name)
    try:
        with (
            PeakMemory() as memory,
            resumable(f"stage {stage.name!r} goes on where it was when the same command is run again"),
            team.together() if stage.together else distributed.single_process(),
        ):
            if stage.together:
                distributed.from_main(stage.name)
            outcome = stage.run(context)
    finally:
        clock.leave()
        seconds = attempt.seconds + time.monotonic() - started
        if folder.exists():
            write_bytes(folder / _RUNNING, msgspec.json.encode(msgspec.structs.replace(attempt, seconds=seconds)))
    names = {str(path.relative_to(context.root)): path for path in _outputs(stage, context)}
    sync_files(names.values(), context.root)
    record = StageRecord(
        **msgspec.structs.asdict(basis),
        stage=stage.name,
        outputs={name: sha256(path) for name, path in names.items()},
        sizes={name: path.stat().st_size for name, path in names.items()},
        times_ns={name: path.stat().st_mtime_ns for name, path in names.items()},
        code_version=__version__,
        finished=time.time(),
        seconds=seconds,
        peak_rss_mb=memory.mb,
        machines=attempt.machines,
        summary=outcome.summary,
        facts=outcome.facts,
        estimated_s=clock.estimated(stage.name),
    )
    _write_record(context, record)
    (folder / _RUNNING).unlink()
    say(f"[bold]{stage.name:8}[/bold] {_duration(seconds):>10}   {escape(outcome.summary)}")


def _outputs(stage: Stage, context: RunContext) -> Iterator[Path]:
    """Files that the stage wrote: those of its folder and of `places`."""
    for place in (context.folder(stage.name), *(context.root / name for name in stage.places)):
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        yield from (path for path in found if path.name not in (RECORD, _RUNNING))


def _spent(stage: Stage, context: RunContext) -> float:
    running = _read_attempt(context.folder(stage.name))
    return running.seconds if running and running.fingerprint == _basis(stage, context).fingerprint else 0.0


def _read_attempt(folder: Path) -> _Running | None:
    try:
        return msgspec.json.decode((folder / _RUNNING).read_bytes(), type=_Running)
    except (OSError, msgspec.DecodeError):
        return None


def _resume_or_clear(folder: Path, fingerprint: str, *, rerun: bool) -> _Running:
    """The interrupted attempt to resume, with this machine; otherwise clears the stage's folder for a first one."""
    running = _read_attempt(folder)
    if rerun or running is None or running.fingerprint != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        running = _Running(fingerprint)
    others = tuple(other for other in running.machines if other != machine())
    running = msgspec.structs.replace(running, machines=(*others, machine()))
    write_bytes(folder / _RUNNING, msgspec.json.encode(running))
    remove_partial_files(folder)
    return running


def _basis(stage: Stage, context: RunContext) -> Basis:
    code, libraries = dependencies(stage.module) if stage.module else (__version__, {})
    records = [record for name in stage.needs if (record := context.record(name)) is not None]
    return Basis(
        inputs={name: _digest(context.root, record, name) for record in records for name in record.content},
        sources=stage.sources(context) if stage.sources else {},
        recipe={name: msgspec.to_builtins(attrgetter(name)(context.recipe)) for name in stage.sections},
        seed=context.recipe.run.seed,
        device=context.recipe.run.device,
        code=code,
        libraries=libraries,
    )


def _reasons(stage: Stage, context: RunContext, basis: Basis) -> list[str]:
    """What has changed since the stage finished, its own outputs included; empty if it need not run."""
    record = context.record(stage.name)
    if record is None:
        return ["it has not finished"]
    outputs = [name for name, digest in record.outputs.items() if _digest(context.root, record, name) != digest]
    return ([] if basis.fingerprint == record.fingerprint else basis.changes_since(record)) + outputs


def _digest(root: Path, record: StageRecord, name: str) -> str:
    """sha256 of a stage's output as it is now, empty if it is missing; read only if size or time differ."""
    try:
        info = (root / name).stat()
        same = (info.st_size, info.st_mtime_ns) == (record.sizes[name], record.times_ns[name])
        return record.outputs[name] if same else sha256(root / name)
    except OSError:
        return ""


def _keep_times(context: RunContext, record: StageRecord) -> None:
    """Store the files' new times (of a run that was copied), so that they are not hashed at each command."""
    times = {name: (context.root / name).stat().st_mtime_ns for name in record.outputs}
    if times != record.times_ns:
        _write_record(context, msgspec.structs.replace(record, times_ns=times))


def _write_record(context: RunContext, record: StageRecord) -> None:
    write_bytes(context.folder(record.stage) / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=1))


def _settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    """`section.key` -> value as text, without paths."""
    texts: dict[str, str] = {}
    for name, value in _without_paths(recipe).items():
        keys = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        texts |= {key: msgspec.json.encode(item).decode() for key, item in keys.items()}
    return texts


def _without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every file's path replaced by whether there is one."""
    return {
        name: bool(value)
        if name.rpartition(".")[2] in _FILE_SETTINGS
        else _without_paths(value)
        if isinstance(value, dict)
        else value
        for name, value in recipe.items()
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
