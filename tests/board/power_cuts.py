"""Power cuts of a flashed board at random moments, and what has to hold after each.

The truth is in the collector's store: windows of one start of the board follow each other without a gap, and the last
one ends when the power was cut, each to the seconds that the device may lose by its own word (`telemetry.sync_s`).
"""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from eyas_device.bundle import MANIFEST, sha256
from tests.support.brokers import Broker

from .flashing import FLASH_S, device_toml, flash, flash_words
from .machine import Board

WINDOW_S = 0.5
SYNC_S = 2.0
SLACK_S = 1.5
"""What the clock of the cut is uncertain by, with the window that was being filled: an emulated board stutters."""
_ANSWER_S = 400
NO_ANSWER = "does not answer"
_VERIFIED = "golden check passed"
Kind = Literal["running", "offline", "flashing"]


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a power cut."""

    kind: Kind
    """What the board did: reported, reported without a broker, or was being flashed."""
    after_s: float
    """When the power was cut: seconds after the board answered, or after the flash began."""
    answered_s: float
    """From power on to the first window of the new start in the store."""
    model: str
    """Digest of the manifest that answers afterwards."""
    problem: str
    """Why that is not one of the two bundles, or its slot not as its manifest says; empty if all is well."""
    lost_s: float
    """The longest time before the cut, or between two windows of that start, that no window covers."""
    doubled: int
    """Windows of that start that cover a time that another one covers."""
    switched: bool = False
    """Whether a flash was far enough for the other bundle to answer."""

    @property
    def ok(self) -> bool:
        """Whether all that is promised was kept."""
        return not self.problem and self.doubled == 0 and self.lost_s <= SYNC_S + SLACK_S


Span = tuple[float, float]
"""When a window began and ended, by the board's uptime."""


class Windows(msgspec.Struct, frozen=True):
    """The windows of one start of the board, for each start of its agent in order."""

    runs: tuple[tuple[Span, ...], ...]

    def longest_gap(self, end: float | None) -> float:
        """The longest time without a window up to `end`; None: within the runs alone, where the agent was restarted."""
        runs = self.runs if end is None else [[*(span for run in self.runs for span in run), (end, end)]]
        gaps = [later[0] - before[1] for run in runs for before, later in pairwise(run)]
        return max(gaps, default=end or 0.0)

    def doubled(self) -> int:
        """How many begin before half of their predecessor was over."""
        spans = sorted(span for run in self.runs for span in run)
        return sum(later[0] < (before[0] + before[1]) / 2 for before, later in pairwise(spans))

    def __len__(self) -> int:
        return sum(map(len, self.runs))


