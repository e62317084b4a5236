"""Comparison of two results: ratios, whether they exceed the spread, and differences in the setup."""

from __future__ import annotations

from collections.abc import Iterator

from eyas_device.bench.result import Bench, Quantiles, Result
from eyas_device.bench.show import BEYOND_SPREAD, WITHIN_SPREAD, differ, table
from eyas_device.board import NOT_MEASURED

_BUSY_FRACTION = 0.1


def comparison_lines(a: Bench, b: Bench) -> Iterator[str]:
    """Lines of a table that compares `b` with `a`: a ratio above 1 is slower or larger."""
    yield f"A: {_describe_setup(a)}"
    yield f"B: {_describe_setup(b)}"
    yield from (f"different: {difference}" for difference in differences(a, b))
    yield from (f"{side} was busy: {note}" for side, bench in (("A", a), ("B", b)) if (note := _busy_note(bench)))
    rows = [["", "A", "B", "B / A", ""]]
    others = {_key(result): result for result in b.results}
    for result in a.results:
        other = others.pop(_key(result), None)
        if other is None:
            rows.append([" ".join(_key(result)), "measured", NOT_MEASURED, "", ""])
        else:
            rows += _ratio_rows(result, other)
    rows += [[" ".join(key), NOT_MEASURED, "measured", "", ""] for key in others]
    if a.sustained is not None and b.sustained is not None:
        drops = [side.sustained.drop if side.sustained else None for side in (a, b)]
        rows.append(["sustained drop %", *(NOT_MEASURED if d is None else f"{100 * d:.1f}" for d in drops), "", ""])
    yield from table(rows)


def differences(a: Bench, b: Bench) -> list[str]:
    """Differences in the setup of two results: bundle, threads, mode, frames, board, library versions."""
    lines = []
    if a.settings.manifest_sha256 != b.settings.manifest_sha256:
        lines.append(f"the bundle: {_describe_bundle(a)} and {_describe_bundle(b)}")
    for name in ("threads", "mode", "frame", "camera"):
        one, other = getattr(a.settings, name), getattr(b.settings, name)
        if one != other:
            lines.append(f"{name}: {one or 'golden images'} and {other or 'golden images'}")
    if (a.board.model, a.board.cores) != (b.board.model, b.board.cores):
        lines.append(f"the board: {a.board.model} and {b.board.model}")
    for package in sorted(a.versions.keys() | b.versions.keys()):
        one, other = a.versions.get(package, "not installed"), b.versions.get(package, "not installed")
        if one != other:
            lines.append(f"{package}: {one} and {other}")
    precisions = {_key(result): result.precision_hint for result in b.results}
    for result in a.results:
        if precisions.get(_key(result), result.precision_hint) != result.precision_hint:
            lines.append(
                f"the precision hint of {result.artefact}: {result.precision_hint} and {precisions[_key(result)]}"
            )
    return lines


def _ratio_rows(a: Result, b: Result) -> Iterator[list[str]]:
    name = " ".join(_key(a))
    medians = [("model p50 ms", a.model, b.model)]
    medians += [(f"{stage} p50 ms", a.loop.get(stage), b.loop.get(stage)) for stage in a.loop.keys() | b.loop.keys()]
    for title, one, other in sorted(medians, key=lambda row: row[0]):
        verdict = _verdict(one, other) if one is not None and other is not None else ""
        yield [f"{name} {title}", *_value_cells(one.p50 if one else None, other.p50 if other else None), verdict]
    for field in ("to_first_ms", "rss_mb", "peak_rss_mb"):
        yield [f"{name} {field}", *_value_cells(getattr(a.start, field, None), getattr(b.start, field, None)), ""]


def _verdict(a: Quantiles, b: Quantiles) -> str:
    """Whether `b` is slower or faster than `a` by more than the spread."""
    if not differ(a, b):
        return WITHIN_SPREAD
    return f"{'slower' if b.p50 > a.p50 else 'faster'}, {BEYOND_SPREAD}"


def _value_cells(a: float | None, b: float | None) -> list[str]:
    cells = [NOT_MEASURED if value is None else f"{value:.3f}" for value in (a, b)]
    return [*cells, f"{b / a:.2f}" if a and b is not None else ""]


def _key(result: Result) -> tuple[str, str]:
    return result.runtime, result.artefact


def _describe_bundle(bench: Bench) -> str:
    settings = bench.settings
    return f"{settings.bundle} {settings.bundle_version} ({settings.manifest_sha256[:12]})"


def _describe_setup(bench: Bench) -> str:
    threads = bench.settings.threads
    return (
        f"{bench.board.model}, {_describe_bundle(bench)}, {threads} thread{'s' * (threads > 1)}, {bench.settings.mode}"
    )


def _busy_note(bench: Bench) -> str:
    waited = bench.pressure.during
    return f"{100 * waited:.0f} % of the time a process waited for a core" if waited and waited > _BUSY_FRACTION else ""
