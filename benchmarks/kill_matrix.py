"""Device, broker and collector are killed while messages flow; what is lost, and what is stored twice, is counted.

    python benchmarks/kill_matrix.py [--messages N] [--case NAME ...] [--plain] [--json FILE]

Real mosquitto with persistence, the real spool, uplink and collector, each a process that gets SIGKILL. `--plain` does
the same to a plain paho QoS 1 -> SQLite script. A message counts from when the device's spool has it (of the plain
script: from when `publish` returned).
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
from pathlib import Path

import msgspec

from common import isa
from eyas_device.telemetry.messages import Window
from eyas_host.support.machine import machine, versions

SIDES = Path(__file__).parent / "sides"
_GIVE_UP_S = 240.0
_DOWN_S = 0.5

Step = tuple[float, str, str]
"""When this part of the messages was made: kill or start, and who ("broker collector")."""

_ALL = "device broker collector"


def _both(who: str) -> list[Step]:
    """Killed twice on the way, and started again at once."""
    return [(at, verb, who) for at in (0.3, 0.6) for verb in ("kill", "start")]


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
}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a case."""

    case: str
    plain: bool
    messages: int
    """Which the device had."""
    lost: int
    twice: int
    """Stored more than once, under whatever identity."""
    seconds: float
    finished: bool
    """Whether the device could hand over everything in time."""


class Rig:
    """The three processes of one case, in a folder of their own."""

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

    def start(self, who: str) -> None:
        """Start processes, broker first."""
        for name in sorted(who.split(), key=list(self._commands).index):
            with (self.folder / f"{name}.log").open("ab") as log:
                self._running[name] = subprocess.Popen(self._commands[name], stdout=log, stderr=log)

    def kill(self, who: str) -> None:
        """SIGKILL, all before any is waited for."""
        processes = [self._running.pop(name) for name in who.split() if name in self._running]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()

    def made(self) -> int:
        """How many messages the device had so far."""
        path = self.folder / "cam.kept"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def device_ended(self) -> bool:
        """Whether it handed over everything."""
        return "device" in self._running and self._running["device"].poll() is not None

    def stored(self) -> Counter[int]:
        """Number -> how often it is in the store."""
        database = sqlite3.connect(self.folder / "store.db")
        if self.plain:
            rows = database.execute("SELECT number FROM plain")
            return Counter(int(number) for (number,) in rows)
        rows = database.execute("SELECT payload FROM messages WHERE kind = 'window'")
        return Counter(msgspec.json.decode(payload, type=Window).frames for (payload,) in rows)


def run(case: str, *, messages: int, rate: float, plain: bool) -> Outcome:
    """Run one case to its end."""
    folder = Path(tempfile.mkdtemp(prefix="eyas-kill-"))
    rig = Rig(folder, messages=messages, rate=rate, plain=plain)
    started = time.monotonic()
    end = started + _GIVE_UP_S
    try:
        rig.start(_ALL)
        for part, verb, who in CASES[case]:
            while rig.made() < part * messages and time.monotonic() < end:
                time.sleep(0.02)
            if verb == "kill":
                rig.kill(who)
                time.sleep(_DOWN_S)
            else:
                rig.start(who)
        while not rig.device_ended() and time.monotonic() < end:
            time.sleep(0.1)
        if plain:
            time.sleep(3.0)  # the script says nothing of what is on its way
        kept = {int(line) for line in (folder / "cam.kept").read_text().split()}
        stored = rig.stored()
        return Outcome(
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
        shutil.rmtree(folder, ignore_errors=True)


def matrix(cases: Sequence[str], *, messages: int, plain: bool, rate: float = 400.0, at_once: int = 3) -> list[Outcome]:
    """Run cases, some of them at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda case: run(case, messages=messages, rate=rate, plain=plain), cases))


def main() -> None:
    """Run and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--case", action="append", choices=list(CASES), help="all by default; may be given again")
    parser.add_argument("--plain", action="store_true", help="the plain script instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    outcomes = matrix(given.case or list(CASES), messages=given.messages, plain=given.plain)
    for o in outcomes:
        print(
            f"{o.case:30} {o.messages:6} messages  {o.lost:5} lost  {o.twice:5} twice  {o.seconds:6.1f} s"
            f"{'' if o.finished else '  NOT FINISHED'}"
        )
    if given.json:
        tree = {
            "machine": machine() | {"isa": isa()},
            "versions": versions(),
            "outcomes": msgspec.to_builtins(outcomes),
        }
        given.json.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
