"""Power cuts of a flashed board at random moments, and what has to hold after each.

The truth is in the collector's store: windows of one start of the board follow each other without a gap, and the last
one ends when the power was cut, each to the seconds that the device may lose by its own word (`telemetry.sync_s`).

One flash is cut at several moments: at each but the last, the emulator is stopped for an instant by SIGSTOP, its disk
and the store are copied, and it goes on. A file on this machine is the same after SIGSTOP as after SIGKILL: what the
emulator or its board have in memory is not in it. Each copy then starts as a board whose power was cut at that moment.
At the last moment the emulator is killed.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from eyas_device.bundle import MANIFEST, sha256
from tests.support.brokers import Broker

from .flashing import FLASH_S, device_toml, flash, flash_words
from .machine import Board

WINDOW_S = 0.5
SYNC_S = 2.0
SLACK_S = 1.5
"""What the clock of the cut is uncertain by, with the window that was being filled: an emulated board stutters."""
_LATE_S = 0.9
"""How late the agent may look at its clock when it ends a window."""
_ANSWER_S = 600
"""How long a board may take to answer where other programs use the processor; alone it takes about 20 s."""
NO_ANSWER = "does not answer"
_SENT, _VERIFIED = "bundle sent", "golden check passed"
"""What a flash says before the new bundle is checked, and when it is the current one."""
_BEFORE_A_RESTART = (_VERIFIED, " written", "health")
"""What a flash says before it restarts the service, at the latest."""
_MOMENTS: tuple[tuple[str, float], ...] = (("", 15.0), (_SENT, 8.0), (_VERIFIED, 8.0), (_VERIFIED, 2.0))
"""When a flash is cut: up to so many seconds after it began, or after it said this."""
_EARLY = 0.25
"""How often the emulator is killed at any of these moments, which ends the flash, and not at the last."""
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
    """Whether a flash had said that the new bundle is the current one."""
    killed: bool = True
    """Whether the emulator was killed; if not, this is a copy of the disk of a stopped one."""
    phase: str = ""
    """What a flash had said last."""
    waited_s: float = 0.0
    """How long the emulator waited for a processor shortly before the cut: no real board stands still so."""

    @property
    def beyond(self) -> bool:
        """Whether more was lost than a device may lose."""
        return self.lost_s > SYNC_S + SLACK_S + self.waited_s

    @property
    def ok(self) -> bool:
        """Whether all that is promised was kept."""
        return not self.problem and self.doubled == 0 and not self.beyond


class Span(NamedTuple):
    """When a window began and ended, by the board's uptime, and what was measured in it."""

    begin: float
    end: float
    measured: str = ""
    """Empty if no frame was predicted."""


class Windows(msgspec.Struct, frozen=True):
    """The windows of one start of the board, for each start of its agent in order."""

    runs: tuple[tuple[Span, ...], ...]

    def longest_gap(self, end: float | None) -> float:
        """The longest time without a window up to `end`; None: within the runs alone, where the agent was restarted."""
        runs = self.runs if end is None else [[*(span for run in self.runs for span in run), Span(end, end)]]
        gaps = [later.begin - before.end for run in runs for before, later in pairwise(run)]
        return max(gaps, default=end or 0.0)

    def doubled(self) -> int:
        """How many hold the same measurements as another one, or cover time that the one before covers too.

        A busy board looks at its clock late, so that windows seem to overlap by part of a second.
        """
        spans = sorted(span for run in self.runs for span in run)
        measured = [span.measured for span in spans if span.measured]
        shared = [min(before.end, later.end) - later.begin for before, later in pairwise(spans)]
        return len(measured) - len(set(measured)) + sum(seconds > _LATE_S for seconds in shared)

    def __len__(self) -> int:
        return sum(map(len, self.runs))


