"""State of the device's last updates: what the updaters recorded, and what the agent itself knows of the probation."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from eyas_device.agent.loop import Listener
from eyas_device.config import UpdateSection
from eyas_device.support.redact import redact
from eyas_device.telemetry.messages import Update, UpdateState
from eyas_device.updates.progress import POKE, ROOT_STATE, UPDATES, WAITS, record_path
from eyas_device.updates.records import Verdict

_CHECK_S = 0.5
_MAX_BYTES = 64 << 10
_MAX_REASON = 500
_DIGEST = 12
_STATES: dict[str, UpdateState] = {"running": "probation", "passed": "committed", "failed": "rolled back"}
_WAITING = ("installing", "probation")
"""States in the updater's record that a verdict on the same release replaces, however new they are."""


class UpdateWatch(Listener):
    """Loop listener that notices each change of the update's state; any thread may ask for it."""

    def __init__(
        self,
        state: Path,
        section: UpdateSection,
        verdict: Callable[[], Verdict | None],
        *,
        root_state: Path = ROOT_STATE,
    ) -> None:
        """Read the records of the updaters, of the model in `state` and of the agent in root's `root_state`.

        `verdict` is the agent's own of the probation.
        """
        self.on_change: Callable[[], None] = lambda: None
        """Called in the loop when the state, the release or the reason has changed."""
        self._model, self._root = _Record(record_path(state)), _Record(record_path(root_state))
        self._section, self._verdict = section, verdict
        self._due = 0.0
        self._known: tuple[tuple[str, ...], ...] = ()

    @property
    def update(self) -> Update | None:
        """The last update; None where there was none and none is configured."""
        return merge(self._model.found, self._verdict(), self._section)

    @property
    def agent(self) -> Update | None:
        """The last update of the agent itself; None where there was none."""
        found = self._root.found
        return found and replace(found, reason=redact(found.reason)[:_MAX_REASON])

    def on_tick(self) -> None:
        """Look twice a second."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _CHECK_S
        self._model.look()
        self._root.look()
        updates = (update for update in (self.update, self.agent) if update is not None)
        known = tuple((one.state, one.model, one.digest, one.reason, one.rollout) for one in updates)
        if known != self._known:
            self._known = known
            self.on_change()


class _Record:
    """An updater's record, read when it was replaced."""

    def __init__(self, path: Path) -> None:
        self.found: Update | None = None
        self._path = path
        self._stamp: tuple[int, int] | None = None

    def look(self) -> None:
        if (stamp := _stamp(self._path)) != self._stamp:
            self._stamp, self.found = stamp, _read(self._path)


def merge(recorded: Update | None, verdict: Verdict | None, section: UpdateSection) -> Update | None:
    """The update as the updater recorded it, with the agent's newer verdict on the release that it installed."""
    if recorded is None and verdict is None and not section.url:
        return None
    update = recorded or Update()
    update = replace(update, channel=update.channel or section.channel, group=update.group or section.group)
    update = replace(update, reason=redact(update.reason)[:_MAX_REASON])
    if verdict is None:
        return update
    digest, since = verdict.identity[:_DIGEST], verdict.ended or verdict.started
    same = update.digest == digest
    if update.since > since and not (same and (update.state in _WAITING or verdict.state == "running")):
        return update
    state, reason = _STATES[verdict.state], ""
    if state == "rolled back":
        reason = redact(verdict.reason)[:_MAX_REASON]
    elif same and state == update.state == "probation":
        reason = update.reason.removeprefix(WAITS).removeprefix("; ")  # it has begun: this is the agent
    return replace(
        update
        if same
        else Update(channel=update.channel, group=update.group, checked=update.checked, clock=update.clock),
        state=state,
        model=verdict.model,
        digest=digest,
        reason=reason,
        since=since,
    )


def poke(state: Path) -> None:
    """Let the updater on a state folder look at the repository soon. A disk that fails is ignored: it polls anyway."""
    with suppress(OSError):
        (folder := state / UPDATES).mkdir(exist_ok=True)
        (folder / POKE).touch()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read(path: Path) -> Update | None:
    """The updater's record; None if it is missing or damaged."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as stream:
            return msgspec.json.decode(stream.read(_MAX_BYTES), type=Update)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
