"""From the version that serves to the next one: derive its recipe, train, judge, and register what may be tried.

`retrain.json` below the run's folder says how far it is, and why and by whom it was begun and approved; the
registry's log has a line when it begins and when it is kept out. A killed retraining goes on when it is asked for
again: the stages resume by themselves, and nothing is registered or named before the judgement.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from eyas_host.bundle.pack import LINEAGE_SPLIT
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import SplitManifest, load_manifest
from eyas_host.pipeline.runner import RunContext, run_chain
from eyas_host.recipe.data import Source
from eyas_host.retrain.derive import EPOCHS, PARENT, derive, fit_heads
from eyas_host.retrain.judge import BETTER, LEVEL, MAX_LOSS, Judged, judge
from eyas_host.stages.chain import STAGES
from eyas_host.stages.plan import show_plan
from eyas_host.support.files import try_flock, write_bytes
from eyas_host.versions.collect import read_run
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import CHALLENGER, CHAMPION, Registry

STATE = "retrain.json"
BEGAN, KEPT_OUT = "retraining began", "retraining kept out"
"""What the registry's log says of a retraining that is not registered (yet)."""
Stage = Literal["training", "judging", "registering", "registered", "kept out"]


class AlreadyRunning(RegistryError):  # noqa: N818 - reads as the state it reports
    """Another process retrains the model."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How long it is trained, and when it is registered."""

    epochs: int = EPOCHS
    """Of the teacher's and of the student's training, at most."""
    level: float = LEVEL
    max_loss: float = MAX_LOSS
    """Balanced accuracy that may be lost on the old test images."""
    strict: bool = False
    """Keep out what is not shown to be better."""
    promote: bool = False
    """Whether it takes the champion's place at once, if it is shown to be better."""
    new_class: bool = False
    """Whether the new images may have labels that the parent does not know."""


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a retraining was begun, and who allowed it."""

    why: str = "by hand"
    begun_by: str = ""
    approved_by: str = ""
    """Who approved it; `automatic` where nobody had to; empty where whoever began it chose its images."""
    alarms: tuple[str, ...] = ()
    """Ids of the alarms that called for it."""
    images: tuple[str, ...] = ()
    """sha256 of the new images, where the store chose them."""

    def describe(self) -> str:
        """A sentence for the log."""
        approval = f"; {self.approved_by}" if self.approved_by == AUTOMATIC else f"; approved by {self.approved_by}"
        return self.why + (approval if self.approved_by else "")


AUTOMATIC = "automatic"


class Retraining(msgspec.Struct, frozen=True, kw_only=True):
    """How far a retraining is, and how it ended."""

    parent: str
    version: str
    """`MODEL@VERSION` of the next version."""
    stage: Stage
    began: float
    """Seconds since 1970."""
    champion: str = ""
    """The version that served when it began."""
    terms: Terms = Terms()
    """As it began; one that was approved goes on with them."""
    reason: Reason = Reason()
    judged: Judged | None = None
    alias: str = ""
    """The name that it got."""
    ended: float = 0.0
    """Seconds since 1970; 0 before."""


@contextmanager
def only_one(registry: Registry, model: str) -> Iterator[None]:
    """Keep other processes from retraining a model meanwhile. Raises `AlreadyRunning` if one does."""
    path = registry.folder / f".retrain-{model}.lock"
    with path.open("w", encoding="utf-8") as stream:
        if not try_flock(stream, fcntl.LOCK_EX):
            raise AlreadyRunning(f"{model}: a retraining is running already; wait for it, or end it")
        yield


def read_state(root: Path) -> Retraining | None:
    """`retrain.json` of a run; None without one."""
    try:
        return msgspec.json.decode((root / STATE).read_bytes(), type=Retraining)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise RegistryError(f"{root / STATE}: cannot be read ({error}); remove the run's folder") from None


def retrain(
    registry: Registry,
    parent: VersionRecord,
    sources: Sequence[Source],
    terms: Terms,
    *,
    runs: Path,
    version: str,
    reason: Reason | None = None,
    now: Callable[[], float],
    say: Callable[[str], None],
) -> Retraining:
    """Train, judge and register the next version; one that is worse is kept out. Hold `only_one` meanwhile.

    Args:
        registry: Where versions are kept.
        parent: The version to go on from.
        sources: New labelled images.
        terms: How long it is trained, and when it is registered; one that was approved goes on with its own.
        runs: Folder of runs; this one is `MODEL-VERSION`.
        version: The next version.
        reason: Why it is begun; one that goes on keeps its own.
        now: The time, seconds since 1970.
        say: Receives a line for each step.

    Raises:
        RegistryError: the version is registered already, or the folder is of another retraining.
        EyasError: of the stages; nothing is registered then, and the same command goes on.

    """
    root, name = runs / f"{parent.model}-{version}", f"{parent.model}@{version}"
    state = read_state(root)
    if state is not None and (state.parent, state.version) != (parent.name, name):
        raise RegistryError(f"{root}: of {state.version}, which follows {state.parent}; name another --version")
    if state is not None and state.reason.approved_by:
        terms = state.terms
    if state is not None and state.stage == "registering":
        return _register(registry, parent, root, state, terms, now, say)
    if any(one.version == version for one in registry.versions(parent.model)):
        raise RegistryError(f"{name}: is registered already; name another one with --version")
    if state is None and root.exists():
        raise RegistryError(f"{root}: is there already, and no retraining; name another --version")
    if state is not None and state.stage == "kept out":
        say(f"{name} was kept out; with other images or settings, name another --version or remove {root}")
        return state
    if state is None:
        given = replace(reason or Reason(), begun_by=registry.by)
        serves = registry.aliases().get(parent.model, {}).get(CHAMPION, "")
        state = Retraining(
            parent=parent.name, version=name, stage="training", began=now(), champion=serves, terms=terms, reason=given
        )
        registry.note(BEGAN, parent.model, version, given.describe())
    _note(root, state := replace(state, stage="training"))
    _train(registry, parent, sources, terms, root, version, say)
    _note(root, state := replace(state, stage="judging"))
    bundle = root / PARENT / "bundle"
    if not bundle.exists():
        registry.bundle(parent, bundle)
    split = msgspec.json.decode(registry.open_file(parent, str(LINEAGE_SPLIT)) or b"{}", type=SplitManifest)
    judged = judge(root, bundle, split, level=terms.level, max_loss=terms.max_loss, strict=terms.strict)
    for line in judged.describe():
        say(line)
    if judged.passes:
        _note(root, state := replace(state, stage="registering", judged=judged))
        return _register(registry, parent, root, state, terms, now, say)
    for problem in judged.problems:
        say(f"kept out: {problem}")
    registry.note(KEPT_OUT, parent.model, version, "; ".join(judged.problems))
    _note(root, state := replace(state, stage="kept out", judged=judged, ended=now()))
    return state


def _train(
    registry: Registry,
    parent: VersionRecord,
    sources: Sequence[Source],
    terms: Terms,
    root: Path,
    version: str,
    say: Callable[[str], None],
) -> None:
    """Run the stages, up to the packed bundle and its report."""
    recipe = derive(registry, parent, root, sources, version=version, epochs=terms.epochs)
    run_chain(STAGES, RunContext(recipe, root), until="split")
    labels = load_manifest(root / SPLIT_MANIFEST).labels
    if unknown := [label for label in labels if label not in parent.labels]:
        if not terms.new_class:
            raise RegistryError(
                f"{', '.join(unknown)}: none of the classes of {parent.name}; --new-class teaches it, else correct the "
                "labels"
            )
        say(f"{parent.model}@{version} learns {', '.join(unknown)}")
    if labels != parent.labels:
        fit_heads(root, parent.labels, labels)
    run_chain(STAGES, RunContext(recipe, root), plan=show_plan)


def _register(
    registry: Registry,
    parent: VersionRecord,
    root: Path,
    state: Retraining,
    terms: Terms,
    now: Callable[[], float],
    say: Callable[[str], None],
) -> Retraining:
    """Register and name a version that was judged; what of it was done before a kill is done once."""
    judged = state.judged
    if judged is None or not judged.passes:
        raise RegistryError(f"{root / STATE}: registers what no judgement allows; remove the run's folder")
    alias = CHAMPION if terms.promote else CHALLENGER
    if terms.promote and judged.outcome != BETTER:
        say(f"{state.version} is {judged.outcome}: it becomes the {CHALLENGER}, which a rollout has to prove")
        alias = CHALLENGER
    serves = registry.aliases().get(parent.model, {}).get(CHAMPION, "")
    mine = state.version.rpartition("@")[2]
    if serves not in (state.champion, mine):
        say(f"{parent.model}@{serves} serves by now; {state.version} was compared with {parent.name}")
        alias = CHALLENGER
    note = f"retrained from {parent.name}, {judged.summary}; {state.reason.describe()}"
    record = read_run(root, now=now(), by=registry.by, note=note, parent=parent.version)
    registry.add(record, root)
    registry.set_alias(alias, record)
    _note(root, state := replace(state, stage="registered", alias=alias, ended=now()))
    return state


def _note(root: Path, state: Retraining) -> None:
    write_bytes(root / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
