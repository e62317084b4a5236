"""The monitor inside a collector: a thread with its own connection to the store, which takes a turn every minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from eyas_device.errors import EyasError
from eyas_device.support.closing import Closing
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.fleet_state import Tuning
from eyas_host.fleet.drift.monitor import Monitor, Turn
from eyas_host.fleet.drift.notify import Notifier
from eyas_host.fleet.drift.report import describe
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.faults import first_line

_END_S = 5.0
"""How long a collector that ends waits for a turn, seconds."""
_PAGE_S = 3600.0
"""Age at which the page is written again although no alarm changed, seconds."""


class DriftService(Closing):
    """Watches a store until `close`. Its trouble is said and never stops the collector.

    Args:
        store_url: URL of a store that exists.
        every_s: Time between two turns, seconds.
        notifier: Where alarms are reported.
        say: Called with lines for people, in the service's thread.
        tuning: How long devices learn.
        page: File that the page of drift is written to; None: none.

    """

    def __init__(
        self,
        store_url: str,
        every_s: float,
        notifier: Notifier,
        say: Callable[[str], None],
        tuning: Tuning | None = None,
        page: Path | None = None,
    ) -> None:
        self._tuning, self._page = tuning, page
        self._page_due = 0.0
        """When the page is written again although no alarm changed, of a clock that only runs."""
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
                    self._watch(store, Monitor(store, self._tuning))
            except (SQLAlchemyError, EyasError, OSError) as error:
                self._complain([f"drift: {_text(error)}; trying again"])
                self._stopped.wait(self._every_s)

    def _watch(self, store: Store, monitor: Monitor) -> None:
        while not self._stopped.is_set():
            turn = monitor.turn()
            for alarm in turn.changed:
                self._say(line(alarm))
            problems = self._write_page(store, monitor, turn)
            self._complain([*problems, *self._notifier.deliver(turn.changed)])
            if not turn.more:
                self._stopped.wait(self._every_s)

    def _write_page(self, store: Store, monitor: Monitor, turn: Turn) -> list[str]:
        """Write the page if alarms changed or it is an hour old; return what went wrong.

        The next turn tries again then. Messages of the alarms follow: what they link to is there, unless it went wrong;
        they are never lost for a page.
        """
        if turn.changed:
            self._page_due = 0.0
        elif turn.more:
            return []
        if self._page is None or time.monotonic() < self._page_due:
            return []
        from eyas_host.fleet.drift.page import write_page

        try:
            write_page(store, monitor, self._page, turn.time)
        except (SQLAlchemyError, EyasError, OSError) as error:
            return [f"drift: the page waits: {_text(error)}"]
        self._page_due = time.monotonic() + _PAGE_S
        return []

    def _complain(self, problems: list[str]) -> None:
        """Say problems once, until they change."""
        for problem in problems:
            if problem not in self._problems:
                self._say(problem)
        self._problems = problems


def _text(error: Exception) -> str:
    return first_line(error) if isinstance(error, SQLAlchemyError) else str(error)


def line(alarm: Alarm) -> str:
    """An alarm in one line of a log."""
    if not alarm.open:
        return f"drift of {alarm.device} closed: {alarm.why_closed}"
    first, *_, advice = describe(alarm)
    return f"drift of {first}; {advice.strip().removeprefix('do').strip()}"
