"""Kill device, broker and collector while messages flow, and count lost and duplicate messages.

    python benchmarks/kill_matrix.py [--messages N] [--case NAME ...] [--plain] [--json FILE]

Real mosquitto with persistence, real spool, uplink and collector, each a process that gets SIGKILL. `--plain` does the
same to a plain paho QoS 1 -> SQLite script. A message counts once it is in the device's file (plain script: once
`publish` returned). In the cases with a full disk the file is on a small file system of its own (needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from common import isa
from eyas_device.telemetry.messages import Window
from eyas_host.support.machine import cpu_pressure, machine, versions

SIDES = Path(__file__).parent / "sides"
_TIMEOUT_S = 240.0
_DOWN_S = 0.5

Step = tuple[float, str, str]
"""Fraction of messages produced, action (kill or start; fill or free), and processes ("broker collector") or disk."""

_ALL = "device broker collector"


def _both(who: str) -> list[Step]:
    """Kill twice, and restart at once."""
    return [(at, verb, who) for at in (0.3, 0.6) for verb in ("kill", "start")]


_QUICK = 600

CASES: dict[str, list[Step]] = {
    "device": _both("device"),
    "broker": _both("broker"),
    "collector": _both("collector"),
    "device+broker": _both("device broker"),
    "device+collector": _both("device collector"),
    "broker+collector": _both("broker collector"),
    "all": _both(_ALL),
    "offline: device": [(0.3, "kill", "broker"), (0.5, "kill", "device"), (0.5, "start", "device broker")],
    "offline: collector": [
        (0.3, "kill", "broker"),
        (0.5, "kill", "collector"),
        (0.7, "start", "collector broker"),
    ],
    "offline: device+collector": [
        (0.3, "kill", "broker"),
        (0.5, "kill", "device collector"),
        (0.5, "start", "device"),
        (0.8, "start", "broker collector"),
    ],
    "collector down, then broker": [
        (0.3, "kill", "collector"),
        (0.6, "kill", "broker"),
        (0.6, "start", "broker"),
        (0.8, "start", "collector"),
    ],
    "disk full, then device": [
        (0.2, "fill", "disk"),
        (0.4, "kill", "device"),
        (0.4, "free", "disk"),
        (0.4, "start", "device"),
        (0.6, "fill", "disk"),
        (0.8, "kill", "device"),
        (0.8, "free", "disk"),
        (0.8, "start", "device"),
    ],
    "disk full at a start": [
        (0.2, "fill", "disk"),
        (0.3, "kill", "device"),
        (0.3, "start", "device"),
        (0.5, "free", "disk"),
        (0.7, "kill", "device"),
        (0.7, "start", "device"),
    ],
    "offline, disk full": [
        (0.2, "kill", "broker"),
        (0.3, "fill", "disk"),
        (0.4, "start", "broker"),
        (0.6, "kill", "device broker"),
        (0.6, "free", "disk"),
        (0.6, "start", "device broker"),
    ],
}


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a case."""

    case: str
    plain: bool
    messages: int
    """Messages in the device's file."""
    lost: int
    twice: int
    """Messages stored more than once, under any identity."""
    seconds: float
    finished: bool
    """Whether the device delivered everything in time."""