class Rig:
    """A flashed board, a broker and a collector.

    Args:
        board: It is off, and bare or flashed by an earlier rig in the same folder.
        folder: Where broker, store and configuration lie.
        bundles: The two that take turns.
        wheels: What the board is flashed from, as it was before.

    """

    def __init__(self, board: Board, folder: Path, bundles: Sequence[Path], wheels: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.board, self.bundles, self._folder, self._wheels = board, tuple(bundles), folder, wheels
        self._digests = [sha256(bundle / MANIFEST) for bundle in bundles]
        self._broker = Broker(folder).start()
        self._store = folder / "fleet.db"
        self._log = (folder / "collector.log").open("ab")
        command = [sys.executable, "-m", "eyas_host", "collect", "--broker", f"127.0.0.1:{self._broker.port}"]
        command += ["--store", f"sqlite:///{self._store}"]
        self._collector = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        self._boot, self._zero, self._begun, self._met, self._cut_at = "", 0.0, 0.0, 0.0, 0.0
        self._current = 0
        self._flash_s = 120.0  # a flash is cut within this time, until one has shown how long it takes

    def flash_first(self) -> float:
        """Bring the first bundle and the configuration to the board, and wait until it answers; the flash's seconds."""
        self.board.start().wait_ssh()
        since = time.monotonic()
        flash(self.board, self.bundles[0], "--config", str(self._config()), wheels=self._wheels)
        seconds = time.monotonic() - since
        self._meet(since)
        return seconds

    def flash_again(self) -> float:
        """Flash the same bundle again, which changes nothing; its seconds."""
        since = time.monotonic()
        assert "unchanged" in flash(self.board, self.bundles[self._current], wheels=self._wheels).stdout
        return time.monotonic() - since

    def resume(self) -> None:
        """Start a board that was flashed earlier: its broker has another port now."""
        since = time.monotonic()
        self.board.start().wait_ssh()
        text = self._config().read_text()  # into the file that is there: owner and mode stay
        change = "systemctl stop eyas-device && cat >/etc/eyas/device.toml && sync && cat /proc/uptime"
        begun = float(self.board.run(change, stdin=text, timeout=400).stdout.split()[0])
        self.board.run("systemctl start eyas-device", timeout=400)
        self._meet(since, begun)
        assert not (problem := self._problem()), f"{problem}\n{self._service()}"

    def cut(self, kind: Kind, dice: random.Random) -> Cut:
        """Cut the power at a random moment, switch on again, and look."""
        (self._folder / "flash.log").unlink(missing_ok=True)
        after = self._cut_flash(dice) if kind == "flashing" else self._cut_run(dice, offline=kind == "offline")
        boot, begun, ended, before = self._boot, self._begun, self._cut_at, self._current
        since = self._met = time.monotonic()
        try:
            self.board.start().wait_ssh()
            self._meet(since)
            problem = self._problem()
        except AssertionError as error:
            problem = f"{NO_ANSWER}: {error}"
        # what the spool kept comes within the first moments of the new connection
        windows = self._settled(boot, begun)
        return Cut(
            kind=kind,
            after_s=round(after, 2),
            answered_s=round(self._met - since, 1),
            model=self._digests[self._current][:12],
            problem=problem,
            lost_s=round(windows.longest_gap(None if self._restarts() else ended), 2),
            doubled=windows.doubled(),
            switched=before != self._current,
        )

    def close(self) -> None:
        """End everything; the board's disk and the store stay."""
        self.board.close()
        self._collector.terminate()
        self._collector.wait(60)
        self._broker.stop()
        self._log.close()

    def _config(self) -> Path:
        return device_toml(self._folder, self._broker.port, f"window_s = {WINDOW_S}\nsync_s = {SYNC_S}\n")

    def _cut_run(self, dice: random.Random, *, offline: bool) -> float:
        if offline:
            self._broker.stop()
        after = dice.uniform(0.5, 10)
        time.sleep(after)
        self._cut_power()
        if offline:
            self._broker.start()
        return after

    def _cut_flash(self, dice: random.Random) -> float:
        """Cut a flash of the other bundle; one that is faster is cut when it ends, and the next ones earlier."""
        words = flash_words(self.board, self.bundles[1 - self._current], self._wheels)
        after, started = dice.uniform(0.5, self._flash_s), time.monotonic()
        with (self._folder / "flash.log").open("wb") as log:
            flashing = subprocess.Popen([sys.executable, "-m", "eyas_host", *words], stdout=log, stderr=log)
            with suppress(subprocess.TimeoutExpired):
                flashing.wait(after)
                after = self._flash_s = time.monotonic() - started
            self._cut_power()
            flashing.wait(FLASH_S)
        return after

    def _restarts(self) -> bool:
        """Whether the last flash was so far that it restarts the service: then no window need reach up to the cut."""
        log = self._folder / "flash.log"
        return log.exists() and _VERIFIED in log.read_text(errors="replace")

    def _cut_power(self) -> None:
        self.board.power_cut()
        self._cut_at = time.monotonic() - self._zero

    def _meet(self, since: float, begun: float = 0.0) -> None:
        """Wait for the first window since this start of the board, or since `begun`, and learn the board's clock."""
        self._boot, self._begun = self.board.run("cat /proc/sys/kernel/random/boot_id").stdout[:8], begun
        self._met = since
        self._zero = min(self._started() for _ in range(3))[1]
        deadline = time.monotonic() + _ANSWER_S
        while not len(self._windows(self._boot, begun)):
            assert time.monotonic() < deadline, self._service()
            time.sleep(0.25)
        self._met = time.monotonic()

    def _started(self) -> tuple[float, float]:
        """How long the board took to tell its uptime, and when it started by this machine's clock."""
        before = time.monotonic()
        uptime = float(self.board.run("cat /proc/uptime").stdout.split()[0])
        took = time.monotonic() - before
        return took, before + took / 2 - uptime

    def _problem(self) -> str:
        """Why the service does not run one of the two bundles as its manifest says; empty if it does.

        The windows tell which manifest the agent runs; the hashes of the files are the system's own program's.
        """
        reported = self._newest(self._boot)["digest"]
        if reported not in (digests := [digest[:12] for digest in self._digests]):
            return f"its windows are of {reported or 'no model'}"
        self._current = digests.index(reported)
        bundle = self.bundles[self._current]
        wanted = {path.name: sha256(path) for path in bundle.iterdir()}
        found: dict[str, dict[str, str]] = {}
        for line in self.board.run("cd /var/lib/eyas/slots && sha256sum a/* b/*", check=False).stdout.splitlines():
            digest, path = line.split(maxsplit=1)
            found.setdefault(path[:1], {})[path[2:]] = digest
        held = [slot for slot, files in found.items() if wanted.items() <= files.items()]
        return "" if held else f"no slot holds {bundle}: {found}"

    def _settled(self, boot: str, begun: float) -> Windows:
        """The windows of an earlier start, once no more of them arrive."""
        count, since = -1, time.monotonic()
        while time.monotonic() - since < 3:
            windows = self._windows(boot, begun)
            if len(windows) != count:
                count, since = len(windows), time.monotonic()
            time.sleep(0.25)
        return windows

    def _rows(self, query: str, *values: object) -> list[tuple[str, ...]]:
        if not self._store.exists():
            return []
        with closing(sqlite3.connect(f"file:{self._store}?mode=ro", uri=True, timeout=30)) as store:
            try:
                return store.execute(query, values).fetchall()
            except sqlite3.OperationalError:  # the collector is making its tables
                return []

    def _windows(self, boot: str, begun: float) -> Windows:
        rows = self._rows("select payload from messages where kind = 'window' and boot = ?", boot)
        found = [window for row in rows if (window := json.loads(row[0]))["frames"]]
        runs: dict[int, list[Span]] = {}
        for window in found:
            span = (window["uptime_s"] - window.get("seconds", 0.0), window["uptime_s"])
            if span[0] >= begun:  # each start of an agent has a block of sequences of its own
                runs.setdefault(window["sequence"] >> 32, []).append(span)
        return Windows(tuple(tuple(sorted(runs[block])) for block in sorted(runs)))

    def _newest(self, boot: str) -> dict[str, str]:
        query = "select payload from messages where kind = 'window' and boot = ? order by sequence desc limit 1"
        rows = self._rows(query, boot)
        return json.loads(rows[0][0]) if rows else {}

    def _service(self) -> str:
        return self.board.run("systemctl status eyas-device --no-pager --lines 30", check=False).stdout
