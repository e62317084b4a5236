"""How far a retraining is: `retrain.json` below the run's folder, and the lock that keeps a second one away.

It says also why and by whom a retraining was begun and approved.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from eyas_host.recipe.pack import VERSION
from eyas_host.recipe.run import NAME
from eyas_host.retrain.outcome import LEVEL, MAX_LOSS, Judged
from eyas_host.support.files import try_flock, write_bytes
from eyas_host.versions.record import RegistryError
from eyas_host.versions.registry import Registry

EPOCHS = 8
"""Of the teacher and of the student: few, from trained weights."""
STATE = "retrain.json"
BEGAN, KEPT_OUT = "retraining began", "retraining kept out"
"""What the registry's log says of a retraining that is not registered (yet)."""
Stage = Literal["training", "judging", "registering", "registered", "kept out"]
ENDED: tuple[Stage, ...] = ("registered", "kept out")


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


def write_state(root: Path, state: Retraining) -> None:
    """Write `retrain.json` of a run."""
    write_bytes(root / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")


def next_version(version: str) -> str:
    """The version after this one: its second number is raised. Raises `RegistryError` for what is no version."""
    require_version(version)
    major, minor, *_ = version.split(".")
    return f"{major}.{int(minor) + 1}.0"


def require_version(version: str) -> None:
    """Raise `RegistryError` for what is no version, or none that the registry takes, before anything is trained."""
    if re.match(VERSION, version, re.ASCII) is None or re.fullmatch(NAME, version) is None:
        raise RegistryError(
            f"{version!r}: a version is three numbers like 1.2.0, or has more behind a hyphen: 1.2.0-b1"
        )
