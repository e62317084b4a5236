"""From the version that serves to the next one: derive its recipe, train, judge, and register what is better.

`retrain.json` below the run's folder says how far it is. A killed retraining goes on when it is asked for again: the
stages resume by themselves, and nothing is registered or named before the judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from eyas_host.bundle.pack import LINEAGE_SPLIT
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import SplitManifest, load_manifest
from eyas_host.pipeline.runner import RunContext, run_chain
from eyas_host.recipe.data import Source
from eyas_host.retrain.derive import PARENT, derive, fit_heads
from eyas_host.retrain.judge import Judged, judge
from eyas_host.stages.chain import STAGES
from eyas_host.stages.plan import show_plan
from eyas_host.support.files import write_bytes
from eyas_host.versions.collect import read_run
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import CHALLENGER, CHAMPION, Registry

STATE = "retrain.json"
Stage = Literal["training", "judging", "registered", "kept out"]


class Retraining(msgspec.Struct, frozen=True, kw_only=True):
    """How far a retraining is, and how it ended."""

    parent: str
    version: str
    """`MODEL@VERSION` of the next version."""
    stage: Stage
    began: float
    """Seconds since 1970."""
    judged: Judged | None = None


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
    *,
    runs: Path,
    version: str,
    epochs: int,
    max_loss: float,
    promote: bool,
    new_class: bool,
    now: Callable[[], float],
    say: Callable[[str], None],
) -> Retraining:
    """Train, judge and register the next version; one that is worse is kept out.

    Args:
        registry: Where versions are kept.
        parent: The version to go on from.
        sources: New labelled images.
        runs: Folder of runs; this one is `MODEL-VERSION`.
        version: The next version.
        epochs: Of the trainings, at most.
        max_loss: Balanced accuracy that may be lost on the old test images.
        new_class: Whether the new images may have labels that the parent does not know.
        promote: Whether it takes the champion's place at once, if it is better.
        now: The time, seconds since 1970.
        say: Receives a line for each step.

    Raises:
        RegistryError: the version is registered already, or the folder is of another retraining.
        EyasError: of the stages; nothing is registered then, and the same command goes on.

    """
    root = runs / f"{parent.model}-{version}"
    state = read_state(root)
    name = f"{parent.model}@{version}"
    if any(one.version == version for one in registry.versions(parent.model)):
        raise RegistryError(f"{name}: is registered already; name another one with --version")
    if state is not None and (state.parent, state.version) != (parent.name, name):
        raise RegistryError(f"{root}: of {state.version}, which follows {state.parent}; name another --version")
    if state is None and root.exists():
        raise RegistryError(f"{root}: is there already, and no retraining; name another --version")
    state = state or Retraining(parent=parent.name, version=name, stage="training", began=now())
    if state.stage == "kept out":
        say(f"{name} was kept out; with other images or settings, name another --version or remove {root}")
        return state
    _note(root, state)
    recipe = derive(registry, parent, root, sources, version=version, epochs=epochs)
    run_chain(STAGES, RunContext(recipe, root), until="split")
    labels = load_manifest(root / SPLIT_MANIFEST).labels
    if unknown := [label for label in labels if label not in parent.labels]:
        if not new_class:
            raise RegistryError(
                f"{', '.join(unknown)}: none of the classes of {parent.name}; --new-class teaches it, else correct the "
                "labels"
            )
        say(f"{name} learns {', '.join(unknown)}")
    if labels != parent.labels:
        fit_heads(root, parent.labels, labels)
    run_chain(STAGES, RunContext(recipe, root), plan=show_plan)
    _note(root, state := msgspec.structs.replace(state, stage="judging"))
    bundle = root / PARENT / "bundle"
    if not bundle.exists():
        registry.bundle(parent, bundle)
    split = msgspec.json.decode(registry.open_file(parent, str(LINEAGE_SPLIT)) or b"{}", type=SplitManifest)
    judged = judge(root, bundle, split, max_loss=max_loss)
    for line in judged.describe():
        say(line)
    if not judged.better:
        for problem in judged.problems:
            say(f"kept out: {problem}")
        _note(root, state := msgspec.structs.replace(state, stage="kept out", judged=judged))
        return state
    record = read_run(root, now=now(), by=registry.by, note=f"retrained from {parent.name}", parent=parent.version)
    registry.add(record, root)
    registry.set_alias(CHAMPION if promote else CHALLENGER, record)
    _note(root, state := msgspec.structs.replace(state, stage="registered", judged=judged))
    return state


def _note(root: Path, state: Retraining) -> None:
    write_bytes(root / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
