"""The loop from drift to a better version, each figure beside what it is compared with (`make bench-loop`).

    python benchmarks/loop.py [--quick] [--section NAME ...] [--json FILE] [--root FOLDER]

Sections: detection (delays at equal false alarms beside other detectors), textbook (false alarms of a textbook CUSUM),
estimate (accuracy without labels), bound (accuracy with few labels), choice-season, choice-dirt and choice-kind (which
samples to label), retrain (what comes back, and what is forgotten), promotion (versions that are no better), scale
(10,000 devices in SQLite and PostgreSQL). Drift is simulated; images are Fashion-MNIST (`apt-get install
dataset-fashion-mnist`, or unpacked below `--root`). A killed run of the same code goes on after the sections that it
had finished; with `--section`, the figures of the others stay as they are in FILE.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import quiet_first  # noqa: F401 - before the heavy imports
from bench_all import code_of
from common import Figure, finish
from eyas_host.support.files import write_bytes
from eyas_host.support.machine import cpu_pressure
from sides.garments import CACHE, installed

Figures = dict[str, Figure]
_UNKNOWN = "figures"
"""Stands for those of a section that was not measured."""
_NONE = Figure(value=None, unit="", note="apt-get install dataset-fashion-mnist")


def main() -> None:
    """Run the sections and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and devices (minutes)")
    parser.add_argument("--section", action="append", choices=list(SECTIONS), metavar="NAME", help="only this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where Debian's packages are unpacked")
    chosen = parser.parse_args()
    before, part = cpu_pressure(), CACHE / f"{'quick' if chosen.quick else 'full'}-{code_of('loop')[:12]}.json"
    figures = _figures(chosen.json) if chosen.section else _figures(part)
    names = chosen.section or [name for name in SECTIONS if not _of(name, figures)]
    there = installed(chosen.root)
    torch.set_num_threads(1)
    for name in names:
        for key in _of(name, figures):
            del figures[key]
        found = {"images": _NONE} if name in _ON_IMAGES and not there else SECTIONS[name](chosen.quick, chosen.root)
        figures |= {f"{name}: {key}": one for key, one in found.items()}
        if not chosen.section:
            write_bytes(part, msgspec.json.encode({"figures": figures}))
            print(f"{name}: done, {part}", flush=True)
    finish(_in_order(figures), before, chosen.json)
    if not chosen.section:
        part.unlink(missing_ok=True)


def _of(name: str, figures: Figures) -> list[str]:
    """Keys of a section's figures."""
    return [key for key in figures if key.startswith(f"{name}: ") and key != f"{name}: {_UNKNOWN}"]


def _in_order(figures: Figures) -> Figures:
    """By sections; one without figures is not measured, and the table says so."""
    found: Figures = {}
    for name in SECTIONS:
        own = {key: figures[key] for key in _of(name, figures)}
        found |= own or {f"{name}: {_UNKNOWN}": Figure(value=None, unit="", note=f"--section {name}")}
    return found


def _figures(path: Path | None) -> Figures:
    """Of a results file; none without it."""
    if path is None or not path.exists():
        return {}
    tree = msgspec.json.decode(path.read_bytes())
    return {name: msgspec.convert(figure, Figure) for name, figure in tree["figures"].items()}


def detection(quick: bool, root: Path) -> Figures:
    """Delays of all detectors at equal false alarms."""
    from loop_detection import Streams, detection

    streams = Streams(1 if quick else 10, 10 if quick else 30, CACHE)
    return detection(streams, 1.0 if quick else 0.5)


def textbook(quick: bool, root: Path) -> Figures:
    """False alarms on independent streams."""
    from loop_detection import textbook

    return textbook(500 if quick else 5000)


def estimate(quick: bool, root: Path) -> Figures:
    """Accuracy without labels."""
    from loop_accuracy import estimates

    return estimates(root, 1 if quick else 3)


def bound(quick: bool, root: Path) -> Figures:
    """Accuracy with few labels."""
    from loop_accuracy import bounds

    return bounds(root, 20 if quick else 100, 400 if quick else 1000)


def choice_season(quick: bool, root: Path) -> Figures:
    """Which samples to label when all cameras see another season."""
    from loop_choice import SIZES, choices, season

    return choices(season, root, 1 if quick else 3, SIZES[1::2] if quick else SIZES)


def choice_dirt(quick: bool, root: Path) -> Figures:
    """Which samples to label when one camera of eight is dirty."""
    from loop_choice import SIZES, choices, dirty_camera

    return choices(dirty_camera, root, 1 if quick else 3, SIZES[1::2] if quick else SIZES)


def choice_kind(quick: bool, root: Path) -> Figures:
    """Which samples to label when a new kind of object is one in twenty."""
    from loop_choice import SIZES, choices, new_kind

    return choices(new_kind, root, 1 if quick else 3, SIZES[1::2] if quick else SIZES)


def retrain(quick: bool, root: Path) -> Figures:
    """What comes back after a drift, and what is forgotten."""
    from loop_retrain import retraining

    return retraining(root, 1 if quick else 3)


def promotion(quick: bool, root: Path) -> Figures:
    """Promotions of versions that are no better, and labels until a better one is promoted."""
    from loop_fleet import promotion

    return promotion(500 if quick else 4000, 400 if quick else 2000)


def scale(quick: bool, root: Path) -> Figures:
    """The drift of a whole fleet, updated."""
    from loop_fleet import scale
    from tests.support.postgres import PostgresServer

    with tempfile.TemporaryDirectory(prefix="eyas-loop-") as folder:
        figures = scale(1000 if quick else 10_000, 1, f"sqlite:///{folder}/fleet.db", "SQLite")
    if not quick:
        server = PostgresServer()
        try:
            server.start()
            figures |= scale(10_000, 1, server.create_database(), "PostgreSQL")
        finally:
            server.close()
    return figures


SECTIONS: dict[str, Callable[[bool, Path], Figures]] = {
    "detection": detection,
    "textbook": textbook,
    "estimate": estimate,
    "bound": bound,
    "choice-season": choice_season,
    "choice-dirt": choice_dirt,
    "choice-kind": choice_kind,
    "retrain": retrain,
    "promotion": promotion,
    "scale": scale,
}
_ON_IMAGES = ("estimate", "bound", "choice-season", "choice-dirt", "choice-kind", "retrain")


if __name__ == "__main__":
    main()
