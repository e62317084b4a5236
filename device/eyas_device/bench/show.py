"""A result as text: machine and settings, tables, and the speed-up by int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eyas_device.bench.result import STAGES, Bench, Interval, Quantiles, Result, Sustained
from eyas_device.board import NOT_MEASURED, Vitals

BEYOND_SPREAD, WITHIN_SPREAD = "beyond the spread", "within the spread"


def report_lines(bench: Bench) -> Iterator[str]:
    """Lines of the report, without the intervals of a sustained run, which were shown as they ended."""
    yield from head(bench)
    yield ""
    if bench.sustained is not None:
        yield from _sustained(bench.sustained)
    else:
        yield from _burst(bench)
    yield from (f"{r.runtime} {r.artefact}: {r.note}" for r in bench.results if r.note)
    yield from (f"left out: {note}" for note in bench.notes)


def head(bench: Bench) -> Iterator[str]:
    """Board, system, versions, settings and sensor readings."""
    board, system, settings = bench.board, bench.os, bench.settings
    processor = f", {board.processor}" if board.processor and board.processor != board.model else ""
    memory = f"{board.memory_mb / 1000:.1f} GB" if board.memory_mb else f"memory {NOT_MEASURED}"
    yield f"{board.model}{processor}, {board.cores} cores, {memory}"
    parts = [system.name, f"Linux {system.kernel or '?'}", f"{system.machine} {system.bits} bit", system.libc]
    yield ", ".join(part for part in parts if part) + f", Python {system.python}"
    yield ", ".join(f"{package} {version}" for package, version in bench.versions.items())
    yield (
        f"{settings.bundle} {settings.bundle_version} ({settings.manifest_sha256[:12]}), "
        f"{settings.input_size} x {settings.input_size} px, {settings.threads} thread{'s' * (settings.threads > 1)}, "
        f"{settings.mode}, frames {settings.frame} from {settings.camera or 'the golden images (JPEG)'}"
    )
    yield f"before: {describe_sensors(bench.before)}"
    yield f"after:  {describe_sensors(bench.after)}"
    power = bench.power
    rails = "" if power is None else f" ({power.source}: {power.note})"
    yield f"power: {format_value(power.watts if power else None, ' W')}{rails}"
    waited = bench.pressure.during
    pressure = NOT_MEASURED if waited is None else f"{100 * waited:.1f} % of the time a process waited for a core"
    yield f"CPU pressure: {pressure}"


def describe_sensors(vitals: Vitals) -> str:
    """Temperature, frequency, governor and throttling in one line."""
    throttle = vitals.throttle
    if throttle is None:
        throttled = NOT_MEASURED
    else:
        throttled = (", ".join(throttle.now) or "no") + f"; since boot: {', '.join(throttle.since_boot) or 'no'}"
    return (
        f"{format_value(vitals.temperature_c, ' °C')}, {format_value(vitals.frequency_mhz, ' MHz', 0)} "
        f"({vitals.governor or f'governor {NOT_MEASURED}'}), throttled: {throttled}"
    )


def format_value(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A value with its unit, or `not measured`."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}{unit}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned columns: the first row is the header, the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()


def interval_line(interval: Interval) -> str:
    """One interval of a sustained run as a line."""
    causes = interval.throttled
    throttled = NOT_MEASURED if causes is None else ", ".join(causes) or "no"
    return (
        f"{interval.second:7.1f} s  {interval.frames_per_second:9.2f} frames/s  p50 {interval.p50:.3f}  "
        f"p90 {interval.p90:.3f}  p99 {interval.p99:.3f} ms  {format_value(interval.temperature_c, ' °C')}  "
        f"{format_value(interval.frequency_mhz, ' MHz', 0)}  throttled: {throttled}  "
        f"{format_value(interval.watts, ' W')}"
    )


def _burst(bench: Bench) -> Iterator[str]:
    names = ["milliseconds", "p50", "p90", "p99", "max", "per second"]
    models = [[_result_name(r), *_quantile_cells(r.model), format_value(r.model_per_second)] for r in bench.results]
    yield "the model alone"
    yield from table([names, *models])
    yield ""
    yield "whole frames (p50 of each stage; p50 to max of the total)"
    stages = [["milliseconds", *STAGES[:-1], "p50", "p90", "p99", "max", "frames/s"]]
    for result in bench.results:
        durations = [result.loop.get(stage) for stage in STAGES]
        medians = [NOT_MEASURED if d is None else f"{d.p50:.3f}" for d in durations[:-1]]
        stages.append(
            [_result_name(result), *medians, *_quantile_cells(durations[-1]), format_value(result.frames_per_second)]
        )
    yield from table(stages)
    yield ""
    yield "a fresh process (medians)"
    starts = [["", "import ms", "load ms", "first ms", "to first prediction ms", "RSS MB", "peak MB", "golden check"]]
    for result in bench.results:
        start = result.start
        values = (
            (start.import_ms, start.load_ms, start.first_ms, start.to_first_ms, start.rss_mb, start.peak_rss_mb)
            if start
            else (None,) * 6
        )
        verdict = {True: "ok", False: "FAILED", None: "not checked"}[result.passed]
        starts.append([_result_name(result), *map(format_value, values), verdict])
    yield from table(starts)
    yield from int8_speedups(bench.results)


def int8_speedups(results: Sequence[Result]) -> Iterator[str]:
    """Speed-up by int8 on each runtime that was measured with both precisions."""
    for runtime in dict.fromkeys(result.runtime for result in results):
        models = {r.precision: r.model for r in results if r.runtime == runtime}
        fp32, int8 = models.get("fp32"), models.get("int8")
        if fp32 is None or int8 is None or not int8.p50:
            continue
        yield (
            f"{runtime}: int8 is {fp32.p50 / int8.p50:.2f} x as fast as fp32 "
            f"({int8.p50:.3f} ms, {fp32.p50:.3f} ms; {BEYOND_SPREAD if differ(int8, fp32) else WITHIN_SPREAD})"
        )


def differ(one: Quantiles, other: Quantiles) -> bool:
    """Whether two measurements differ by more than their spread: the ranges from p10 to p90 do not overlap."""
    return one.p90 < other.p10 or other.p90 < one.p10


def _sustained(run: Sustained) -> Iterator[str]:
    if run.drop is None:
        yield f"{run.runtime} {run.artefact}: drop from first to last: {NOT_MEASURED} (one interval)"
        return
    first, last = run.intervals[0], run.intervals[-1]
    yield (
        f"{run.runtime} {run.artefact}: drop from first to last: {100 * run.drop:.1f} % "
        f"({first.frames_per_second:.2f} to {last.frames_per_second:.2f} frames/s)"
    )


def _result_name(result: Result) -> str:
    hint = f" ({result.precision_hint})" if result.precision_hint else ""
    return f"{result.runtime} {result.artefact}{hint}"


def _quantile_cells(quantiles: Quantiles | None) -> list[str]:
    if quantiles is None:
        return [NOT_MEASURED] * 4
    return [f"{value:.3f}" for value in (quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max)]
