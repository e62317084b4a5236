"""Power cuts of an emulated board, while it reports and while it is flashed (`make soak-board`), and its first hour.

    python benchmarks/board.py [--cuts 100] [--boards 2] [--minutes M] [--reflash | --fresh]
        [--json FILE] [--record FILE]
    python benchmarks/board.py --walk [--cold] [--json FILE] [--record FILE]
    python benchmarks/board.py --quick [--json FILE]

A cut is a SIGKILL of the emulator: what the board's kernel had not written is lost. One flash is cut at four moments:
three times the emulator is stopped, and a copy of its disk starts as a board of its own; then it is killed. Every cut
is noted beside the boards' disks at once, and a later run goes on from there until each kind has `--cuts`: with
`--reflash` on bare boards with image and agent as they are now, with `--fresh` from no cut. A third of the cuts while
it reports come without a broker: all windows since the last connection then wait on the board's disk. What a cut left
that was not good stays in the folder `cut-N` of its board.

With `--walk` no power is cut: the repository is cloned and installed, a board started, a bundle trained, and the
README's section on the fleet typed until `eyas watch` shows an answer. What that took stays with the cuts, too.

With `--quick` one board of its own loses its power twice: once while it reports, and once in a flash. The flashed board
is kept for the next time; where the emulated board's image is not built yet, nothing is measured.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from board_walk import Walk, walk  # noqa: E402
from common import Figure, finish  # noqa: E402
from eyas_host.support.files import write_bytes  # noqa: E402
from eyas_host.support.machine import cpu_pressure  # noqa: E402
from tests.board.flashing import frozen_wheels, make_two_bundles  # noqa: E402
from tests.board.machine import Board, Image, base_of, cache  # noqa: E402
from tests.board.power_cuts import NO_ANSWER, SLACK_S, SYNC_S, Cut, Kind, Rig  # noqa: E402
from tests.support.tiny_bundle import write_tiny_bundle  # noqa: E402

_CYCLE: tuple[Kind, ...] = ("running", "flashing", "offline", "running")
"""A flash gives a cut for each moment at which it is cut, the others one."""
_MOMENTS = 4
"""At which one flash is cut, at most."""
_NOTES, _WALK = "notes.json", "walk.json"
_WALK_BOUND_S = 600
_CACHES = {False: "packages and the board's image from this user's caches", True: "from empty caches"}
_MAX_DEAD = 3
"""After so many cuts without an answer, a person should look first."""
_PROCESSOR = "cortex-a76"
"""A Raspberry Pi 5's, which is faster to emulate than a 4's: what a power cut leaves does not depend on it."""
_CORES = 1
"""Each emulated core is a thread here: two boards of one core fill two cores, and wait for no lock that sleeps."""


class Notes(msgspec.Struct, kw_only=True):
    """What the runs so far have seen."""

    first_flash_s: float | None = None
    again_s: float | None = None
    cuts: list[Cut] = []


def main() -> None:
    """Cut the power until there are enough cuts, and report all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100, metavar="N", help="while it reports, and as many in a flash")
    parser.add_argument("--boards", type=int, default=2, metavar="N", help="at the same time (default 2)")
    parser.add_argument("--minutes", type=float, default=0, metavar="M", help="stop after this time (0: never)")
    parser.add_argument("--reflash", action="store_true", help="go on with bare boards and the agent as it is now")
    parser.add_argument("--fresh", action="store_true", help="forget the cuts of earlier runs")
    parser.add_argument(
        "--quick", action="store_true", help="two cuts of one board; skipped where its image is not built (minutes)"
    )
    parser.add_argument("--walk", action="store_true", help="from an empty clone to a camera in eyas watch; no cuts")
    parser.add_argument("--cold", action="store_true", help="with --walk: from empty caches, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="all cuts; where the cache is gone, it goes on here"
    )
    chosen = parser.parse_args()
    if chosen.quick and (chosen.walk or chosen.record or chosen.reflash or chosen.fresh):
        parser.error("--quick has a board of its own: of the other options only --json goes with it")
    if chosen.quick and not Image.of_the_recipe().disk.exists():
        print("skipped: the image of the emulated board is not built (`make board` builds it)")
        return
    before, folder = cpu_pressure(), cache() / "soak"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if chosen.quick:
        soak = Soak(cache() / "quick-soak", 1, float("inf"), moments=1, afresh=True)
        soak.run(1)
        finish(figures(soak.notes, 1, None), before, chosen.json)
        return
    if chosen.record and chosen.record.exists() and not (folder / _NOTES).exists() and not chosen.fresh:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(chosen.record, folder / _NOTES)
    if chosen.walk:
        walked_now = walk(cold=chosen.cold)
        print(walked_now.screen)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _WALK).write_bytes(msgspec.json.encode(walked_now))
        finish(figures(notes_in(folder), chosen.cuts, walked_now), before, chosen.json)
        return
    for kept in folder.iterdir() if folder.is_dir() and (chosen.fresh or chosen.reflash) else ():
        if kept.name not in (_NOTES, _WALK) or chosen.fresh:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    soak = Soak(folder, chosen.cuts, chosen.minutes * 60 or float("inf"))
    soak.run(chosen.boards)
    if chosen.record:
        write_bytes(chosen.record, msgspec.json.format(msgspec.json.encode(soak.notes), indent=1))
    walked = msgspec.json.decode(file.read_bytes(), type=Walk) if (file := folder / _WALK).exists() else None
    finish(figures(soak.notes, chosen.cuts, walked), before, chosen.json)


