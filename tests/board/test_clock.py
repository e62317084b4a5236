"""The clock of a running board is wrong, and is set: what it sends, and what the collector makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from eyas_device.telemetry.messages import Window
from eyas_host.fleet.store.database import Store

from .flashing import DEVICE
from .machine import Board
from .service import SERVICE, Messages, answering, longest_gap, shown, wait_for

_TIMESYNCD = "systemd-timesyncd"
_SERVERS = "/run/systemd/timesyncd.conf.d/board.conf"
_LONG_AGO = 86400
"""The second day of 1970: the kernel takes no time since 1970 that is shorter than its own uptime."""
_NEAR_S = 3.0
"""How exact a time is that was computed from when a message arrived."""


@pytest.fixture
def store(messages: Messages, tmp_path: Path) -> Iterator[Store]:
    """What a collector stores meanwhile."""
    address = f"sqlite:///{tmp_path}/fleet.db"
    command = [sys.executable, "-m", "eyas_host", "collect", "--broker", f"127.0.0.1:{messages.port}"]
    with (tmp_path / "collector.log").open("wb") as log:
        collector = subprocess.Popen([*command, "--store", address], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait_for("the store", (tmp_path / "fleet.db").exists)
        with closing(Store(address)) as opened:
            yield opened
    finally:
        collector.terminate()
        collector.wait(60)


def newest(messages: Messages, board: Board, fits: Callable[[Window], bool]) -> Window:
    """Wait until the board's newest window is one that fits."""

    def look() -> Window | None:
        return next((window for window in messages.since_boot(board)[-1:] if fits(window)), None)

    return wait_for("a window", look)


def stored_time(store: Store, window: Window) -> float:
    """When a window ended by the store, once it is there; seconds since 1970."""

    def look() -> float | None:
        found = (w.time for w in store.windows(DEVICE) if (w.spool, w.sequence) == (window.spool, window.sequence))
        return next(found, None)

    return wait_for("the window in the store", look)


def test_a_clock_that_falls_to_1970_and_is_set_by_a_time_server(
    service_board: Board, messages: Messages, store: Store, report: Callable[[str], None]
) -> None:
    """The agent goes on, the windows say what their clock is worth, and the store has the right times throughout."""
    before = answering(service_board)
    start = time.time() - float(service_board.run("cut -d ' ' -f 1 /proc/uptime").stdout)
    try:
        service_board.run(f"systemctl stop {_TIMESYNCD} && date --set=@{_LONG_AGO}")
        early = newest(messages, service_board, lambda window: window.time < 2 * _LONG_AGO and window.frames > 0)
        assert not early.synchronised  # timesyncd, which would know, stands still
        assert abs(stored_time(store, early) - (start + early.uptime_s)) < _NEAR_S

        service_board.put(Path(__file__).with_name("time_server.py"), "/root/time_server.py")
        service_board.run(f"systemd-run --unit=time-server python3 /root/time_server.py {start:.3f}")
        service_board.run(f"mkdir -p {Path(_SERVERS).parent} && printf '[Time]\\nNTP=127.0.0.1\\n' >{_SERVERS}")
        service_board.run(f"systemctl start {_TIMESYNCD}")
        late = newest(messages, service_board, lambda window: window.synchronised is True and window.frames > 0)
        assert abs(late.time - (start + late.uptime_s)) < 1
        assert abs(stored_time(store, late) - late.time) < 0.001
        # the exact time of one window is that of all of its start
        wait_for("the exact time", lambda: abs(stored_time(store, early) - start - early.uptime_s) < 1)
    finally:
        service_board.run(f"systemctl stop {_TIMESYNCD} time-server; rm -f {_SERVERS}")
        service_board.run(f"date --set=@{time.time():.3f} && systemctl start {_TIMESYNCD}")
    after = answering(service_board, before)
    assert (after.pid, after.restarts, after.camera.losses) == (before.pid, {}, before.camera.losses)
    assert shown(service_board, "NRestarts") == "0"
    during = [window for window in messages.since_boot(service_board) if early.uptime_s <= window.uptime_s]
    assert longest_gap(during) < 1.0
    report(f"clock at 1970, then set: {len(during)} windows, the longest gap {longest_gap(during):.1f} s")
    assert SERVICE in service_board.run("systemctl list-units --state=active --plain 'eyas*'").stdout
