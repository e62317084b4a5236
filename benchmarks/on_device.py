"""Latency, memory and start-up of a bundle on this machine.

    python benchmarks/on_device.py [--quick] [--json FILE] [--bundle DIR]

The measurement of `eyas-device bench --all` (artefacts in turns), and the block times of the bundle's LiteRT artefact,
as figures with bounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from common import Figure, finish
from eyas_device.bench.blocks import block_times
from eyas_device.bench.result import Bench, Quantiles, Result
from eyas_device.bench.run import STARTS, BenchOptions, bench
from eyas_device.bench.show import report_lines
from eyas_device.bundle import Bundle
from eyas_device.commands.bench import ProgressLine
from eyas_device.runtimes import choose
from eyas_host.support.machine import cpu_pressure

BUNDLE = Path("runs/solar-cells/bundle")
_BOUNDED = "litert"
"""Runtime whose start-up time and memory have bounds."""


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds for each artefact")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help=f"default {BUNDLE}")
    parser.add_argument("--threads", type=int, default=1, help="inference threads (default 1)")
    arguments = parser.parse_args()
    before = cpu_pressure()
    seconds = 4.0 if arguments.quick else 20.0
    line = ProgressLine(sys.stderr)
    measured = bench(
        BenchOptions(
            bundle=arguments.bundle,
            everything=True,
            threads=arguments.threads,
            seconds=seconds,
            starts=STARTS if arguments.quick else 3 * STARTS,
        ),
        progress=line,
    )
    line.clear()
    for text in report_lines(measured):
        print(text)
    figures = dict(_figures(measured))
    figures["litert_blocks_sum"] = _blocks(arguments.bundle, arguments.threads, seconds)
    finish(figures, before, arguments.json)


def _figures(measured: Bench) -> Iterator[tuple[str, Figure]]:
    for result in measured.results:
        name = result.artefact if result.artefact.startswith(result.runtime) else f"{result.runtime}-{result.artefact}"
        yield f"{name}_model_ms", _time(result.model, result)
        yield f"{name}_frame_ms", _time(result.loop.get("total"), result)
        start, bound = result.start, result.runtime == _BOUNDED
        yield (
            f"{name}_first_answer_s",
            Figure(
                value=start.to_first_ms / 1000 if start else None,
                unit="s",
                bound=1.0 if bound else None,
                better="lower",
                note=f"a fresh process; median of {start.runs}" if start else result.note,
            ),
        )
        yield (
            f"{name}_rss_mb",
            Figure(value=start.rss_mb if start else None, unit="MB", bound=150.0 if bound else None, better="lower"),
        )
    for runtime in dict.fromkeys(result.runtime for result in measured.results):
        models = {r.precision: r.model for r in measured.results if r.runtime == runtime}
        fp32, int8 = models.get("fp32"), models.get("int8")
        if fp32 is not None and int8 is not None:
            yield f"{runtime}_int8_speedup", Figure(value=fp32.p50 / int8.p50, unit="x", note="the model alone")


def _time(quantiles: Quantiles | None, result: Result) -> Figure:
    spread = f"{quantiles.p10:.3g}..{quantiles.p90:.3g}" if quantiles else ""
    note = result.note or ("" if result.passed else "golden check failed")
    return Figure(value=quantiles.p50 if quantiles else None, unit="ms", better="lower", spread=spread, note=note)


def _blocks(root: Path, threads: int, seconds: float) -> Figure:
    """Ratio of the sum of the block times to the latency of the whole model."""
    bundle = Bundle.open(root)
    times = block_times(bundle, choose(bundle, "litert"), threads=threads, seconds=seconds, progress=lambda done: None)
    return Figure(
        value=times.sum_ms / times.whole.p50,
        unit="of the model",
        spread=f"{times.sum_ms:.3g} / {times.whole.p50:.3g} ms",
        note=f"{times.artefact}, {len(times.blocks)} blocks",
    )


if __name__ == "__main__":
    main()
