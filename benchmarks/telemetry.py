"""Telemetry from the device to the store: losses when processes are killed, throughput and cost.

    python benchmarks/telemetry.py [--quick] [--json FILE]

Everything runs on this machine: a real mosquitto (with persistence in the kill matrix), collectors in their own
processes, SQLite on this disk with a synced commit before each acknowledgement.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

from common import Figure, finish
from eyas_device.telemetry.messages import Status, encode
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.spool.spool import Spool
from eyas_host.support.machine import cpu_pressure
from kill_matrix import CASES, SIDES, matrix
from sides.telemetry_device import window

_WAIT_S = 180.0
_LATENCY_S = 0.02
FLEETS = (10, 1_000, 10_000)


class Bench:
    """A mosquitto and a store for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self._run = 0

    @contextmanager
    def broker(self) -> Iterator[None]:
        """Run the broker until the block is left."""
        user = "user root\n" if os.geteuid() == 0 else ""
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"{user}listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 500\n"
            "max_queued_messages 0\nlog_type error\n"
        )
        program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if program is None:
            raise SystemExit("mosquitto is not installed: apt-get install mosquitto")
        with _process(program, "-c", str(config)):
            _until(lambda: _listens(self.port))
            yield

    def drain(
        self, messages: int, devices: int, *, collectors: int = 1, latency_s: float = 0.0, batch: int = 500
    ) -> tuple[float, float]:
        """Stored messages a second, and the collectors' CPU time for each message, microseconds."""
        self._run += 1
        with self.broker():  # restarted: collectors that left keep their share for a while
            return self._drain(messages, devices, collectors, latency_s, batch)

    def _drain(self, messages: int, devices: int, collectors: int, latency_s: float, batch: int) -> tuple[float, float]:
        database = self.folder / f"{self._run}.db"
        with ExitStack() as stack:
            running = []
            for number in range(collectors):
                log = self.folder / f"{self._run}-{number}.jsonl"
                arguments = (str(self.port), f"sqlite:///{database}", f"c{number}", str(latency_s), str(batch))
                running.append(stack.enter_context(_side("telemetry_collector.py", *arguments, log=log)))
                _until(lambda log=log: '"state":"connected"' in log.read_text())  # type: ignore[misc]
            load = stack.enter_context(_load(self.port, messages, devices))
            before = sum(_cpu_s(process.pid) for process in running)
            started = time.monotonic()
            load.stdin.write(b"go\n")  # type: ignore[union-attr]
            load.stdin.flush()  # type: ignore[union-attr]
            reader = stack.enter_context(closing(sqlite3.connect(database)))
            _until(lambda: reader.execute("SELECT max(rowid) FROM messages").fetchone()[0] == messages, 0.01)
            seconds = time.monotonic() - started
            time.sleep(2.0)  # pending acknowledgements count too
            spent = sum(_cpu_s(process.pid) for process in running) - before
        for path in self.folder.glob(f"{self._run}.db*"):
            path.unlink()
        return messages / seconds, 1e6 * spent / messages


