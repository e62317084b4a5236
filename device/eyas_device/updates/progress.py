"""How far an update is, on the disk before each step of it: what the agent reports, and where the updater goes on.

`STATE/updates/update.json` holds the fields of `Update` in a status message, and beside them what only the updater
needs. A record of another version of the agent is read as far as it goes: fields that are missing have their defaults,
and a state or a type that is not known begins again, with what is in the slots.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from eyas_device.support.files import atomic_write
from eyas_device.support.logs import clean

UPDATES = "updates"
"""Folder of everything about updates, below the device's state."""
RECORD = "update.json"
ROOT_STATE = Path("/var/lib/eyas-agent")
"""Root's own folder, with the record of an update of the agent; the service's user may read it."""
POKE = "poke"
"""File in `UPDATES` that the agent touches when a message asks for a look at the repository."""
SCHEMA = 1
MAX_BARRED = 16
"""Releases whose refusal is remembered."""
_MAX_BYTES = 64 << 10

State = Literal["idle", "downloading", "installing", "probation", "committed", "rolled back", "refused", "failed"]
STATES: tuple[str, ...] = get_args(State)
UNFINISHED: tuple[State, ...] = ("downloading", "installing", "probation")
"""States that a restart finds something to do in."""
WAITS = "begins when the agent starts"
"""Reason of a probation that no agent has begun."""


class Barred(msgspec.Struct, frozen=True, kw_only=True):
    """Why a release is not tried again."""

    key: str = ""
    """What the refusal depends on; with another one the release is tried again."""
    state: State = "refused"
    reason: str = ""


_Record = TypeVar("_Record", bound="UpdateRecord")


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last update of this device's model; the first fields are those of `Update` in a status message."""

    state: State = "idle"
    model: str = ""
    """`name version` of the release."""
    digest: str = ""
    """First 12 hex digits of `identity`."""
    rollout: str = ""
    reason: str = ""
    """Why it waits, was refused, failed or was rolled back, for people."""
    since: float = 0.0
    """When this state began, seconds since 1970 by the device's clock."""
    attempts: int = 0
    """Attempts at this release so far."""
    channel: str = ""
    group: str = ""
    checked: float = 0.0
    """When the repository was last reached and found right, seconds since 1970; 0 if never."""
    clock: str = ""
    """Why expiry cannot be judged; empty if the clock can be trusted."""

    schema: int = SCHEMA
    identity: str = ""
    """`Release.identity`."""
    target: str = ""
    """Path of the release's target."""
    key: str = ""
    """What a refusal of this release depends on."""
    slot: str = ""
    """Slot that it is, or was, on probation in."""
    manifest_sha256: str = ""
    """sha256 of the manifest of the variant that was installed."""
    interrupted: int = 0
    """Installations of this release that did not live to say how they ended."""
    installed: str = ""
    """Identity of the release that was committed last."""
    refreshed: str = ""
    """Rollout for which this device, of its control group, has installed the previous release again."""
    barred: dict[str, Barred] = {}
    """Identity of a release -> why it is not tried again; the newest last."""
    trouble: str = ""
    """Why the last look at the repository failed; empty if it did not."""
    cause: str = ""
    """The same in one word, as in docs/updates.md; empty where none of them fits."""
    wait_s: float = 0.0
    """Time until the maintenance hours that the update waits for, seconds; 0 without."""

    @property
    def unfinished(self) -> bool:
        """Whether an update is under way."""
        return self.state in UNFINISHED

    def entered(self: _Record, state: State, reason: str = "", **changes: Any) -> _Record:
        """The record in a state that begins now; `reason` is made fit for people."""
        reason = clean(" ".join(reason.split()))
        since = self.since if state == self.state and self.since else time.time()
        return msgspec.structs.replace(self, state=state, reason=reason, since=since, wait_s=0.0, **changes)

    def bar(self: _Record, state: State, reason: str) -> _Record:
        """The record in a state in which its release is not tried again."""
        record = self.entered(state, reason, interrupted=0)
        others = {identity: bar for identity, bar in self.barred.items() if identity != self.identity}
        barred = {**others, self.identity: Barred(key=self.key, state=state, reason=record.reason)}
        return msgspec.structs.replace(record, barred=dict(list(barred.items())[-MAX_BARRED:]))


def record_path(state: Path) -> Path:
    """Where the record is, below a device's state folder."""
    return state / UPDATES / RECORD


def read_progress(state: Path) -> UpdateRecord:
    """The record below a device's state folder; a new one where there is none, or one that cannot be read."""
    return read_record_of(state, UpdateRecord)


def read_record_of(state: Path, kind: type[_Record]) -> _Record:
    """As `read_progress`, of another kind of update."""
    path = record_path(state)
    with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if path.is_file():  # a pipe would block
            with path.open("rb") as stream:
                return _migrated(msgspec.json.decode(stream.read(_MAX_BYTES), type=dict[str, Any]), kind)
    return kind()


def write_progress(state: Path, record: UpdateRecord) -> None:
    """Write the record durably. Raises `OSError` if the disk does not take it."""
    path = record_path(state)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    atomic_write(path, msgspec.json.encode(record) + b"\n")


def _migrated(fields: dict[str, Any], kind: type[_Record]) -> _Record:
    """A record of any version, field by field: one that this version cannot use gets its default."""
    usable = {}
    for field in msgspec.structs.fields(kind):
        with suppress(KeyError, msgspec.ValidationError):
            usable[field.name] = msgspec.convert(fields[field.name], field.type)
    return kind(**{**usable, "schema": SCHEMA})
