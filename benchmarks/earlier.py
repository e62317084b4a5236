"""Results of a benchmark beside those of earlier runs: of this class of machines, and of the others.

A results file has the newest run. Its `earlier` has the run before on this class of machines, and of each other class
the newest two, newest first: machine, date and the values of the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

_OWN, _OTHERS = 1, 2
"""Earlier runs that are kept, of the class of the newest run and of each other one."""


def machine_class(machine: Mapping[str, str]) -> str:
    """What decides how fast int8 is: `VNNI`, `no VNNI`, `aarch64 i8mm`, `aarch64`, or `not recorded`."""
    isa = machine.get("isa", "")
    if "aarch64" in isa:
        return "aarch64 i8mm" if "i8mm" in isa else "aarch64"
    if not isa:
        return "not recorded"
    return "VNNI" if "vnni" in isa.lower() and "no vnni" not in isa.lower() else "no VNNI"


def earlier_runs(path: Path, machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a new run on `machine` keeps of the results file that it replaces; nothing if there is none."""
    try:
        before = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return []
    if "figures" not in before:
        return []
    values = {key: figure["value"] for key, figure in before["figures"].items()}
    newest = {"machine": before["machine"], "finished": before.get("finished", ""), "figures": values}
    newest |= {"settings": before["settings"]} if "settings" in before else {}
    kept: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for run in (newest, *before.get("earlier", ())):
        name = machine_class(run["machine"])
        if seen[name] < (_OWN if name == machine_class(machine) else _OTHERS):
            kept.append(run)
        seen[name] += 1
    return kept