class _Moment(msgspec.Struct, frozen=True):
    """A cut: when it was, and what is left of it."""

    folder: Path
    """Disk and store as they were."""
    after_s: float
    phase: str
    killed: bool
    uptime: float
    """The board's, seconds."""
    boot: str
    begun: float
    """Uptime from which on windows count."""
    restarts: bool
    """Whether a flash was so far that it restarts the service: then no window need reach up to the cut."""
    switched: bool
    """Whether a flash had said that the new bundle is the current one."""
    waited_s: float
    """How long the emulator had waited for a processor shortly before."""


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
        self._on = board
        self._waits: deque[tuple[float, float]] = deque()  # moment, and how long the emulator had waited until then
        self._digests = [sha256(bundle / MANIFEST) for bundle in bundles]
        self._broker = Broker(folder).start()
        self._own_store = self._store = folder / "fleet.db"
        self._log = (folder / "collector.log").open("ab")
        self._collector = self._start_collector(self._store)
        self._boot, self._zero, self._begun, self._met = "", 0.0, 0.0, 0.0
        self._current, self._next = 0, 1  # what answers, and what the next flash brings
        self._check_s = dict(_MOMENTS)[_SENT]  # how long a flash checks the new bundle

    def flash_first(self) -> float:
        """Bring the first bundle and the configuration to the board, and wait until it answers; the flash's seconds."""
        self.board.start().wait_ssh()
        since = time.monotonic()
        flash(self.board, self.bundles[0], "--config", str(self._config()), wheels=self._wheels)
        seconds = time.monotonic() - since
        self._meet(self.board, since)
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
        self._meet(self.board, since, begun)
        assert not (problem := self._problem(self.board)), f"{problem}\n{self._service(self.board)}"

    def cut(self, kind: Kind, dice: random.Random, *, moments: int = len(_MOMENTS)) -> Iterator[Cut]:
        """Cut the power at a random moment, of a flash at several; switch on again each time, and look.

        What a cut left, disk and store, stays in a folder of its own if it was not good.
        """
        if kind == "flashing":
            taken = self._cut_flash(dice, moments)
        else:
            taken = [self._cut_run(dice, offline=kind == "offline")]
        try:
            while taken:
                moment = taken.pop(0)
                cut = self._judge_killed(kind, moment) if moment.killed else self._judge_copy(kind, moment)
                if cut.ok:
                    shutil.rmtree(moment.folder)
                yield cut
        finally:  # what nobody looks at any more
            for moment in taken:
                shutil.rmtree(moment.folder)

    def _judge_killed(self, kind: Kind, moment: _Moment) -> Cut:
        self._collect(self._own_store)
        return self._judge(self.board, kind, moment)

    def _judge_copy(self, kind: Kind, moment: _Moment) -> Cut:
        self._collect(moment.folder / "fleet.db")
        own = self.board
        board = Board(moment.folder, own.image, memory_mb=own.memory_mb, processor=own.processor, cores=own.cores)
        try:
            return self._judge(board, kind, moment)
        finally:
            board.close()

    def _judge(self, board: Board, kind: Kind, moment: _Moment) -> Cut:
        """Switch a board on after a cut, and look at what it does and at what it sent of the time before."""
        self._on = board
        self._waits.clear()
        boot, begun = moment.boot, moment.begun
        since = self._met = time.monotonic()
        try:
            self._meet(board.start().wait_ssh(_ANSWER_S), since)
            problem = self._problem(board)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            problem = f"{NO_ANSWER}: {error}"
        # what the spool kept comes within the first moments of the new connection
        windows = self._settled(boot, begun)
        return Cut(
            kind=kind,
            after_s=round(moment.after_s, 2),
            answered_s=round(self._met - since, 1),
            model=self._digests[self._current][:12],
            problem=problem,
            lost_s=round(windows.longest_gap(None if moment.restarts else moment.uptime), 2),
            doubled=windows.doubled(),
            switched=moment.switched,
            killed=moment.killed,
            phase=moment.phase,
            waited_s=round(moment.waited_s, 2),
        )

    def interrupt(self) -> None:
        """End the board that is on: another thread that waits for it sees that."""
        self._on.close()

    def close(self) -> None:
        """End everything; the board's disk and the store stay."""
        self.board.close()
        self._collector.terminate()
        self._collector.wait(60)
        self._broker.stop()
        self._log.close()

    def _config(self) -> Path:
        file = device_toml(self._folder, self._broker.port, f"window_s = {WINDOW_S}\nsync_s = {SYNC_S}\n")
        text = file.read_text().replace("[loop]", "frozen_s = 0.0\n[loop]")  # the image stands still
        file.write_text(text.replace("fps = 10.0", "fps = 4.0"))  # two frames in each window are enough
        return file

    def _cut_run(self, dice: random.Random, *, offline: bool) -> _Moment:
        if offline:
            self._broker.stop()
        after, since = dice.uniform(0.5, 10), time.monotonic()
        while (left := since + after - time.monotonic()) > 0:
            self._pause(min(left, 0.2))
        moment = self._cut_power(after)
        if offline:
            self._broker.start()
        return moment

    def _cut_flash(self, dice: random.Random, moments: int) -> list[_Moment]:
        """Cut a flash of the other bundle; a moment that comes after its end is left out."""
        longest, lines = {_SENT: self._check_s}, list[str]()
        plan = [(said, dice.uniform(0, longest.get(said, seconds))) for said, seconds in dice.sample(_MOMENTS, moments)]
        plan.sort(key=lambda one: (("", _SENT, _VERIFIED).index(one[0]), one[1]))
        last = plan.pop(dice.randrange(moments) if dice.random() < _EARLY else -1)
        words = flash_words(self.board, self.bundles[self._next], self._wheels)
        log, taken, started = self._folder / "flash.log", [], time.monotonic()
        with log.open("wb") as stream:
            flashing = subprocess.Popen([sys.executable, "-m", "eyas_host", *words], stdout=stream, stderr=stream)
        seen = {"": started}
        while flashing.poll() is None:
            now, text = time.monotonic(), log.read_text(errors="replace")
            seen |= {said: now for said in (_SENT, _VERIFIED) if said in text and said not in seen}
            self._check_s = seen[_VERIFIED] - seen[_SENT] if _VERIFIED in seen else self._check_s
            lines = text.splitlines()
            due = [(said, delay) for said, delay in (*plan, last) if said in seen and now >= seen[said] + delay]
            if last in due:
                break
            for one in due:
                plan.remove(one)
                taken.append(self._copy_disk(now - started, lines))
            self._pause(0.05)
        taken.append(self._cut_power(time.monotonic() - started, lines))
        flashing.wait(FLASH_S)
        return taken

    def _cut_power(self, after: float, said: Sequence[str] = ()) -> _Moment:
        waited = self._waited()
        self.board.power_cut()
        return self._moment(after, said, waited, killed=True)

    def _copy_disk(self, after: float, said: Sequence[str]) -> _Moment:
        waited = self._waited()
        with self.board.stopped():
            return self._moment(after, said, waited, killed=False)

    def _moment(self, after: float, said: Sequence[str], waited: float, *, killed: bool) -> _Moment:
        """Keep disk and store as they are at this moment, at which a flash has said so much."""
        uptime = time.monotonic() - self._zero
        folder = Path(tempfile.mkdtemp(prefix="cut-", dir=self._folder))
        shutil.copyfile(self.board.disk, folder / self.board.disk.name)
        with closing(sqlite3.connect(self._store)) as store, closing(sqlite3.connect(folder / "fleet.db")) as copy:
            store.backup(copy)
        phase = said[-1].partition(": ")[2] if said else ""
        restarts = any(word in line for line in said for word in _BEFORE_A_RESTART)
        switched = any(_VERIFIED in line for line in said)
        return _Moment(folder, after, phase, killed, uptime, self._boot, self._begun, restarts, switched, waited)

    def _collect(self, store: Path) -> None:
        """Let the collector write to another store, with a broker that knows nothing of the one before."""
        if store == self._store:
            return
        self._collector.terminate()
        self._collector.wait(60)
        self._broker.stop()
        self._broker.start()
        self._store, self._collector = store, self._start_collector(store)

    def _start_collector(self, store: Path) -> subprocess.Popen[bytes]:
        words = ["collect", "--broker", f"127.0.0.1:{self._broker.port}", "--store", f"sqlite:///{store}"]
        return subprocess.Popen(
            [sys.executable, "-m", "eyas_host", *words], stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL
        )

    def _meet(self, board: Board, since: float, begun: float = 0.0) -> None:
        """Wait for the first window since this start of a board, or since `begun`, and learn the board's clock."""
        self._boot, self._begun = board.run("cat /proc/sys/kernel/random/boot_id").stdout[:8], begun
        self._met = since
        self._zero = min(self._started(board) for _ in range(3))[1]
        deadline = time.monotonic() + _ANSWER_S
        while not self._answers(self._boot, begun):
            assert board.running and time.monotonic() < deadline, self._service(board)
            self._pause(0.25)
        self._met = time.monotonic()

    def _started(self, board: Board) -> tuple[float, float]:
        """How long the board took to tell its uptime, and when it started by this machine's clock."""
        before = time.monotonic()
        uptime = float(board.run("cat /proc/uptime").stdout.split()[0])
        took = time.monotonic() - before
        return took, before + took / 2 - uptime

    def _problem(self, board: Board) -> str:
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
        seen = board.run("cd /var/lib/eyas/slots && readlink current && sha256sum a/* b/*", check=False)
        linked, *lines = seen.stdout.splitlines() or [""]
        for line in lines:
            digest, path = line.split(maxsplit=1)
            found.setdefault(path[:1], {})[path[2:]] = digest
        installed = found.get(linked, {}).get(MANIFEST)
        self._next = 1 - self._digests.index(installed) if installed in self._digests else 1 - self._current
        held = [slot for slot, files in found.items() if wanted.items() <= files.items()]
        return "" if held else f"no slot holds {bundle}: {found}"

    def _settled(self, boot: str, begun: float) -> Windows:
        """The windows of an earlier start, once no more of them arrive."""
        count, since = -1, time.monotonic()
        while time.monotonic() - since < 3:
            windows = self._windows(boot, begun)
            if len(windows) != count:
                count, since = len(windows), time.monotonic()
            self._pause(0.25)
        return windows

    def _pause(self, seconds: float) -> None:
        """Sleep, and note how long the emulator has waited for a processor."""
        if self._on.running:
            self._waits.append((time.monotonic(), self._on.waited_s()))
        time.sleep(seconds)

    def _waited(self) -> float:
        """How long the emulator waited for a processor in the time of which a cut may cost the windows."""
        now, waited = time.monotonic(), self._on.waited_s()
        while len(self._waits) > 1 and now - self._waits[1][0] >= SYNC_S + SLACK_S:
            self._waits.popleft()
        return waited - self._waits[0][1] if self._waits else 0.0

    def _rows(self, query: str, *values: object) -> list[tuple[str, ...]]:
        if not self._store.exists():
            return []
        with closing(sqlite3.connect(f"file:{self._store}?mode=ro", uri=True, timeout=30)) as store:
            try:
                return store.execute(query, values).fetchall()
            except sqlite3.OperationalError:  # the collector is making its tables
                return []

    def _answers(self, boot: str, begun: float) -> bool:
        """Whether there is a window of that start, since `begun`, in which frames were predicted."""
        rows = self._rows("select payload from messages where kind = 'window' and boot = ?", boot)
        return any(
            window["frames"] and window["uptime_s"] > begun for window in map(json.loads, (row[0] for row in rows))
        )

    def _windows(self, boot: str, begun: float) -> Windows:
        rows = self._rows("select payload from messages where kind = 'window' and boot = ?", boot)
        runs: dict[int, list[Span]] = {}
        for window in (json.loads(payload) for (payload,) in rows):
            begin = window["uptime_s"] - window.get("seconds", 0.0)
            measured = (
                json.dumps([window["latency_ms"], window["age_ms"], window["counts"]]) if window["frames"] else ""
            )
            span = Span(begin, window["uptime_s"], measured)
            if span.begin >= begun:  # each start of an agent has a block of sequences of its own
                runs.setdefault(window["sequence"] >> 32, []).append(span)
        return Windows(tuple(tuple(sorted(runs[block])) for block in sorted(runs)))

    def _newest(self, boot: str) -> dict[str, str]:
        query = "select payload from messages where kind = 'window' and boot = ? order by sequence desc limit 1"
        rows = self._rows(query, boot)
        return json.loads(rows[0][0]) if rows else {}

    def _service(self, board: Board) -> str:
        return board.run("systemctl status eyas-device --no-pager --lines 30", check=False).stdout
