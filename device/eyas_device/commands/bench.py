"""`eyas-device bench`: what a bundle costs on this device.

Burst (the default): the model alone and whole frames, artefacts taking turns, and fresh processes. Sustained: minutes
at full rate, one line an interval. With --blocks: where the time goes inside of the model. With --choose: what is
fastest and answers rightly is remembered, and `eyas-device run` uses it.
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
from eyas_device.support.opencv import silence_opencv

if TYPE_CHECKING:
    from typing import TextIO

    from eyas_device.bench.result import Bench, Interval

HELP = "measure a bundle here: speed, memory, heat; choose what runs"
_SECONDS = {"burst": 20.0, "sustained": 600.0}
_MOST_SECONDS = {"burst": 600.0, "sustained": 86_400.0}
_EVERY_S = 5.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    add = parser.add_argument
    add("--bundle", type=Path, metavar="B", help="the bundle to measure")
    add("--camera", metavar="SPEC", help="take the frames from there (default: the golden images, as JPEG)")
    add("--runtime", help="litert, tflite, openvino, onnx, ... (default: the first that is there)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--artefact", metavar="NAME", help="e.g. litert-int8 (default: what the bundle says)")
    which.add_argument("--all", action="store_true", help="all artefacts on all runtimes that work here")
    add("--threads", type=values.count, default=1, help="inference threads (default 1)")
    add("--seconds", type=values.window, help="of measuring an artefact (default 20; sustained 600)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--burst", action="store_true", help="some seconds (the default)")
    mode.add_argument("--sustained", action="store_true", help="minutes: does it slow down when it grows hot?")
    mode.add_argument("--choose", action="store_true", help="measure all, remember the fastest that answers rightly")
    mode.add_argument("--blocks", type=Path, metavar="FILE", help="write the latency of each block of the model there")
    mode.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two results")
    add("--state", type=Path, metavar="DIR", help=f"where --choose remembers; {STATE_HELP}")
    add("--json", metavar="FILE", help="write the result there; `-` is standard output, and the table goes elsewhere")


def main(given: argparse.Namespace) -> int:
    """Measure, print and write; code 1 if an artefact that was measured does not answer as on the workstation."""
    silence_opencv()
    from eyas_device.bench.result import BenchError

    if given.compare:
        return _compare(*given.compare)
    if given.bundle is None:
        raise BenchError("no bundle: give --bundle B (or --compare A.json B.json)")
    if given.choose and given.artefact:
        raise BenchError("--choose measures all artefacts: leave out --artefact")
    mode = "sustained" if given.sustained else "burst"
    seconds = given.seconds or _SECONDS[mode]
    if seconds > _MOST_SECONDS[mode]:
        raise BenchError(f"--seconds {seconds:g}: {_MOST_SECONDS[mode]:g} at most for a {mode} run; see --sustained")
    return _blocks(given, seconds) if given.blocks else _measure(given, seconds)


def _measure(given: argparse.Namespace, seconds: float) -> int:
    from eyas_device.bench import show
    from eyas_device.bench.run import Wanted, bench

    people = sys.stderr if given.json == "-" else sys.stdout
    line = ProgressLine(sys.stderr)

    def told(interval: Interval) -> None:
        line.clear()
        print(show.interval_line(interval), file=people, flush=True)

    wanted = Wanted(
        bundle=given.bundle,
        runtime=given.runtime,
        artefact=given.artefact,
        everything=given.all or given.choose,
        threads=given.threads,
        camera=given.camera or "",
        seconds=seconds,
        sustained=given.sustained,
    )
    try:
        result = bench(wanted, progress=line, told=told)
    finally:
        line.clear()
    for text in show.lines(result):
        print(text, file=people)
    _write(result, given.json)
    if given.choose:
        _choose(result, state_folder(given.state), people)
    failed = [r.artefact for r in result.results if r.passed is False]
    return EXIT_CHECK_FAILED if failed and not given.choose else 0


def _choose(result: Bench, state: Path, people: TextIO) -> None:
    from eyas_device.bench.choose import fastest
    from eyas_device.runtimes.selection import write_selection

    choice = fastest(result)
    path = write_selection(state, choice)
    print(f"chosen: {choice.artefact} on {choice.runtime}, {choice.latency_ms:.3f} ms a frame; {path}", file=people)


def _write(result: Bench, where: str | None) -> None:
    from eyas_device.bench.result import encode, write

    if where == "-":
        sys.stdout.write(encode(result).decode())
    elif where:
        write(Path(where), result)


def _compare(first: Path, second: Path) -> int:
    from eyas_device.bench.compare import lines
    from eyas_device.bench.result import read

    for text in lines(read(first), read(second)):
        print(text)
    return 0


def _blocks(given: argparse.Namespace, seconds: float) -> int:
    from eyas_device.bench.blocks import block_times, lines
    from eyas_device.bench.result import BenchError, write
    from eyas_device.bundle import Bundle
    from eyas_device.runtimes import choose

    if given.all or given.camera or given.json:
        raise BenchError("--blocks looks into one artefact and writes its own file: leave out --all, --camera, --json")
    line = ProgressLine(sys.stderr)
    bundle = Bundle.open(given.bundle)
    chosen = choose(bundle, given.runtime, given.artefact)
    try:
        times = block_times(
            bundle,
            chosen,
            threads=given.threads,
            seconds=seconds,
            progress=lambda done: line("blocks", done, seconds * (1 - done)),
        )
    finally:
        line.clear()
    write(given.blocks, times)
    for text in lines(times):
        print(text)
    return 0


class ProgressLine:
    """What is done and how long the rest takes: in place on a terminal, a line each few seconds elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._told = time.monotonic()
        self._shown = False

    def __call__(self, text: str, done: float, left_s: float) -> None:
        """Say it, unless it was said a moment ago."""
        now = time.monotonic()
        if now - self._told < (0.2 if self._live else _EVERY_S):
            return
        self._told = now
        line = f"{text}: {100 * done:3.0f} %, about {left_s:.0f} s left"
        self._stream.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Leave the line to others."""
        if self._live and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._shown = False