def notes_in(folder: Path) -> Notes:
    """What earlier runs have noted."""
    file = folder / _NOTES
    return msgspec.json.decode(file.read_bytes(), type=Notes) if file.exists() else Notes()


class Soak:
    """Boards whose power is cut, one in each thread, and what they have seen so far.

    Args:
        folder: Where all of it is kept; what an earlier run left there is gone on with.
        wanted: Cuts of each kind.
        seconds: When to stop before there are so many.
        moments: At which one flash is cut.
        afresh: Forget the cuts of earlier runs; the flashed board is kept.

    """

    def __init__(
        self, folder: Path, wanted: int, seconds: float, *, moments: int = _MOMENTS, afresh: bool = False
    ) -> None:
        self._moments, self._afresh = moments, afresh
        self.notes, self._noted = Notes(), folder / _NOTES
        self._folder, self._wanted, self._until = folder, wanted, time.monotonic() + seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._started = self._dead = 0
        self._rigs: list[Rig] = []

    def run(self, boards: int) -> None:
        """Go on where the last run ended, until there are enough cuts, or several boards do not answer."""
        base = self._prepare()
        if self._afresh:
            self.notes.cuts = []
        self._started = len(self.notes.cuts)
        threads = [threading.Thread(target=self._work, args=(base, f"{number}")) for number in range(boards)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):  # after Ctrl-C, `join` would not wait any more
            try:
                time.sleep(0.2)
            except KeyboardInterrupt:
                print("interrupted; the next run goes on from here", file=sys.stderr)
                self._stop.set()
            for rig in list(self._rigs) if self._stop.is_set() else ():
                rig.interrupt()

    def _prepare(self) -> Board:
        """A board that is flashed and off, from which each thread's board begins."""
        folder, base = self._folder, self._folder / "base"
        self.notes = notes_in(folder)
        if base.exists():
            return Board(base, Image(base_of(base / "disk.qcow2").parent), processor=_PROCESSOR, cores=_CORES)
        for part in (folder / "tiny", folder / "bundles", part_of_base := folder / "base.part"):
            shutil.rmtree(part, ignore_errors=True)
        make_two_bundles(write_tiny_bundle(folder / "tiny"), folder / "bundles")
        rig = self._rig(Board(part_of_base, Image.build(), processor=_PROCESSOR, cores=_CORES), folder / "first")
        try:
            self.notes.first_flash_s, self.notes.again_s = rig.flash_first(), rig.flash_again()
            rig.board.stop()
        finally:
            rig.close()
        self._note()
        part_of_base.rename(base)
        return Board(base, rig.board.image, processor=_PROCESSOR, cores=_CORES)

    def _rig(self, board: Board, folder: Path) -> Rig:
        wheels = frozen_wheels(self._folder / "wheels")
        return Rig(board, folder, sorted((self._folder / "bundles").iterdir()), wheels)

    def _work(self, base: Board, name: str) -> None:
        """Cut the power of one board as long as cuts are missing; one that does not answer is kept, and replaced."""
        while self._goes_on() and not self._cut(base, folder := self._folder / f"board-{name}"):
            folder.rename(Path(tempfile.mkdtemp(prefix=f"board-{name}-dead-", dir=self._folder)))

    def _goes_on(self) -> bool:
        """Whether nothing asks to stop."""
        return not self._stop.is_set() and time.monotonic() < self._until

    def _cut(self, base: Board, folder: Path) -> bool:
        """Cut the power of the board in `folder` as long as cuts are missing; False if it does not answer any more."""
        if (folder / "disk.qcow2").exists():
            board = Board(folder, base.image, processor=_PROCESSOR, cores=_CORES)
        else:
            board = base.copy(folder)
        rig = self._rig(board, folder / "rig")
        self._rigs.append(rig)
        try:
            rig.resume()
            while self._goes_on() and (kind := self._next()):
                for cut in rig.cut(*kind, moments=self._moments):
                    if self._stop.is_set():
                        break
                    self._add(cut, folder.name)
                    if cut.killed and cut.problem.startswith(NO_ANSWER):
                        return False
        except (AssertionError, subprocess.SubprocessError):
            if not self._stop.is_set():
                raise
        finally:
            self._rigs.remove(rig)
            rig.close()
        return True

    def _next(self) -> tuple[Kind, random.Random] | None:
        """The kind of the next cut, and its dice; None if there are enough."""
        with self._lock:
            flashing = sum(cut.kind == "flashing" for cut in self.notes.cuts)
            running = len(self.notes.cuts) - flashing
            if flashing >= self._wanted and running >= self._wanted:
                return None
            kind = _CYCLE[self._started % len(_CYCLE)]
            if flashing >= self._wanted:
                kind = "offline" if self._started % 3 == 0 else "running"
            elif running >= self._wanted:
                kind = "flashing"
            self._started += 1
            return kind, random.Random(self._started)

    def _add(self, cut: Cut, name: str) -> None:
        with self._lock:
            self.notes.cuts.append(cut)
            self._note()
            print(f"{len(self.notes.cuts):4} {name} {'ok ' if cut.ok else 'BAD'} {cut}", flush=True)
            self._dead += cut.problem.startswith(NO_ANSWER)
        if self._dead >= _MAX_DEAD:
            self._stop.set()

    def _note(self) -> None:
        part = self._noted.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(self.notes))
        part.replace(self._noted)


