"""The monitor inside a collector: a thread with its own connection to the store, which takes a turn every minute."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.fleet_state import Tuning
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.notify import Notifier
from eyas_host.fleet.drift.report import describe
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.faults import first_line

_END_S = 5.0
"""How long a collector that ends waits for a turn, seconds."""


class DriftService(Closing):
    """Watches a store until `close`. Its trouble is said and never stops the collector.

    Args:
        store_url: URL of a store that exists.
        every_s: Time between two turns, seconds.
        notifier: Where alarms are reported.
        say: Called with lines for people, in the service's thread.
        tuning: How long devices learn.

    """

    def __init__(
        self,
        store_url: str,
        every_s: float,
        notifier: Notifier,
        say: Callable[[str], None],
        tuning: Tuning | None = None,
    ) -> None:
        self._tuning = tuning
        self._url, self._every_s, self._notifier, self._say = store_url, every_s, notifier, say
        self._stopped = threading.Event()
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._work, name="drift", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the present turn, or without it; what is not stored the next start computes again."""
        self._stopped.set()
        self._thread.join(_END_S)

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                with Store(self._url, create=False) as store:
                    self._watch(Monitor(store, self._tuning))
            except (SQLAlchemyError, EyasError, OSError) as error:
                text = first_line(error) if isinstance(error, SQLAlchemyError) else str(error)
                self._complain([f"drift: {text}; trying again"])
                self._stopped.wait(self._every_s)

    def _watch(self, monitor: Monitor) -> None:
        while not self._stopped.is_set():
            turn = monitor.turn()
            for alarm in turn.changed:
                self._say(line(alarm))
            self._complain(self._notifier.deliver(turn.changed))
            if not turn.more:
                self._stopped.wait(self._every_s)

    def _complain(self, problems: list[str]) -> None:
        """Say problems once, until they change."""
        for problem in problems:
            if problem not in self._problems:
                self._say(problem)
        self._problems = problems


def line(alarm: Alarm) -> str:
    """An alarm in one line of a log."""
    if not alarm.open:
        return f"drift of {alarm.device} closed: {alarm.why_closed}"
    first, *_, advice = describe(alarm)
    return f"drift of {first}; {advice.strip().removeprefix('do').strip()}"
