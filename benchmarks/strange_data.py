"""Strange folders, tables and image files: `python benchmarks/strange_data.py [--quick] [--json FILE]`.

Random folder trees (divided, nested, linked, with litter and names of every kind), tables and damaged image files go
through `eyas new`, `eyas split` and the folder camera of the device, the same ones each time. Nothing may end in a
traceback, and no image may be lost in silence: those that are there are taken or counted as left out, as a second
formulation of what an image is says.

`--quick` takes 100 of each instead of 2,000.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.progress import say
from sides.strange_data import Outcome, random_images, random_tables, random_trees

_SHOWN = 5
_FEWEST_ACCEPTED = {"trees": 20, "tables": 10, "image_files": 50}
"""Percent of the examples that must be used rather than refused, or the figures would say nothing."""


def main() -> None:
    """Draw, try, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 of each instead of 2,000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    before, count = cpu_pressure(), 100 if arguments.quick else 2_000
    logging.disable(logging.CRITICAL)
    figures: dict[str, Figure] = {}
    for name, draw in (("trees", random_trees), ("tables", random_tables), ("image_files", random_images)):
        figures |= figures_of(name, draw(count))
    finish(figures, before, arguments.json)


def figures_of(name: str, outcome: Outcome) -> dict[str, Figure]:
    """The figures of one kind of examples; the first errors are printed."""
    for line in (*outcome.tracebacks[:_SHOWN], *outcome.losses[:_SHOWN]):
        say(f"  {name}: {line!r}")
    of = f"{outcome.examples:,} random {name.replace('_', ' ')}, {outcome.images:,} images in them"
    return {
        f"tracebacks_{name}": Figure(
            value=len(outcome.tracebacks), unit="", bound=0, better="lower", note=f"{of}: errors that are no message"
        ),
        f"silent_losses_{name}": Figure(
            value=len(outcome.losses), unit="", bound=0, better="lower", note="images neither taken nor counted"
        ),
        f"accepted_{name}": Figure(
            value=100 * outcome.accepted / max(1, outcome.examples),
            unit="%",
            bound=_FEWEST_ACCEPTED[name],
            note="of the examples; the others are refused with a reason",
        ),
    }


if __name__ == "__main__":
    main()
