"""Commands from the host: checked, obeyed once, answered always.

A command is refused if it is malformed, unknown, not on the device's list, or expired by the device's clock; one whose
id was obeyed before gets the first result again, also after a restart. Handlers run one after the other in a thread of
their own, so that a slow one stops neither frames nor telemetry.
"""

from __future__ import annotations

import math
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from eyas_device.config import COMMANDS
from eyas_device.errors import EyasError
from eyas_device.support.clock import is_plausible
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import Command, Result, decode, encode
from eyas_device.telemetry.spool.spool import Spool

Arguments = Mapping[str, str | float | bool]
Handler = Callable[[Arguments], Mapping[str, Any]]
"""Does what a command says and returns what the result's `data` holds; an `EyasError` or a `ValueError` refuses it."""

MOST_AHEAD_S = 86_400.0
"""A command that expires later than this is refused: ids are remembered until then."""
_MOST_BYTES = 16 << 10
_MOST_DATA = 64 << 10
_MOST_WAITING = 8
_LONGEST_DETAIL = 500
_INTERRUPTED = "it was begun, and the agent ended before it was done"


class CommandExecutor(Closing):
    """Takes commands as they come from the network and appends their results to the spool."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        allowed: Collection[str],
        spool: Spool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.malformed = 0
        """Commands that could not be answered, because they had no id."""
        self._handlers, self._allowed, self._spool, self._clock = dict(handlers), frozenset(allowed), spool, clock
        self._waiting: queue.Queue[Command | None] = queue.Queue(_MOST_WAITING)
        self._taken: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="telemetry-orders", daemon=True)
        self._thread.start()

    def take(self, payload: bytes) -> None:
        """A command as it came. Waits for nothing and never raises."""
        try:
            if len(payload) > _MOST_BYTES:
                raise ValueError("too long")
            command = decode(payload, Command)
            number = str(uuid.UUID(command.id))
        except (ValueError, msgspec.DecodeError):
            self.malformed += 1
            return
        command = msgspec.structs.replace(command, id=number, name=command.name[:64])
        if number in self._taken:
            return  # it waits or runs: its result will come
        if (before := self._spool.order(number)) is not None:
            self._again(before)
        elif why := self._refusal(command):
            self._answer(command, ok=False, detail=why)
        else:
            try:
                self._taken.add(number)
                self._waiting.put_nowait(command)
            except queue.Full:
                self._taken.discard(number)
                self._answer(command, ok=False, detail=f"{_MOST_WAITING} other commands wait; say it again later")

    def close(self) -> None:
        """Begin no other command; one that runs is left behind."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return  # the thread ends with the process
        self._thread.join(1.0)

    def _refusal(self, command: Command) -> str:
        """Why a command is not obeyed; empty if it is."""
        if command.name not in COMMANDS:
            return f"{command.name!r} is no command; there are: {', '.join(COMMANDS)}"
        if command.name not in self._allowed:
            allowed = ", ".join(sorted(self._allowed)) or "none"
            return f"{command.name!r} is not allowed here; telemetry.commands allows: {allowed}"
        if command.name not in self._handlers:
            return f"{command.name!r} is not known to this agent"
        now = self._clock()
        if not is_plausible(now):
            return "the device's clock is wrong, so it cannot tell whether the command has expired"
        if not math.isfinite(command.expires) or command.expires <= now:
            return "expired"
        if command.expires > now + MOST_AHEAD_S:
            return f"it expires more than {MOST_AHEAD_S / 3600:g} hours ahead"
        return ""

    def _work(self) -> None:
        while (command := self._waiting.get()) is not None:
            try:
                self._obey(command)
            finally:
                self._taken.discard(command.id)

    def _obey(self, command: Command) -> None:
        if why := self._refusal(command):  # it may have waited for long
            self._answer(command, ok=False, detail=why)
            return
        # Remembered before it is begun: a command that ends the process is not obeyed again and again.
        self._remember(command, Result(id=command.id, name=command.name, detail=_INTERRUPTED))
        try:
            data = dict(self._handlers[command.name](command.arguments))
            size = len(msgspec.json.encode(data))
        except (EyasError, ValueError) as error:
            self._answer(command, ok=False, detail=str(error))
        except Exception as error:  # a defect of one handler must not end the telemetry
            self._answer(command, ok=False, detail=f"failed: {type(error).__name__}: {error}")
        else:
            if size > _MOST_DATA:
                data = {"left_out": f"{size} bytes of data; {_MOST_DATA} are allowed"}
            self._answer(command, ok=True, detail="done", data=data)

    def _answer(self, command: Command, *, ok: bool, detail: str, data: dict[str, Any] | None = None) -> None:
        detail = re.sub(r"[^\x20-\x7e\xa0-\ud7ff]", "?", detail)[:_LONGEST_DETAIL]
        result = Result(id=command.id, name=command.name, ok=ok, detail=detail, data=data or {})
        if command.id in self._taken:
            self._remember(command, result)
        self._spool.append(result)

    def _again(self, before: bytes) -> None:
        try:
            self._spool.append(decode(before, Result))
        except msgspec.DecodeError:
            self.malformed += 1

    def _remember(self, command: Command, result: Result) -> None:
        self._spool.set_order(command.id, command.expires, encode(result), now=self._clock())
