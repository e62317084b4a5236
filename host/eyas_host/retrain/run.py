"""From the version that serves to the next one: derive its recipe, train, judge, and register what may be tried.

`retrain.json` below the run's folder says how far it is, and why and by whom it was begun and approved; the
registry's log has a line when it begins and when it is kept out. A killed retraining goes on when it is asked for
again: the stages resume by themselves, and nothing is registered or named before the judgement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import SplitManifest, load_manifest
from eyas_host.pipeline.runner import LINEAGE_SPLIT, RunContext, run_chain
from eyas_host.recipe.data import Source
from eyas_host.retrain.derive import PARENT, derive, fit_heads
from eyas_host.retrain.judge import judge
from eyas_host.retrain.outcome import BETTER
from eyas_host.retrain.state import (
    BEGAN,
    ENDED,
    KEPT_OUT,
    STATE,
    Reason,
    Retraining,
    Terms,
    read_state,
    require_version,
    write_state,
)
from eyas_host.stages.chain import STAGES
from eyas_host.stages.plan import show_plan
from eyas_host.versions.collect import read_run
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import CHALLENGER, CHAMPION, Registry


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
        RegistryError: the version is none, or is registered already, or the folder is of another retraining, or of one
            that drift began, and no `reason` is given.
        EyasError: of the stages; nothing is registered then, and the same command goes on.

    """
    require_version(version)
    root, name = runs / f"{parent.model}-{version}", f"{parent.model}@{version}"
    state = read_state(root)
    if state is not None and (state.parent, state.version) != (parent.name, name):
        raise RegistryError(f"{root}: of {state.version}, which follows {state.parent}; name another --version")
    if state is not None and state.stage not in ENDED and state.reason.alarms and reason is None:
        raise RegistryError(
            f"{name}: drift began it ({state.reason.describe()}), and it goes on with its own images: eyas retrain "
            "--due; name another --version for these"
        )
    if state is not None and state.reason.approved_by:
        terms = state.terms
    if state is not None and state.stage == "registering":
        return _register(registry, parent, root, state, terms, now, say)
    if any(one.version == version for one in registry.versions(parent.model)):
        raise RegistryError(f"{name}: is registered already; name another one with --version")
    if state is None and root.exists() and not _is_begun(root):
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
    write_state(root, state := replace(state, stage="training"))
    _train(registry, parent, sources, terms, root, version, say)
    write_state(root, state := replace(state, stage="judging"))
    bundle = root / PARENT / "bundle"
    if not bundle.exists():
        registry.bundle(parent, bundle)
    split = msgspec.json.decode(registry.open_file(parent, str(LINEAGE_SPLIT)) or b"{}", type=SplitManifest)
    judged = judge(root, bundle, split, level=terms.level, max_loss=terms.max_loss, strict=terms.strict)
    for line in judged.describe():
        say(line)
    if judged.passes:
        write_state(root, state := replace(state, stage="registering", judged=judged))
        return _register(registry, parent, root, state, terms, now, say)
    for problem in judged.problems:
        say(f"kept out: {problem}")
    registry.note(KEPT_OUT, parent.model, version, "; ".join(judged.problems))
    write_state(root, state := replace(state, stage="kept out", judged=judged, ended=now()))
    return state


def _is_begun(root: Path) -> bool:
    """Whether a retraining that was killed before its first `retrain.json` made this folder: nothing else is in it."""
    return root.is_dir() and all(re.fullmatch(rf"\.{re.escape(STATE)}\..*\.part", path.name) for path in root.iterdir())


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
    write_state(root, state := replace(state, stage="registered", alias=alias, ended=now()))
    return state