def figures(notes: Notes, wanted: int, walked: Walk | None) -> dict[str, Figure]:
    """What is claimed of power cuts and of the first hour."""
    running = [cut for cut in notes.cuts if cut.kind != "flashing"]
    flashing = [cut for cut in notes.cuts if cut.kind == "flashing"]
    answered = [cut.answered_s for cut in notes.cuts]
    lost = [cut.lost_s for cut in notes.cuts]
    limit = f"sync_s {SYNC_S:g} s, and {SLACK_S:g} s for the clock of the cut and the window that was being filled"

    def share(cuts: Sequence[Cut], note: str) -> Figure:
        value = float(np.mean([not cut.problem for cut in cuts])) if cuts else None
        return Figure(value=value, unit="", bound=1.0, spread=f"{len(cuts)} cuts", note=note)

    offline = sum(cut.kind == "offline" for cut in running)
    switched, killed = sum(cut.switched for cut in flashing), sum(cut.killed for cut in flashing)
    beyond = float(sum(cut.beyond for cut in notes.cuts)) if lost else None
    waited = [cut.waited_s for cut in notes.cuts if cut.waited_s]  # the first cuts do not have it
    doubled = float(sum(cut.doubled for cut in notes.cuts)) if lost else None
    return {
        "cuts_running": Figure(value=float(len(running)), unit="", bound=wanted, note=f"{offline} without a broker"),
        "cuts_flashing": Figure(
            value=float(len(flashing)),
            unit="",
            bound=wanted,
            note=f"{killed} by a kill, the others on copies of the disk; {switched} after the switch to the new bundle",
        ),
        "answers_running": share(running, "answers frames with one of the two bundles, verified"),
        "answers_flashing": share(flashing, "the same, where a flash was cut"),
        "cuts_with_a_loss": Figure(
            value=beyond,
            unit="",
            bound=0,
            better="lower",
            note=f"a gap in the windows beyond {limit}, and what the emulator waited for a processor meanwhile",
        ),
        "longest_gap_s": Figure(
            value=max(lost, default=None), unit="s", spread=f"median {np.median(lost):.2f}" if lost else "", note=limit
        ),
        "waited_s": Figure(
            value=max(waited, default=None),
            unit="s",
            better="lower",
            spread=f"median {np.median(waited):.2f} of {len(waited)}" if waited else "",
            note="that the emulator waited for a processor in the seconds before a cut: other work on this machine",
        ),
        "doubled": Figure(value=doubled, unit="", bound=0, better="lower"),
        "back_s": Figure(
            value=float(np.median(answered)) if answered else None,
            unit="s",
            spread=f"at most {max(answered):.0f}" if answered else "",
            note="from power on to the first window in the store, emulated; boards share the processor with other work",
        ),
        "first_flash_s": Figure(value=notes.first_flash_s, unit="s", note="onto a bare board, wheels from a folder"),
        "flash_again_s": Figure(value=notes.again_s, unit="s", bound=6.0, better="lower", note="the same bundle"),
        "walk_s": Figure(
            value=sum(walked.seconds.values()) if walked else None,
            unit="s",
            bound=_WALK_BOUND_S,
            better="lower",
            spread="; ".join(f"{name} {seconds:.0f}" for name, seconds in walked.seconds.items()) if walked else "",
            note="from an empty clone to a camera in `eyas watch`" + (f"; {_CACHES[walked.cold]}" if walked else ""),
        ),
    }


if __name__ == "__main__":
    main()
