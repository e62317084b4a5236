"""Updates: faults at every change of the disk, power cuts, sizes, a fleet and a bad version (`make bench-updates`).

    python benchmarks/updates.py [--quick] [--section NAME ...] [--json FILE]

Sections: faults (kills, full disks and errors at every change of an installation and an update), losses (power cuts of
a recorded disk), sizes (bytes over the air), swap (frames lost), host (10,000 devices), fleet (200 simulated devices, a
bad version). With `--section`, the figures of the other sections stay as they are in FILE. Needs root and a C compiler.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import Figure, finish  # noqa: E402
from eyas_host.support.machine import cpu_pressure  # noqa: E402
from sides.update_fleet import simulated_fleet  # noqa: E402
from sides.update_sizes import large_fleet, over_the_air  # noqa: E402
from sides.update_swap import frames_lost  # noqa: E402
from tests.support.fault_matrix import MORE, ONCE, Matrix, Scenario, kinds, matrix  # noqa: E402
from tests.support.faults import Fault, FaultyDisk  # noqa: E402
from tests.support.install_scenarios import install_scenarios  # noqa: E402
from tests.support.power_loss import Losses, lose_writes  # noqa: E402
from tests.support.update_scenarios import UPDATE_PROGRAMS, update_scenarios  # noqa: E402

_OPTIONS = ("", "data=writeback,noauto_da_alloc")
"""How ext4 is mounted: as usual, and as it orders the least."""
_LEAST_ORDERED = ("install, both slots full", "update, both slots full")
Figures = dict[str, Figure]


def main() -> None:
    """Run the sections and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each eighth change and flush, 60 devices: minutes")
    parser.add_argument(
        "--every", type=int, metavar="K", help="each K-th change meets each fault, each K-th flush a cut"
    )
    parser.add_argument("--section", action="append", choices=list(SECTIONS), metavar="NAME", help="only this one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    before = cpu_pressure()
    figures = _earlier(chosen.json) if chosen.section else {}
    for name in chosen.section or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="eyas-updates-", dir=_fast_folder()) as scratch:
            figures |= SECTIONS[name](Path(scratch), chosen.every or (8 if chosen.quick else 1))
    finish(figures, before, chosen.json)


def _earlier(path: Path | None) -> Figures:
    if path is None or not path.exists():
        return {}
    tree = msgspec.json.decode(path.read_bytes())
    return {name: msgspec.convert(figure, Figure) for name, figure in tree["figures"].items()}


def _fast_folder() -> str | None:
    """In memory where that is possible: the order of changes is what counts."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def scenarios(scratch: Path) -> list[Scenario]:
    """Installations, and updates over the air."""
    return [*install_scenarios(scratch / "install"), *update_scenarios(scratch / "update")]


def faults(scratch: Path, every: int) -> Figures:
    """Every change, or each `every`-th, meets a kill, a full disk and an error; a quarter the other faults."""
    results: list[Matrix] = []
    with FaultyDisk(scratch / "faults", *UPDATE_PROGRAMS) as disk:
        for scenario in scenarios(scratch):
            for chosen, thinner in ((ONCE, every), (MORE, 4 * every)):
                result = matrix(disk, scenario, scratch / "work", faults=chosen, every=thinner)
                results.append(result)
                print(_row(scenario.name, _names(chosen), result.points, result.runs, result.wrong), flush=True)
    runs, wrong = sum(r.runs for r in results), sum(len(r.wrong) for r in results)
    changes = [change for result in results[::2] for change in result.changes]
    return {
        "fault_points": Figure(
            value=float(sum(r.points for r in results[::2])),
            unit="",
            bound=100,
            spread=kinds(changes),
            note=f"changes of the disk in {len(results) // 2} scenarios; {_share(every)} met each of {_names(ONCE)}, a "
            f"quarter of that each of {_names(MORE)}",
        ),
        "fault_survived": Figure(
            value=1 - wrong / runs,
            unit="",
            bound=1.0,
            spread=f"{runs} runs",
            note="a verified bundle is current afterwards, the message is true, a second try ends in the new version",
        ),
    }


def losses(scratch: Path, every: int) -> Figures:
    """The power is cut at every flush, or each `every`-th."""
    results: list[Losses] = []
    with FaultyDisk(scratch / "faults", *UPDATE_PROGRAMS) as disk:
        for number, scenario in enumerate(scenarios(scratch)):
            for options in _OPTIONS if scenario.name in _LEAST_ORDERED else _OPTIONS[:1]:
                folder = scratch / f"disk-{number}-{len(options)}"
                result = lose_writes(disk, scenario, folder, every=every, options=options)
                results.append(result)
                mounted = f"ext4 {options}".strip()
                print(_row(scenario.name, mounted, result.flushes, result.cuts, result.wrong), flush=True)
    cuts, wrong = sum(r.cuts for r in results), sum(len(r.wrong) for r in results)
    return {
        "power_cuts": Figure(
            value=float(cuts),
            unit="",
            spread=f"{sum(r.flushes for r in results)} flushes recorded",
            note=f"behind {_share(every)} of the flushes of a recorded ext4 disk: nothing, everything, and five random "
            "parts of the later writes",
        ),
        "power_cuts_survived": Figure(
            value=1 - wrong / cuts,
            unit="",
            bound=1.0,
            spread=f"{sum(r.second_tries for r in results)} second tries",
            note="mounted again, a verified bundle is current: the new one if the command had ended",
        ),
    }


def _names(faults: Sequence[Fault]) -> str:
    return ", ".join(fault.name.lower().replace("_", " ") for fault in faults)


def _share(every: int) -> str:
    return "each" if every == 1 else f"one in {every}"


def _row(scenario: str, what: str, places: int, runs: int, wrong: Sequence[str]) -> str:
    lines = [f"{scenario:28} {what:42} {places:4} places {runs:5} runs {len(wrong):3} wrong", *wrong]
    return "\n    ".join(lines)


def sizes(scratch: Path, every: int) -> Figures:
    """Bytes over the air."""
    return over_the_air(scratch)


def swap(scratch: Path, every: int) -> Figures:
    """Frames that are lost while the model changes."""
    return frames_lost(scratch)


def host(scratch: Path, every: int) -> Figures:
    """A repository for 10,000 devices."""
    return large_fleet(scratch)


def fleet(scratch: Path, every: int) -> Figures:
    """Simulated devices take a good version and a bad one."""
    return simulated_fleet(scratch, 60 if every > 4 else 200)


SECTIONS: dict[str, Callable[[Path, int], Figures]] = {
    "faults": faults,
    "losses": losses,
    "sizes": sizes,
    "swap": swap,
    "host": host,
    "fleet": fleet,
}


if __name__ == "__main__":
    main()
