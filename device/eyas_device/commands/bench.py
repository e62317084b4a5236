"""`eyas-device bench`: measure latency, memory and temperature of a bundle on this device.

Burst (default): the model alone and whole frames, artefacts in turns, then start-up in fresh processes. Sustained:
minutes at full rate, one line per interval. --blocks: latency of each block of the model. --choose: save the fastest
runtime and artefact that passes the golden check; `eyas-device run` uses it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.slots import STATE_HELP, state_folder
from eyas_device.errors import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    from typing import TextIO

    from eyas_device.bench.result import Bench, Interval

HELP = "benchmark a bundle on this device; select runtime and artefact"
_SECONDS = {"burst": 20.0, "sustained": 600.0}
_MAX_SECONDS = {"burst": 600.0, "sustained": 86_400.0}
_PROGRESS_EVERY_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    add = parser.add_argument
    add("--bundle", type=values.path, metavar="B", help="the bundle to measure")
    add("--camera", metavar="SPEC", help="source of the frames (default: the golden images, small JPEGs)")
    add("--runtime", help="litert, tflite, openvino, onnx, ... (default: the first that works here)")
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--artefact", metavar="NAME", help="e.g. litert-int8 (default: the one that the bundle prefers)"
    )
    selection.add_argument("--all", action="store_true", help="all artefacts on all runtimes that work here")
    add("--threads", type=values.positive_int, default=1, help="inference threads (default 1)")
    add("--seconds", type=values.window_s, help="duration per artefact (default 20; sustained 600)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--burst", action="store_true", help="a short measurement (default)")
    mode.add_argument(
        "--sustained", action="store_true", help="minutes at full rate: does it slow down as it heats up?"
    )
    mode.add_argument(
        "--choose", action="store_true", help="measure all, save the fastest that passes the golden check"
    )
    mode.add_argument(
        "--blocks", type=values.path, metavar="FILE", help="write the latency of each block of the model to FILE"
    )
    mode.add_argument("--compare", type=values.path, nargs=2, metavar=("A.json", "B.json"), help="compare two results")
    add("--state", type=values.path, metavar="DIR", help=f"where --choose saves the selection; {STATE_HELP}")
    add(
        "--json",
        metavar="FILE",
        help="write the result to FILE; `-`: standard output, with the table on standard error",
    )


def main(args: argparse.Namespace) -> int:
    """Measure, print and write; exit code 1 if a measured artefact fails the golden check."""
    from eyas_device.bench.result import BenchError

    if args.compare:
        return _compare(*args.compare)
    if args.bundle is None:
        raise BenchError("no bundle: give --bundle B (or --compare A.json B.json)")
    if args.choose and args.artefact:
        raise BenchError("--choose measures all artefacts: omit --artefact")
    mode = "sustained" if args.sustained else "burst"
    seconds = args.seconds or _SECONDS[mode]
    if seconds > _MAX_SECONDS[mode]:
        raise BenchError(f"--seconds {seconds:g}: {_MAX_SECONDS[mode]:g} at most for a {mode} run; see --sustained")
    return _blocks(args, seconds) if args.blocks else _measure(args, seconds)


def _measure(args: argparse.Namespace, seconds: float) -> int:
    from eyas_device.bench import show
    from eyas_device.bench.run import BenchOptions, bench
    from eyas_device.support import logs

    stream = sys.stderr if args.json == "-" else sys.stdout
    progress = ProgressLine(sys.stderr)

    def on_interval(interval: Interval) -> None:
        progress.clear()
        logs.show(show.interval_line(interval), stream)

    options = BenchOptions(
        bundle=args.bundle,
        runtime=args.runtime,
        artefact=args.artefact,
        everything=args.all or args.choose,
        threads=args.threads,
        camera=args.camera or "",
        seconds=seconds,
        sustained=args.sustained,
    )
    try:
        result = bench(options, progress=progress, on_interval=on_interval)
    finally:
        progress.clear()
    for line in show.report_lines(result):
        logs.show(line, stream)
    _write(result, args.json)
    if args.choose:
        _save_fastest(result, state_folder(args.state), stream)
    failed = [r.artefact for r in result.results if r.passed is False]
    return EXIT_CHECK_FAILED if failed and not args.choose else 0


def _save_fastest(result: Bench, state: Path, stream: TextIO) -> None:
    from eyas_device.bench.choose import fastest
    from eyas_device.runtimes.selection import write_selection
    from eyas_device.support import logs

    selection = fastest(result)
    path = write_selection(state, selection)
    logs.show(
        f"selected: {selection.artefact} on {selection.runtime}, {selection.latency_ms:.3f} ms per frame; {path}",
        stream,
    )


def _write(result: Bench, target: str | None) -> None:
    from eyas_device.bench.result import encode, write

    if target == "-":
        sys.stdout.write(encode(result).decode())
    elif target:
        write(Path(target), result)


def _compare(first: Path, second: Path) -> int:
    from eyas_device.bench.compare import comparison_lines
    from eyas_device.bench.result import read
    from eyas_device.support import logs

    for line in comparison_lines(read(first), read(second)):
        logs.show(line)
    return 0


def _blocks(args: argparse.Namespace, seconds: float) -> int:
    from eyas_device.bench.blocks import block_times, table_lines
    from eyas_device.bench.result import BenchError, write
    from eyas_device.bundle import Bundle
    from eyas_device.runtimes import choose
    from eyas_device.support import logs

    if args.all or args.camera or args.json:
        raise BenchError("--blocks measures one artefact and writes its own file: omit --all, --camera, --json")
    progress = ProgressLine(sys.stderr)
    bundle = Bundle.open(args.bundle)
    selection = choose(bundle, args.runtime, args.artefact)
    try:
        times = block_times(
            bundle,
            selection,
            threads=args.threads,
            seconds=seconds,
            progress=lambda done: progress("blocks", done, seconds * (1 - done)),
        )
    finally:
        progress.clear()
    write(args.blocks, times)
    for line in table_lines(times):
        logs.show(line)
    return 0


class ProgressLine:
    """Progress and remaining time: updated in place on a terminal, one line every few seconds elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._last_shown = time.monotonic()
        self._shown = False

    def __call__(self, text: str, done: float, left_s: float) -> None:
        """Show the progress (`done` 0..1), unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self._last_shown < (0.2 if self._live else _PROGRESS_EVERY_S):
            return
        self._last_shown = now
        line = f"{text}: {100 * done:3.0f} %, about {left_s:.0f} s left"
        self._stream.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Clear the line for other output."""
        if self._live and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._shown = False
