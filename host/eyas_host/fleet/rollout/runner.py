"""Carry rollouts out: observe, decide, store, and let the repository and the broker show it; again and again.

The state is stored before anything follows from it, and what follows is computed from the state alone. So a runner that
is killed anywhere goes on where it was: the next one compares what the repository shows with what it should show.
Several runners may run; one acts, by a lock in the store that expires.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol
from uuid import uuid4

import msgspec
from msgspec.structs import replace
from sqlalchemy.exc import SQLAlchemyError

from eyas_device.errors import EyasError, LinkError
from eyas_device.support.names import host_name
from eyas_device.updates.release import Channel
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.rollout.cohorts import due_cohorts
from eyas_host.fleet.rollout.disagreements import EvidenceReader
from eyas_host.fleet.rollout.engine import aborting, decide
from eyas_host.fleet.rollout.hints import Place, publish_hints
from eyas_host.fleet.rollout.observe import devices_of, read_figures
from eyas_host.fleet.rollout.records import Changed, Records
from eyas_host.fleet.rollout.state import ACTIVE, Rollout, Seen, Step, channel_of
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.faults import first_line
from eyas_host.fleet.updates.variants import PublishError

LOCK_S = 120.0
"""How long the lock of a runner holds that is not seen again."""


_MAY_BEGIN = ("running", "waiting", "paused")
"""States of a rollout that still wants its release."""


class Channels(Protocol):
    """What a rollout needs of a signed repository."""

    def channel(self, name: str, model: str, site: str = "") -> Channel | None:
        """The channel's document; None if there is none."""

    def set_channel(self, name: str, channel: Channel, site: str = "") -> None:
        """Sign and publish a channel's document."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn did."""

    acting: bool
    """Whether this runner holds the lock; False: another one does."""
    steps: tuple[tuple[str, Step], ...] = ()
    """Rollout and what happened in it."""
    problems: tuple[str, ...] = ()
    """What will be tried again."""


class Runner:
    """Carries out all rollouts of a store.

    Args:
        store: The store that the collectors fill.
        repository: The repository that the devices look at.
        access: The broker for hints; None: devices poll.
        clock: Seconds since 1970.

    """

    def __init__(
        self,
        store: Store,
        repository: Channels,
        access: BrokerAccess | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._repository, self._access, self._clock = store, repository, access, clock
        self._records = Records(store)
        self._evidence = EvidenceReader(store, clock)
        self._owner = f"{host_name()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._hints: dict[Place, Channel] = {}
        """Hints that the broker has not taken yet."""
        self._started: set[str] = set()
        """Rollouts whose hints were published by this runner: the broker may have lost those of an earlier one."""

    def turn(self) -> Report:
        """Look at every rollout once."""
        if not self._records.acquire(self._owner, self._clock(), LOCK_S):
            return Report(acting=False)
        active = self._records.active()
        records = self._store.devices() if active else []
        steps: list[tuple[str, Step]] = []
        problems: list[str] = []
        for rollout in active:
            devices = devices_of(rollout, records)
            try:
                rollout, remind, happened = self._advance(rollout, devices)
            except Changed:
                continue  # by a person, meanwhile: the next turn reads it again
            steps += [(rollout.id, step) for step in happened]
            try:
                self._apply(rollout, devices, remind)
            except EyasError as error:
                if isinstance(error, PublishError) and rollout.state.status in _MAY_BEGIN:
                    steps += self._give_up(rollout, str(error))
                else:
                    problems.append(f"{rollout.id}: {error}")
        problems += self._send_hints()
        return Report(acting=True, steps=tuple(steps), problems=tuple(problems))

    def close(self) -> None:
        """Give the lock back, so that another runner acts at once."""
        self._records.release(self._owner)

    def _advance(self, rollout: Rollout, devices: Sequence[Seen]) -> tuple[Rollout, Iterable[Place], Sequence[Step]]:
        """Decide and store what was decided."""
        now = self._clock()
        figures = {index: read_figures(self._store, rollout, index) for index in due_cohorts(rollout, now)}
        evidence = self._evidence.read(rollout) if rollout.plan.wants_proof else None
        decision = decide(rollout, devices, now, figures, evidence)
        steps = [replace(step, by=f"engine at {host_name()}") for step in decision.steps]
        if decision.state != rollout.state:
            rollout = self._records.save(replace(rollout, state=decision.state), steps)
        return rollout, decision.remind, steps

    def _apply(self, rollout: Rollout, devices: Sequence[Seen], remind: Iterable[Place]) -> None:
        """Let the repository show what the rollout wants now."""
        wanted = channel_of(rollout)
        shown = self._repository.channel(rollout.channel, rollout.model, rollout.site)
        changes = shown is None or replace(shown, issued=0.0) != wanted
        if changes:
            self._repository.set_channel(rollout.channel, wanted, rollout.site)
        self._records.applied(rollout)
        places: set[Place] = set(remind)
        if changes or (rollout.id not in self._started and rollout.state.status in ACTIVE):
            places |= {(seen.site, seen.group) for seen in devices}
            self._started.add(rollout.id)
        self._hints |= dict.fromkeys(places, replace(wanted, refresh=(), issued=self._clock()))

    def _give_up(self, rollout: Rollout, why: str) -> list[tuple[str, Step]]:
        """Abort a rollout whose release was withdrawn from the repository."""
        decision = aborting(rollout, why, self._clock())
        steps = [replace(step, by=f"engine at {host_name()}") for step in decision.steps]
        with suppress(Changed):
            self._records.save(replace(rollout, state=decision.state), steps)
        return [(rollout.id, step) for step in steps]

    def _send_hints(self) -> list[str]:
        if not self._hints or self._access is None:
            self._hints.clear()
            return []
        try:
            publish_hints(self._access, self._hints)
        except LinkError as error:
            return [f"no hints, devices look at their next poll: {error}"]
        self._hints.clear()
        return []


def run_until_stopped(runner: Runner, every_s: float, on_report: Callable[[Report], None]) -> None:
    """Let a runner take turns until SIGTERM or Ctrl-C; once if `every_s` is 0.

    Trouble of the store, the repository or the disk is reported and the next turn tries again; a single turn raises it.
    """
    stopped = threading.Event()
    before = {kind: signal.signal(kind, lambda *_: stopped.set()) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not stopped.is_set():
            try:
                report = runner.turn()
            except (EyasError, SQLAlchemyError, OSError) as error:
                if not every_s:
                    raise
                text = first_line(error) if isinstance(error, SQLAlchemyError) else str(error)
                report = Report(acting=True, problems=(text,))
            on_report(report)
            if not every_s:
                return
            stopped.wait(every_s)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
