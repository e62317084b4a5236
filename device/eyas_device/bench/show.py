"""A result as text: who measured what on which machine, a table, and what int8 brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eyas_device.bench.result import STAGES, Bench, Interval, Quantiles, Result, Sustained
from eyas_device.board import NOT_MEASURED, Vitals


def lines(bench: Bench) -> Iterator[str]:
    """The whole report; the intervals of a sustained run were told as they ended."""
    yield from head(bench)
    yield ""
    if bench.sustained is not None:
        yield from _sustained(bench.sustained)
    else:
        yield from _burst(bench)
    yield from (f"{r.runtime} {r.artefact}: {r.note}" for r in bench.results if r.note)
    yield from (f"left out: {note}" for note in bench.notes)


def head(bench: Bench) -> Iterator[str]:
    """Board, system, versions, settings and how the board felt."""
    board, system, settings = bench.board, bench.os, bench.settings
    processor = f", {board.processor}" if board.processor and board.processor != board.model else ""
    memory = f"{board.memory_mb / 1000:.1f} GB" if board.memory_mb else f"memory {NOT_MEASURED}"
    yield f"{board.model}{processor}, {board.cores} cores, {memory}"
    words = [system.name, f"Linux {system.kernel or '?'}", f"{system.machine} {system.bits} bit", system.libc]
    yield ", ".join(word for word in words if word) + f", Python {system.python}"
    yield ", ".join(f"{package} {version}" for package, version in bench.versions.items())
    yield (
        f"{settings.bundle} {settings.bundle_version} ({settings.manifest_sha256[:12]}), "
        f"{settings.input_size} x {settings.input_size} px, {settings.threads} thread{'s' * (settings.threads > 1)}, "
        f"{settings.mode}, frames {settings.frame} from {settings.camera or 'the golden images (JPEG)'}"
    )
    yield f"before: {felt(bench.before)}"
    yield f"after:  {felt(bench.after)}"
    power = bench.power
    rails = "" if power is None else f" ({power.source}: {power.note})"
    yield f"power: {shown(power.watts if power else None, ' W')}{rails}"
    waited = bench.pressure.during
    share = NOT_MEASURED if waited is None else f"{100 * waited:.1f} % of the time some process waited for a core"
    yield f"cpu pressure: {share}"


def felt(vitals: Vitals) -> str:
    """Temperature, frequency, governor and throttling in a line."""
    throttle = vitals.throttle
    if throttle is None:
        held = NOT_MEASURED
    else:
        held = (", ".join(throttle.now) or "no") + f"; since boot: {', '.join(throttle.since_boot) or 'no'}"
    return (
        f"{shown(vitals.temperature_c, ' °C')}, {shown(vitals.frequency_mhz, ' MHz', 0)} "
        f"({vitals.governor or f'governor {NOT_MEASURED}'}), throttled: {held}"
    )


def shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A figure with its unit, or that it was not measured."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}{unit}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned columns; the first is the head and the first column is aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()


def interval_line(interval: Interval) -> str:
    """One interval of a sustained run."""
    throttled = interval.throttled
    held = NOT_MEASURED if throttled is None else ", ".join(throttled) or "no"
    return (
        f"{interval.second:7.1f} s  {interval.frames_per_second:9.2f} frames/s  p50 {interval.p50:.3f}  "
        f"p90 {interval.p90:.3f}  p99 {interval.p99:.3f} ms  {shown(interval.temperature_c, ' °C')}  "
        f"{shown(interval.frequency_mhz, ' MHz', 0)}  throttled: {held}  {shown(interval.watts, ' W')}"
    )


def _burst(bench: Bench) -> Iterator[str]:
    names = ["milliseconds", "p50", "p90", "p99", "max", "a second"]
    models = [[_name(r), *_figures(r.model), shown(r.model_per_second)] for r in bench.results]
    yield "the model alone"
    yield from table([names, *models])
    yield ""
    yield "whole frames (p50 of the stages; p50 to max of all together)"
    stages = [["milliseconds", *STAGES[:-1], "p50", "p90", "p99", "max", "frames/s"]]
    for result in bench.results:
        parts = [result.loop.get(stage) for stage in STAGES]
        medians = [NOT_MEASURED if part is None else f"{part.p50:.3f}" for part in parts[:-1]]
        stages.append([_name(result), *medians, *_figures(parts[-1]), shown(result.frames_per_second)])
    yield from table(stages)
    yield ""
    yield "a fresh process (medians)"
    begins = [["", "import ms", "load ms", "first ms", "to first answer ms", "RSS MB", "peak MB", "golden check"]]
    for result in bench.results:
        start = result.start
        figures = (
            (start.import_ms, start.load_ms, start.first_ms, start.to_first_ms, start.rss_mb, start.peak_rss_mb)
            if start
            else (None,) * 6
        )
        verdict = {True: "ok", False: "FAILED", None: "not checked"}[result.passed]
        begins.append([_name(result), *map(shown, figures), verdict])
    yield from table(begins)
    yield from ratios(bench.results)


def ratios(results: Sequence[Result]) -> Iterator[str]:
    """What int8 brings on each runtime that was measured with both precisions."""
    for runtime in dict.fromkeys(result.runtime for result in results):
        models = {r.precision: r.model for r in results if r.runtime == runtime}
        whole, small = models.get("fp32"), models.get("int8")
        if whole is None or small is None or not small.p50:
            continue
        yield (
            f"{runtime}: int8 is {whole.p50 / small.p50:.2f} x as fast as fp32 "
            f"({small.p50:.3f} ms, {whole.p50:.3f} ms; {beyond(small, whole)})"
        )


def beyond(one: Quantiles, other: Quantiles) -> str:
    """Whether two measurements differ by more than they scatter, in words."""
    return "beyond the spread" if is_apart(one, other) else "within the spread"


def is_apart(one: Quantiles, other: Quantiles) -> bool:
    """Whether the spans of two measurements from p10 to p90 do not touch."""
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


def _name(result: Result) -> str:
    hint = f" ({result.precision_hint})" if result.precision_hint else ""
    return f"{result.runtime} {result.artefact}{hint}"


def _figures(found: Quantiles | None) -> list[str]:
    if found is None:
        return [NOT_MEASURED] * 4
    return [f"{value:.3f}" for value in (found.p50, found.p90, found.p99, found.max)]
