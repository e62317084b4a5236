"""Look at the repository from time to time, each time in a process of its own.

Loading models takes memory that Python does not give back, and a runtime may crash: the process that waits does
neither. It looks at once when the agent has touched `STATE/updates/poke`, because a message arrived, and when the
verdict about a model on probation is there. A look that hangs is ended, and the next one goes on from its record.
"""

from __future__ import annotations

import logging
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from eyas_device.updates.fetch import BLOBS
from eyas_device.updates.progress import POKE, UPDATES, UpdateRecord, read_progress
from eyas_device.updates.records import Verdict, read_record

logger = logging.getLogger(__name__)

_STEP_S, _MIN_SLEEP_S = 1.0, 0.01
_MIN_GAP_S = 10.0
"""Messages in quick succession ask for one look."""
_FIRST_S = 60.0
"""The first look is within this time: after a power cut, all devices of a hall start at once."""
_RETRY_S = 60.0
"""Pause after the first failure; each further one doubles it, up to the polling time."""
_PROBATION_S = 60.0
_JITTER = 0.5
_END_S = 30.0
_HUNG_S = 7200.0
"""A look that changes nothing on the disk for so long has hung; building a TensorRT engine takes a part of it."""


def pause_s(record: UpdateRecord, poll_s: float, *, chance: Callable[[], float] = random.random) -> float:
    """Time until the next look, seconds: `poll_s` on average, sooner if something is pending."""
    pause = poll_s
    if record.state == "probation":
        pause = min(poll_s, _PROBATION_S)
    elif record.state == "failed":
        pause = min(poll_s, _RETRY_S * 2.0 ** min(max(record.attempts - 1, 0), 16))
    elif record.wait_s:
        pause = min(poll_s, record.wait_s + _RETRY_S)
    return pause * (1 - _JITTER + 2 * _JITTER * chance())


class Watch:
    """Runs `command`, one look at the repository, again and again.

    Args:
        command: The command, whose outcome is in the record.
        state: The device's state folder.
        poll_s: Time between two looks, on average, seconds.
        sleep, clock, chance: For tests.

    """

    def __init__(
        self,
        command: Sequence[str],
        state: Path,
        poll_s: float,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._command, self._state, self._poll_s = list(command), state, poll_s
        self._sleep, self._clock, self._chance = sleep, clock, chance

    def run(self) -> None:
        """Run until a signal raises an exception; the look that is under way is ended then."""
        poked = self._poked()
        self._wait(min(_FIRST_S, self._poll_s / 10) * self._chance(), poked, UpdateRecord())
        while True:
            poked = self._poked()
            self._look()
            record = read_progress(self._state)
            self._wait(pause_s(record, self._poll_s, chance=self._chance), poked, record)

    def _look(self) -> None:
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        except OSError as error:
            logger.error("%s: %s", self._command[0], error.strerror)
            return
        try:
            self._wait_for(process)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a look, or until it has changed nothing on the disk for so long that it must hang."""
        seen, since = self._last_change(), self._clock()
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STEP_S)
                return
            if (changed := self._last_change()) != seen:
                seen, since = changed, self._clock()
            elif self._clock() - since > _HUNG_S:
                logger.error("the look hangs: nothing has changed for %.0f minutes; it is ended", _HUNG_S / 60)
                return

    def _last_change(self) -> int:
        """When something in the folders that a look writes to changed last, nanoseconds; 0 if there are none."""
        newest = 0
        for folder in (self._state / UPDATES, self._state / UPDATES / BLOBS, self._state / "slots"):
            with suppress(OSError):
                newest = max(newest, *(path.lstat().st_mtime_ns for path in (folder, *folder.iterdir())))
        return newest

    def _wait(self, pause: float, poked: int, record: UpdateRecord) -> None:
        """Wait for the next look, or until something asks for one: a message, or the end of a probation."""
        began, verdict = self._clock(), self._verdict(record)
        while (waited := self._clock() - began) < pause:
            self._sleep(min(_STEP_S, max(pause - waited, _MIN_SLEEP_S)))
            if waited >= _MIN_GAP_S and (self._poked() != poked or self._verdict(record) != verdict):
                return

    def _poked(self) -> int:
        with suppress(OSError):
            return (self._state / UPDATES / POKE).stat().st_mtime_ns
        return 0

    def _verdict(self, record: UpdateRecord) -> str:
        if record.state != "probation":
            return ""
        verdict = read_record(self._state / "slots" / f"{record.slot}.probation", Verdict)
        return verdict.state if verdict is not None else ""
