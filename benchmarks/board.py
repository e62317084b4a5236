"""Power cuts of an emulated board, while it reports and while it is flashed (`make soak-board`).

    python benchmarks/board.py [--cuts 100] [--minutes M] [--fresh] [--json FILE]

A cut is a SIGKILL of the emulator: what the board's kernel had not written is lost. Every cut is noted beside the
board's disk at once, and a later run goes on from there until each kind has `--cuts`; `--fresh` begins again. A third
of the cuts while it reports come without a broker: all windows since the last connection then wait on the board's disk.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import Figure, finish  # noqa: E402
from eyas_host.support.machine import cpu_pressure  # noqa: E402
from tests.board.flashing import frozen_wheels, make_two_bundles  # noqa: E402
from tests.board.machine import Board, Image, cache  # noqa: E402
from tests.board.power_cuts import NO_ANSWER, SLACK_S, SYNC_S, Cut, Kind, Rig  # noqa: E402
from tests.support.tiny_bundle import write_tiny_bundle  # noqa: E402

_CYCLE: tuple[Kind, ...] = ("running", "flashing", "offline", "flashing", "running", "flashing")


class Notes(msgspec.Struct, kw_only=True):
    """What the runs so far have seen."""

    first_flash_s: float | None = None
    again_s: float | None = None
    cuts: list[Cut] = []


def main() -> None:
    """Cut the power until there are enough cuts, and report all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100, metavar="N", help="while it reports, and as many in a flash")
    parser.add_argument("--minutes", type=float, default=0, metavar="M", help="stop after this time (0: never)")
    parser.add_argument("--fresh", action="store_true", help="forget the cuts of earlier runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    before, folder = cpu_pressure(), cache() / "soak"
    if chosen.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    notes = soak(folder, chosen.cuts, chosen.minutes * 60 or float("inf"))
    finish(figures(notes, chosen.cuts), before, chosen.json)


def soak(folder: Path, wanted: int, seconds: float) -> Notes:
    """Go on where the last run ended."""
    until, noted = time.monotonic() + seconds, folder / "notes.json"
    bundles = folder / "bundles"
    if not noted.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_two_bundles(write_tiny_bundle(folder / "tiny"), bundles)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wheels = frozen_wheels(folder / "wheels")
    rig = Rig(Board(folder / "board", Image.build()), folder / "rig", sorted(bundles.iterdir()), wheels)
    try:
        if noted.exists():
            notes = msgspec.json.decode(noted.read_bytes(), type=Notes)
            rig.resume()
        else:
            first, again = rig.flash_first(), rig.flash_again()
            notes = Notes(first_flash_s=first, again_s=again)
        while time.monotonic() < until and (kind := _next(notes.cuts, wanted)):
            cut = rig.cut(kind, random.Random(len(notes.cuts)))
            notes.cuts.append(cut)
            part = noted.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(notes))
            part.replace(noted)
            print(f"{len(notes.cuts):4} {'ok ' if cut.ok else 'BAD'} {cut}", flush=True)
            if cut.problem.startswith(NO_ANSWER):
                break
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
    finally:
        rig.close()
    return msgspec.json.decode(noted.read_bytes(), type=Notes)


def _next(cuts: Sequence[Cut], wanted: int) -> Kind | None:
    """The kind of the next cut; None if there are enough."""
    flashing = sum(cut.kind == "flashing" for cut in cuts)
    if flashing >= wanted and len(cuts) - flashing >= wanted:
        return None
    kind = _CYCLE[len(cuts) % len(_CYCLE)]
    if kind == "flashing" and flashing >= wanted:
        return "running"
    return "flashing" if kind != "flashing" and len(cuts) - flashing >= wanted else kind


def figures(notes: Notes, wanted: int) -> dict[str, Figure]:
    """What is claimed of power cuts."""
    running = [cut for cut in notes.cuts if cut.kind != "flashing"]
    flashing = [cut for cut in notes.cuts if cut.kind == "flashing"]
    answered = [cut.answered_s for cut in notes.cuts]
    lost = [cut.lost_s for cut in notes.cuts]
    limit = f"sync_s {SYNC_S:g} s, and {SLACK_S:g} s for the clock of the cut and the window that was being filled"

    def share(cuts: Sequence[Cut], note: str) -> Figure:
        value = float(np.mean([not cut.problem for cut in cuts])) if cuts else None
        return Figure(value=value, unit="", bound=1.0, spread=f"{len(cuts)} cuts", note=note)

    offline = sum(cut.kind == "offline" for cut in running)
    switched = sum(cut.switched for cut in flashing)
    beyond = float(sum(value > SYNC_S + SLACK_S for value in lost)) if lost else None
    doubled = float(sum(cut.doubled for cut in notes.cuts)) if lost else None
    return {
        "cuts_running": Figure(value=float(len(running)), unit="", bound=wanted, note=f"{offline} without a broker"),
        "cuts_flashing": Figure(
            value=float(len(flashing)), unit="", bound=wanted, note=f"{switched} after the switch to the new bundle"
        ),
        "answers_running": share(running, "answers frames with one of the two bundles, verified"),
        "answers_flashing": share(flashing, "the same, where a flash was cut"),
        "cuts_with_a_loss": Figure(
            value=beyond, unit="", bound=0, better="lower", note=f"a gap in the windows beyond {limit}"
        ),
        "longest_gap_s": Figure(
            value=max(lost, default=None), unit="s", spread=f"median {np.median(lost):.2f}" if lost else "", note=limit
        ),
        "doubled": Figure(value=doubled, unit="", bound=0, better="lower"),
        "back_s": Figure(
            value=float(np.median(answered)) if answered else None,
            unit="s",
            spread=f"at most {max(answered):.0f}" if answered else "",
            note="from power on to the first window in the store, emulated",
        ),
        "first_flash_s": Figure(value=notes.first_flash_s, unit="s", note="onto a bare board, wheels from a folder"),
        "flash_again_s": Figure(value=notes.again_s, unit="s", bound=6.0, better="lower", note="the same bundle"),
    }


if __name__ == "__main__":
    main()
