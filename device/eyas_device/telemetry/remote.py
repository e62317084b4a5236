"""Execution of the host's commands: checked, executed once, always answered.

A command is refused if it is malformed, of a newer schema, unknown, not allowed by the device's configuration, or
expired by the device's clock. Its id is read first, so that a command of which nothing else can be read is answered,
too. For the id of a command that was executed before, the first result is sent again, also after a restart. Handlers
run in threads of their own, so that a slow one stops neither frames nor telemetry: quick ones one after the other, and
one of the `LONG` ones at a time beside them. Each command leaves a line in the log: its id, name, issuer and outcome.
"""

from __future__ import annotations

import logging
import math
import queue
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from eyas_device.config import COMMANDS
from eyas_device.errors import EyasError
from eyas_device.support.clock import is_plausible
from eyas_device.support.closing import Closing
from eyas_device.support.logs import KEEP
from eyas_device.support.redact import redact, redact_tree
from eyas_device.support.supervised import SupervisedThread
from eyas_device.telemetry.arguments import LONG_S, CommandRefused
from eyas_device.telemetry.messages import SCHEMA, Command, Result, decode, encode
from eyas_device.telemetry.spool.spool import Spool

logger = logging.getLogger(__name__)

Handler = Callable[[Command], Mapping[str, Any]]
"""Executes a command and returns the `data` of its result; an `EyasError` or a `ValueError` refuses the command."""

LONG = frozenset(LONG_S)
"""Commands that take minutes; a second one is refused while one waits or runs."""
MAX_AHEAD_S = 86_400.0
"""Longest time to expiry; ids are remembered for that long."""
_MAX_BYTES = 16 << 10
_MAX_DATA = 64 << 10
_MAX_WAITING = 8
_MAX_DETAIL = 500
_MAX_ISSUER = 64
_INTERRUPTED = "interrupted: the agent ended while it was executed"


class _Head(msgspec.Struct, frozen=True):
    """What is read of any command, whatever else it holds."""

    schema: Any = SCHEMA
    id: str = ""
    name: Any = ""