class Rig:
    """The three processes of a case, in their own folder."""

    def __init__(self, folder: Path, *, messages: int, rate: float, plain: bool) -> None:
        self.folder, self.messages, self.plain = folder, messages, plain
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        data = folder / "broker"
        data.mkdir()
        user = "user root\n" if os.geteuid() == 0 else ""
        (folder / "mosquitto.conf").write_text(
            f"{user}listener {self._port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {data}/\nautosave_interval 1\nlog_type error\n"
        )
        mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if mosquitto is None:
            raise SystemExit("mosquitto is not installed: apt-get install mosquitto")
        device, collector = (
            ("plain_device.py", "plain_collector.py")
            if plain
            else (
                "telemetry_device.py",
                "telemetry_collector.py",
            )
        )
        database = folder / "store.db"
        store = str(database) if plain else f"sqlite:///{database}"
        self._commands: dict[str, list[str]] = {
            "broker": [mosquitto, "-c", str(folder / "mosquitto.conf")],
            "collector": [sys.executable, str(SIDES / collector), self._port, store, "a"],
            "device": [sys.executable, str(SIDES / device), self._port, str(folder), "cam", str(messages), str(rate)],
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._disk: Path | None = None

    def mount(self) -> None:
        """Put the device's file on a file system of its own."""
        disk = self.folder / "cam"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise SystemExit("a small file system cannot be mounted: a full disk needs root; choose others by --case")
        self._disk = disk

    def unmount(self) -> None:
        """Undo `mount`."""
        if self._disk is not None:
            subprocess.run(["umount", "--lazy", self._disk], check=True)

    def fill(self, disk: str) -> None:
        """Leave no room on the device's disk."""
        with (self.folder / "cam" / "other").open("wb", buffering=0) as stream:
            for size in (4096, 1):
                with suppress(OSError):
                    while True:
                        stream.write(b"x" * size)

    def free(self, disk: str) -> None:
        """Undo `fill`."""
        (self.folder / "cam" / "other").unlink()

    def start(self, who: str) -> None:
        """Start processes, broker first."""
        for name in sorted(who.split(), key=list(self._commands).index):
            with (self.folder / f"{name}.log").open("ab") as log:
                self._running[name] = subprocess.Popen(self._commands[name], stdout=log, stderr=log)

    def kill(self, who: str) -> None:
        """Send SIGKILL to all processes, then wait for them."""
        processes = [self._running.pop(name) for name in who.split() if name in self._running]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()

    def produced(self) -> int:
        """Number of messages that the device made so far."""
        path = self.folder / ("cam.kept" if self.plain else "cam.tried")
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def device_ended(self) -> bool:
        """Whether the device delivered everything."""
        return "device" in self._running and self._running["device"].poll() is not None

    def stored(self) -> Counter[int]:
        """Message number -> its count in the store."""
        database = sqlite3.connect(self.folder / "store.db")
        if self.plain:
            rows = database.execute("SELECT number FROM plain")
            return Counter(int(number) for (number,) in rows)
        rows = database.execute("SELECT payload FROM messages WHERE kind = 'window'")
        return Counter(msgspec.json.decode(payload, type=Window).frames for (payload,) in rows)


def run(case: str, *, messages: int, rate: float, plain: bool) -> CaseResult:
    """Run one case."""
    folder = Path(tempfile.mkdtemp(prefix="eyas-kill-"))
    rig = Rig(folder, messages=messages, rate=rate, plain=plain)
    started = time.monotonic()
    end = started + _TIMEOUT_S
    try:
        if any(who == "disk" for _, _, who in CASES[case]):
            rig.mount()
        rig.start(_ALL)
        for fraction, verb, who in CASES[case]:
            while rig.produced() < fraction * messages and time.monotonic() < end:
                time.sleep(0.02)
            {"kill": rig.kill, "start": rig.start, "fill": rig.fill, "free": rig.free}[verb](who)
            if verb == "kill":
                time.sleep(_DOWN_S)
        while not rig.device_ended() and time.monotonic() < end:
            time.sleep(0.1)
        if plain:
            time.sleep(3.0)  # the script does not know what is in flight
        kept = {int(line) for line in (folder / "cam.kept").read_text().split()}
        stored = rig.stored()
        return CaseResult(
            case=case,
            plain=plain,
            messages=len(kept),
            lost=len(kept - set(stored)),
            twice=sum(number > 1 for number in stored.values()),
            seconds=round(time.monotonic() - started, 1),
            finished=rig.device_ended(),
        )
    finally:
        rig.kill(_ALL)
        rig.unmount()
        shutil.rmtree(folder, ignore_errors=True)


def matrix(cases: Sequence[str], *, messages: int, plain: bool, rate: float = 400.0, jobs: int = 3) -> list[CaseResult]:
    """Run cases, a few in parallel."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda case: run(case, messages=messages, rate=rate, plain=plain), cases))


def main() -> None:
    """Run the cases and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK} messages for each case (minutes)")
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--case", action="append", choices=list(CASES), help="all by default; repeatable")
    parser.add_argument("--plain", action="store_true", help="the plain script instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    before = cpu_pressure()
    messages = _QUICK if arguments.quick else arguments.messages
    results = matrix(arguments.case or list(CASES), messages=messages, plain=arguments.plain)
    for o in results:
        print(
            f"{o.case:30} {o.messages:6} messages  {o.lost:5} lost  {o.twice:5} twice  {o.seconds:6.1f} s"
            f"{'' if o.finished else '  NOT FINISHED'}"
        )
    measured_on, pressure = machine() | {"isa": isa()}, {"before": before, "after": cpu_pressure()}
    print(f"{measured_on['processor']}, {measured_on['cores']} cores ({measured_on['isa']})")
    print(f"pressure before and after: {pressure['before']}; {pressure['after']}")
    print(f"{sum(o.finished and not o.lost and not o.twice for o in results)} of {len(results)} cases lost nothing")
    if arguments.json:
        tree = {
            "machine": measured_on,
            "pressure": pressure,
            "versions": versions(),
            "outcomes": msgspec.to_builtins(results),
        }
        arguments.json.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
