"""What became of a flash of several devices: a table, and a line of JSON for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from eyas_device.support.logs import clean
from eyas_host.fleet.deploy.flash import FlashResult

_MIN_DETAIL = 20


def exit_code(result: FlashResult) -> int:
    """Exit code of one device: 0 if it has what was requested, else 1."""
    return 0 if result.ok else 1


def sent(result: FlashResult) -> str:
    """What went over the wire, for people; empty if nothing did."""
    if not result.sent_bytes:
        return ""
    text = f"{(result.sent_bytes - result.dependency_bytes) / 1e3:.0f} kB"
    return text + (f" + {result.dependency_bytes / 1e6:.0f} MB wheels" if result.dependency_bytes else "")


def table(results: Sequence[FlashResult], width: int) -> Iterator[str]:
    """A line for each device, those that failed last, and their number; what does not fit stands below its line."""
    rows = [("device", "result", "code", "time", "sent", "")]
    rows += [
        (clean(r.target), r.status, str(exit_code(r)), f"{r.seconds:.1f} s", sent(r), clean(r.detail))
        for r in sorted(results, key=lambda result: not result.ok)
    ]
    sizes = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        head = "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=False))
        if len(head) + 2 + len(row[-1]) <= max(width, _MIN_DETAIL):
            yield f"{head}  {row[-1]}".rstrip()
        else:
            yield head.rstrip()
            yield f"    {row[-1]}"
    counts = Counter(result.status for result in results)
    yield f"{len(results)} devices: {', '.join(f'{count} {status}' for status, count in counts.items())}"


def as_json(result: FlashResult) -> dict[str, object]:
    """The result of one device for programs."""
    return {
        "target": result.target,
        "status": result.status,
        "code": exit_code(result),
        "detail": result.detail,
        "seconds": round(result.seconds, 1),
        "sent_bytes": result.sent_bytes,
        "dependency_bytes": result.dependency_bytes,
        "warnings": list(result.warnings),
    }
