"""The collector for benchmarks: the real one, with a report every half second on standard output.

telemetry_collector.py PORT STORE NAME [SECONDS OF COMMIT LATENCY [BATCH]]
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import msgspec

from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.collect import collector as collecting
from eyas_host.fleet.collect.settings import CollectorSettings
from eyas_host.fleet.store.database import Store

LATENCY_S = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0


class SlowStore(Store):
    """A store with a slow connection: each transaction waits, without locking the database."""

    def begin(self, *, exclusive: bool = False) -> AbstractContextManager[Any]:
        """Open a transaction and wait after it."""

        @contextmanager
        def delayed() -> Any:
            with super(SlowStore, self).begin(exclusive=exclusive) as connection:
                yield connection
            time.sleep(LATENCY_S)

        return delayed()


def main() -> None:
    """Collect until SIGTERM."""
    if LATENCY_S:
        setattr(collecting, "Store", SlowStore)  # noqa: B010 - a name that it imports
    collecting.collect(
        sys.argv[2],
        BrokerAccess(broker=f"127.0.0.1:{sys.argv[1]}"),
        CollectorSettings(name=sys.argv[3], report_s=0.5, batch=int(sys.argv[5]) if len(sys.argv) > 5 else 500),
        lambda report: print(msgspec.json.encode(report).decode(), flush=True),
    )


if __name__ == "__main__":
    main()
