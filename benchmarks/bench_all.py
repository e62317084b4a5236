"""Run the benchmarks one after the other, each in its quick form, at idle priority.

At the end a table says what each took, and what is left. A finished one is left out until its code changes, or with
`--again`; one that failed runs again. Results and logs lie in `runs/benchmarks/CLASS/`, a folder for each class of
machines (`earlier.py`): figures in the documentation come from the full forms (`make bench-…`). What needs the
demonstration and finds none by `make distill` takes the short one of `main_job.py --quick`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from rich.table import Table

from common import isa
from earlier import machine_class
from eyas_host.pipeline.code import PACKAGES, dependencies
from eyas_host.support.files import exclusive_lock, write_bytes
from eyas_host.support.progress import show

HERE = Path(__file__).parent
FOLDER = Path("runs/benchmarks")
RUN, QUICK_RUN = Path("runs/solar-cells"), Path("runs/quick-solar-cells")
"""The demonstration by `make distill`, and what `main_job.py --quick` makes of it."""
LIMIT_MINUTES = 60.0
_IDLE = ("chrt", "--idle", "0", "nice", "-n", "19")


class Bench(NamedTuple):
    """A benchmark's quick form."""

    options: tuple[str, ...] = ("--quick",)
    needs: Path | None = None
    """A folder without which there is nothing to measure."""
    otherwise: tuple[str, Path] | None = None
    """Option and folder that are taken where that one is missing."""


BENCHES = {
    "strange_data": Bench(),
    "log_lines": Bench(),
    "kill_matrix": Bench(),
    "latency_table": Bench(),
    "truth": Bench(),
    "telemetry": Bench(),
    "camera_faults": Bench(),
    "scale": Bench(),
    "updates": Bench(),
    "training": Bench(),
    "loop": Bench(),
    "distillation": Bench(),
    "frame_loop": Bench(),
    "main_job": Bench(),
    "on_device": Bench(needs=RUN / "bundle", otherwise=("--bundle", QUICK_RUN / "bundle")),
    "soak": Bench(needs=RUN / "bundle", otherwise=("--bundle", QUICK_RUN / "bundle")),
    "ood": Bench(needs=RUN / "report", otherwise=("--run", QUICK_RUN)),
    "compression": Bench(),
    "pretrained": Bench(),
    "fleet_demo": Bench(),
    "board": Bench(),
}
"""Script -> its quick form, the shortest first: at most five minutes of a processor each on a machine of two cores."""

State = Literal["done", "failed", "left", "skipped"]
SKIPPED = "skipped: "
"""Begins the last line of a benchmark that lacks something; it runs again the next time."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took."""

    code: str
    """Hash of the script and of all that it imports of `benchmarks/` and Eyas."""
    exit_code: int
    wall_s: float
    processor_s: float
    """Of the script with its child processes that ended: other work on the machine counts little."""
    last_line: str