class CommandExecutor(Closing):
    """Takes commands from the network, executes them and appends their results to the spool."""

    def __init__(self, *, allowed: Collection[str], spool: Spool, clock: Callable[[], float] = time.time) -> None:
        self.malformed = 0
        """Commands without a readable id, which cannot be answered."""
        self._handlers: dict[str, Handler] = {}
        self._allowed, self._spool, self._clock = frozenset(allowed), spool, clock
        self._quick: queue.Queue[Command | None] = queue.Queue(_MAX_WAITING)
        self._long: queue.Queue[Command | None] = queue.Queue(1)
        self._busy = ""
        """The long command that waits or runs."""
        self._accepted: set[str] = set()
        """Ids that wait or run."""
        self.threads = (
            SupervisedThread("commands", lambda: self._work(self._quick)),
            SupervisedThread("long commands", lambda: self._work(self._long)),
        )
        for thread in self.threads:
            thread.start()

    def register(self, handlers: Mapping[str, Handler]) -> None:
        """Add handlers: command -> function."""
        self._handlers |= handlers

    def take(self, payload: bytes) -> None:
        """Take a received command. Never blocks and never raises."""
        try:
            if len(payload) > _MAX_BYTES:
                raise ValueError("too long")
            head = decode(payload, _Head)
            command_id = str(uuid.UUID(head.id))
        except (ValueError, msgspec.DecodeError):
            self.malformed += 1
            logger.warning("a command without a readable id was ignored")
            return
        command = Command(id=command_id, name=head.name[:64] if isinstance(head.name, str) else "")
        if command_id in self._accepted:
            return  # it waits or runs: its result will come
        if (result := self._spool.command_result(command_id)) is not None:
            self._resend(command, result)
            self._audit(command, "repeated: the first result is sent again")
            return
        try:
            command = msgspec.structs.replace(_read(payload, head), id=command_id, name=command.name)
            self._check(command)
            self._accepted.add(command_id)
            self._put(command)
        except CommandRefused as error:
            self._answer(command, ok=False, detail=str(error))
        except queue.Full:
            self._accepted.discard(command_id)
            self._answer(command, ok=False, detail=f"{_MAX_WAITING} other commands wait; send it again later")

    def close(self) -> None:
        """Start no other command; one that runs is abandoned."""
        for waiting, thread in zip((self._quick, self._long), self.threads, strict=True):
            with suppress(queue.Full):  # the thread ends with the process
                waiting.put_nowait(None)
                thread.join(1.0)

    def _put(self, command: Command) -> None:
        """Queue an accepted command. Raises `queue.Full`, or `CommandRefused` while another long one runs."""
        if command.name not in LONG:
            self._quick.put_nowait(command)
        elif self._busy:
            self._accepted.discard(command.id)
            raise CommandRefused(f"{self._busy} runs; send {command.name} again when its result has come")
        else:
            self._busy = command.name
            self._long.put_nowait(command)

    def _check(self, command: Command) -> None:
        """Raises `CommandRefused` for a command that must not be executed."""
        if command.name not in self._allowed:
            allowed = ", ".join(sorted(self._allowed)) or "none"
            raise CommandRefused(
                f"{command.name!r} is not allowed here; telemetry.commands allows: {allowed}; to allow it, add "
                f'"{command.name}" to commands under [telemetry] in the device\'s configuration and restart the agent'
            )
        if command.name not in self._handlers:
            raise CommandRefused(f"{command.name!r} is not known to this agent")
        now = self._clock()
        if not is_plausible(now):
            raise CommandRefused("the device's clock is wrong, so it is unknown whether the command has expired")
        if not math.isfinite(command.expires) or command.expires <= now:
            raise CommandRefused("expired")
        if command.expires > now + MAX_AHEAD_S:
            raise CommandRefused(f"it expires more than {MAX_AHEAD_S / 3600:g} hours ahead")

    def _work(self, waiting: queue.Queue[Command | None]) -> None:
        while (command := waiting.get()) is not None:
            try:
                self._execute(command)
            finally:
                self._accepted.discard(command.id)
                if waiting is self._long:
                    self._busy = ""

    def _execute(self, command: Command) -> None:
        try:
            self._check(command)  # again, because it may have waited for long
        except CommandRefused as error:
            self._answer(command, ok=False, detail=str(error))
            return
        # Remembered before it starts: a command that ends the process is not executed again and again.
        self._remember(command, Result(id=command.id, name=command.name, detail=_INTERRUPTED))
        try:
            data = dict(self._handlers[command.name](command))
            size = len(msgspec.json.encode(data))
        except (EyasError, ValueError) as error:
            self._answer(command, ok=False, detail=str(error))
        except Exception as error:  # a defect of one handler must not end the telemetry
            self._answer(command, ok=False, detail=f"failed: {type(error).__name__}: {error}")
        else:
            if size > _MAX_DATA:
                data = {"left_out": f"{size} bytes of data; {_MAX_DATA} are allowed"}
            self._answer(command, ok=True, detail="done", data=data)

    def _answer(self, command: Command, *, ok: bool, detail: str, data: dict[str, Any] | None = None) -> None:
        detail = re.sub(r"[^\x20-\x7e\xa0-\ud7ff]", "?", redact(detail))[:_MAX_DETAIL]
        result = Result(id=command.id, name=command.name, ok=ok, detail=detail, data=redact_tree(data or {}))
        if command.id in self._accepted:
            self._remember(command, result)
        self._spool.append(result)
        self._audit(command, "executed" if ok else f"refused: {detail}")

    def _audit(self, command: Command, outcome: str) -> None:
        """Log a command, from whom it came and what became of it; what the sender wrote is quoted and redacted."""
        issuer = redact(command.issuer[:_MAX_ISSUER])
        logger.info("command %s %r from %r: %s", command.id, redact(command.name), issuer, outcome, extra=KEEP)

    def _resend(self, command: Command, result: bytes) -> None:
        """Answer a command that was executed before."""
        if not result:
            self._answer(command, ok=False, detail="executed before; its result is not kept any more")
            return
        try:
            self._spool.append(decode(result, Result))
        except msgspec.DecodeError:
            self.malformed += 1

    def _remember(self, command: Command, result: Result) -> None:
        self._spool.remember_result(command.id, command.expires, encode(result), now=self._clock())


def _read(payload: bytes, head: _Head) -> Command:
    """Decode a whole command. Raises `CommandRefused` for one of a newer schema, or that this agent cannot read."""
    if type(head.schema) is not int or head.schema > SCHEMA:
        raise CommandRefused(
            f"schema {head.schema!r}; this agent reads schema {SCHEMA}: update the agent"[:_MAX_DETAIL]
        )
    if isinstance(head.name, str) and head.name not in COMMANDS:
        raise CommandRefused(f"{head.name[:64]!r} is no command; there are: {', '.join(COMMANDS)}")
    try:
        return decode(payload, Command)
    except msgspec.DecodeError as error:
        raise CommandRefused(f"this agent cannot read it: {error}") from None