def collecting(bench: Bench, messages: int, rounds: int) -> dict[str, Figure]:
    """Rate and cost of one collector for fleets of several sizes, in turns, and of two with a slow store."""
    rates: dict[int, list[float]] = {fleet: [] for fleet in FLEETS}
    costs: dict[int, list[float]] = {fleet: [] for fleet in FLEETS}
    scaling, hidden = [], []
    for _ in range(rounds):
        for fleet in FLEETS:
            rate, cost = bench.drain(messages, fleet)
            rates[fleet].append(rate)
            costs[fleet].append(cost)
        one, _ = bench.drain(4_000, 100, latency_s=_LATENCY_S, batch=20)
        two, _ = bench.drain(4_000, 100, latency_s=_LATENCY_S, batch=20, collectors=2)
        scaling.append(two / one)
        slow, _ = bench.drain(messages // 2, 100, latency_s=_LATENCY_S)
        hidden.append(slow)
    middle = {fleet: statistics.median(costs[fleet]) for fleet in FLEETS}
    return {
        "collector_rate": Figure(
            value=statistics.median(rates[FLEETS[0]]),
            unit="messages/s",
            bound=6000,
            spread=_spread(rates[FLEETS[0]]),
            note=f"{FLEETS[0]} devices, windows of {len(encode(window(30)))} bytes, each commit synced",
        ),
        "collector_rate_large_fleet": Figure(
            value=statistics.median(rates[FLEETS[-1]]),
            unit="messages/s",
            spread=_spread(rates[FLEETS[-1]]),
            note=f"{FLEETS[-1]} devices",
        ),
        "collector_cost_growth": Figure(
            value=max(middle.values()) / min(middle.values()),
            unit="x",
            bound=1.15,
            better="lower",
            note="; ".join(f"{fleet} devices {cost:.0f} us" for fleet, cost in middle.items()) + " of CPU a message",
        ),
        "two_collectors": Figure(
            value=statistics.median(scaling),
            unit="x",
            bound=1.6,
            spread=_spread(scaling),
            note="against one, 20 ms added to each commit, at most 20 messages a commit",
        ),
        "collector_rate_slow_store": Figure(
            value=statistics.median(hidden),
            unit="messages/s",
            spread=_spread(hidden),
            note="one collector with its own batches of up to 500, 20 ms added to each commit",
        ),
    }


def killing(messages: int) -> dict[str, Figure]:
    """The kill matrix, for Eyas and for the plain script."""
    figures = {}
    for plain in (False, True):
        results = matrix(list(CASES), messages=messages, plain=plain)
        lost, twice = sum(o.lost for o in results), sum(o.twice for o in results)
        unfinished = [o.case for o in results if not o.finished]
        note = f"{len(results)} cases of {messages} messages; worst: {max(o.lost for o in results)} lost"
        note += f"; not finished: {', '.join(unfinished)}" if unfinished else ""
        name, bound = ("plain_", None) if plain else ("", 0.0)
        figures[f"{name}lost"] = Figure(value=lost, unit="messages", bound=bound, better="lower", note=note)
        figures[f"{name}stored_twice"] = Figure(value=twice, unit="messages", bound=bound, better="lower")
    return figures


def device(bench: Bench, windows: int) -> dict[str, Figure]:
    """CPU time of a window on a device, and disk space of seven days of windows."""
    folder = bench.folder / "device"
    folder.mkdir()
    log = bench.folder / "device.jsonl"
    arguments = (str(bench.port), f"sqlite:///{bench.folder / 'device.db'}", "d")
    with _side("telemetry_collector.py", *arguments, log=log), Spool(folder, device="dev") as spool:
        _until(lambda: '"state":"connected"' in log.read_text())
        status = Status(state="online")
        uplink = Uplink(
            UplinkSettings(host="127.0.0.1", port=bench.port, site="s", device="dev"),
            spool,
            will=Status(device="dev"),
            make_status=lambda: status,
            on_command=lambda payload: None,
        )
        with uplink:
            uplink.start()
            _until(lambda: uplink.connected)
            seconds = windows / 50
            started = time.process_time()
            time.sleep(seconds)
            idle = time.process_time() - started
            message = window(300)
            started = time.process_time()
            for _ in range(windows):
                spool.append(message)
                time.sleep(seconds / windows)
            busy = time.process_time() - started
    week = bench.folder / "week"
    week.mkdir()
    with Spool(week, device="dev") as spool:
        number = 7 * 24 * 3600 // 30
        for _ in range(number):
            spool.append(message)
        spool.maintain()
        used = spool.used() / 1e6
        complete = len(spool.pending("window", limit=number)) == number
    return {
        "device_cpu_ms": Figure(
            value=1000 * (busy - idle) / windows,
            unit="ms",
            bound=0.3,
            better="lower",
            note="CPU a window: spool, send, acknowledgement; idle polling taken off; 50 windows/s",
        ),
        "week_offline_mb": Figure(
            value=used,
            unit="MB",
            bound=64,
            better="lower",
            note=f"{number} windows of ten labels{'' if complete else ', some of them merged'}",
        ),
    }


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    before = cpu_pressure()
    with tempfile.TemporaryDirectory(prefix="eyas-telemetry-") as name:
        bench = Bench(Path(name))
        figures = collecting(bench, 60_000 if arguments.quick else 120_000, rounds=1 if arguments.quick else 3)
        with bench.broker():
            figures |= device(bench, 500 if arguments.quick else 2000)
    figures |= killing(400 if arguments.quick else 3000)
    finish(figures, before, arguments.json)


@contextmanager
def _process(*command: str, log: Path | None = None, stdin: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with ExitStack() as stack:
        out = subprocess.PIPE if log is None and stdin is not None else subprocess.DEVNULL
        if log is not None:
            out = stack.enter_context(log.open("wb"))  # type: ignore[assignment]
        process = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _side(script: str, *arguments: str, log: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return _process(sys.executable, str(SIDES / script), *arguments, log=log)


@contextmanager
def _load(port: int, messages: int, devices: int) -> Iterator[subprocess.Popen[bytes]]:
    command = (sys.executable, str(SIDES / "mqtt_load.py"), str(port), str(messages), str(devices))
    with _process(*command, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise SystemExit("mqtt_load.py did not start")
        yield process


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _until(true: Callable[[], object], nap: float = 0.05) -> None:
    end = time.monotonic() + _WAIT_S
    while not true():
        if time.monotonic() > end:
            raise SystemExit(f"timed out after {_WAIT_S:.0f} s")
        time.sleep(nap)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


if __name__ == "__main__":
    main()