def main() -> None:
    """Run what is left and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHES)}")
    parser.add_argument("--again", action="store_true", help="also those that are finished")
    parser.add_argument("--list", action="store_true", help="only print the table")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"default {FOLDER}")
    args = parser.parse_args()
    if unknown := [name for name in args.name if name not in BENCHES]:
        parser.error(f"{', '.join(unknown)}: no benchmark; there are {', '.join(BENCHES)}")
    names = args.name or list(BENCHES)
    folder = args.folder / machine_class({"isa": isa()}).replace(" ", "-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / ".lock"):
        for name in [] if args.list else names:
            if why_not(BENCHES[name]) or (state(folder, name) == "done" and not args.again):
                continue
            print(f"{name}: {' '.join(options(BENCHES[name]))}, log {folder / name}.log", flush=True)
            record = run(folder, name)
            print(f"{name}: {record.processor_s:.0f} s of a processor, exit code {record.exit_code}", flush=True)
    show(table(folder, names))
    left = [name for name in names if not why_not(BENCHES[name]) and state(folder, name) not in ("done", "skipped")]
    print(
        f"{sum(state(folder, name) == 'done' for name in names)} done, "
        f"{sum(state(folder, name) == 'failed' for name in names)} failed; left: {', '.join(left) or 'none'}"
    )
    sys.exit(any(state(folder, name) == "failed" for name in names))


def run(folder: Path, name: str) -> Record:
    """Run a benchmark, with its output in a log; the figures are kept only if it ended well."""
    result, part = folder / f"{name}.json", folder / f"{name}.part.json"
    part.unlink(missing_ok=True)
    if result.exists():
        shutil.copyfile(result, part)  # what it replaces stays beside it as an earlier run
    command = [*_IDLE, sys.executable, str(HERE / f"{name}.py"), *options(BENCHES[name]), "--json", str(part)]
    code, begun, before = code_of(name), time.monotonic(), _children_s()
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=out, check=False, timeout=60 * LIMIT_MINUTES).returncode
        except subprocess.TimeoutExpired:
            done = 124
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    record = Record(
        code=code,
        exit_code=done,
        wall_s=time.monotonic() - begun,
        processor_s=_children_s() - before,
        last_line=next((line.strip() for line in reversed(lines) if line.strip()), ""),
    )
    if done == 0 and part.exists():
        part.replace(result)
    write_bytes(folder / f"{name}.run.json", msgspec.json.encode(record))
    return record


def state(folder: Path, name: str) -> State:
    """Whether a benchmark has to be run: its code is what counts, not when it was written."""
    record = read(folder, name)
    if record is None or record.code != code_of(name):
        return "left"
    if record.exit_code:
        return "failed"
    return "skipped" if record.last_line.startswith(SKIPPED) else "done"


def read(folder: Path, name: str) -> Record | None:
    """What the last run took."""
    try:
        return msgspec.json.decode((folder / f"{name}.run.json").read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def options(bench: Bench) -> tuple[str, ...]:
    """Options of a benchmark here: with what it takes otherwise where what it needs is missing."""
    if bench.needs is None or bench.needs.exists() or bench.otherwise is None:
        return bench.options
    option, folder = bench.otherwise
    return (*bench.options, option, str(folder))


def why_not(bench: Bench) -> str:
    """Why a benchmark cannot be run here; empty if it can."""
    found = [bench.needs, bench.otherwise[1] if bench.otherwise else None]
    if bench.needs is not None and not any(folder is not None and folder.exists() for folder in found):
        return f"needs {bench.needs}: make distill"
    return ""


def table(folder: Path, names: Iterable[str]) -> Table:
    """What each took, and what is left."""
    found = Table(title=f"quick benchmarks, {folder}", title_justify="left")
    for heading in ("benchmark", "state", "processor, s", "wall, s", "last line"):
        found.add_column(heading, justify="right" if heading.endswith(" s") else "left", overflow="fold")
    for name in names:
        record, reason = read(folder, name), why_not(BENCHES[name])
        times = ("", "") if record is None else (f"{record.processor_s:.0f}", f"{record.wall_s:.0f}")
        found.add_row(name, *("not here", *times, reason) if reason else (state(folder, name), *times, _said(record)))
    return found


def _said(record: Record | None) -> str:
    return "" if record is None else record.last_line


@cache
def code_of(name: str) -> str:
    """Hash of a script, of what it imports or starts of `benchmarks/`, and of what these import of Eyas."""
    waiting, digests = [HERE / f"{name}.py"], dict[str, str]()
    while waiting:
        path = waiting.pop()
        key = str(path.relative_to(HERE))
        if key in digests:
            continue
        text = path.read_text(encoding="utf-8")
        digests[key] = hashlib.sha256(text.encode()).hexdigest()
        started = {HERE / "sides" / word for word in re.findall(r'"(\w+\.py)"', text)}
        for module in _imports(text):
            if module.split(".")[0] in PACKAGES:
                digests.setdefault(module, dependencies(module).code)
            started.add(HERE / f"{module.replace('.', '/')}.py")
        waiting += [one for one in started if one.is_file()]
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _imports(text: str) -> set[str]:
    """Modules that a source file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _children_s() -> float:
    """Processor time of all child processes that ended, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
