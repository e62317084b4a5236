"""Two results side by side: ratios, which of them are more than scatter, and what was not the same to begin with."""

from __future__ import annotations

from collections.abc import Iterator

from eyas_device.bench.result import Bench, Quantiles, Result
from eyas_device.bench.show import beyond, is_apart, table
from eyas_device.board import NOT_MEASURED

_BUSY = 0.1


def lines(a: Bench, b: Bench) -> Iterator[str]:
    """The comparison of `b` with `a`: a ratio above 1 is slower or larger."""
    yield f"A: {_title(a)}"
    yield f"B: {_title(b)}"
    yield from (f"not the same: {what}" for what in differences(a, b))
    yield from (f"{side} was busy: {note}" for side, bench in (("A", a), ("B", b)) if (note := _busy(bench)))
    rows = [["", "A", "B", "B / A", ""]]
    others = {_key(result): result for result in b.results}
    for result in a.results:
        other = others.pop(_key(result), None)
        if other is None:
            rows.append([" ".join(_key(result)), "measured", NOT_MEASURED, "", ""])
        else:
            rows += _rows(result, other)
    rows += [[" ".join(key), NOT_MEASURED, "measured", "", ""] for key in others]
    if a.sustained is not None and b.sustained is not None:
        drops = [side.sustained.drop if side.sustained else None for side in (a, b)]
        rows.append(["sustained drop %", *(NOT_MEASURED if d is None else f"{100 * d:.1f}" for d in drops), "", ""])
    yield from table(rows)


def differences(a: Bench, b: Bench) -> list[str]:
    """What makes the two hard to compare: another bundle, thread count, board, way of measuring or library."""
    found = []
    if a.settings.manifest_sha256 != b.settings.manifest_sha256:
        found.append(f"the bundle: {_bundle(a)} and {_bundle(b)}")
    for what in ("threads", "mode", "frame", "camera"):
        one, other = getattr(a.settings, what), getattr(b.settings, what)
        if one != other:
            found.append(f"{what}: {one or 'golden images'} and {other or 'golden images'}")
    if (a.board.model, a.board.cores) != (b.board.model, b.board.cores):
        found.append(f"the board: {a.board.model} and {b.board.model}")
    for package in sorted(a.versions.keys() | b.versions.keys()):
        one, other = a.versions.get(package, "not installed"), b.versions.get(package, "not installed")
        if one != other:
            found.append(f"{package}: {one} and {other}")
    hints = {_key(result): result.precision_hint for result in b.results}
    for result in a.results:
        if hints.get(_key(result), result.precision_hint) != result.precision_hint:
            found.append(f"the precision hint of {result.artefact}: {result.precision_hint} and {hints[_key(result)]}")
    return found


def _rows(a: Result, b: Result) -> Iterator[list[str]]:
    name = " ".join(_key(a))
    spans = [("model p50 ms", a.model, b.model)]
    spans += [(f"{stage} p50 ms", a.loop.get(stage), b.loop.get(stage)) for stage in a.loop.keys() | b.loop.keys()]
    for what, one, other in sorted(spans, key=lambda span: span[0]):
        mark = _mark(one, other) if one is not None and other is not None else ""
        yield [f"{name} {what}", *_pair(one.p50 if one else None, other.p50 if other else None), mark]
    for what in ("to_first_ms", "rss_mb", "peak_rss_mb"):
        yield [f"{name} {what}", *_pair(getattr(a.start, what, None), getattr(b.start, what, None)), ""]


def _mark(a: Quantiles, b: Quantiles) -> str:
    """`slower` or `faster`, where the spans from p10 to p90 do not touch."""
    direction = ("slower, " if b.p50 > a.p50 else "faster, ") if is_apart(a, b) else ""
    return direction + beyond(a, b)


def _pair(a: float | None, b: float | None) -> list[str]:
    cells = [NOT_MEASURED if value is None else f"{value:.3f}" for value in (a, b)]
    return [*cells, f"{b / a:.2f}" if a and b is not None else ""]


def _key(result: Result) -> tuple[str, str]:
    return result.runtime, result.artefact


def _bundle(bench: Bench) -> str:
    settings = bench.settings
    return f"{settings.bundle} {settings.bundle_version} ({settings.manifest_sha256[:12]})"


def _title(bench: Bench) -> str:
    threads = bench.settings.threads
    return f"{bench.board.model}, {_bundle(bench)}, {threads} thread{'s' * (threads > 1)}, {bench.settings.mode}"


def _busy(bench: Bench) -> str:
    waited = bench.pressure.during
    return f"{100 * waited:.0f} % of the time some process waited for a core" if waited and waited > _BUSY else ""
