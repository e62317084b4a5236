"""Shared by all benchmarks: figures with bounds, their table, and the JSON with the machine and its load."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.table import Table

from earlier import earlier_runs
from eyas_host.support.files import write_bytes
from eyas_host.support.machine import cpu_pressure, machine, versions
from eyas_host.support.progress import show


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A measured figure and its bound."""

    value: float | None
    unit: str
    bound: float | None = None
    """Required figure; None if it is only reported."""
    better: Literal["higher", "lower"] = "higher"
    spread: str = ""
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the bound is met; None without a bound or a measurement."""
        if self.bound is None or self.value is None:
            return None
        return self.value >= self.bound if self.better == "higher" else self.value <= self.bound


def ratio(slow: Sequence[float], fast: Sequence[float], *, bound: float | None = None, note: str = "") -> Figure:
    """Ratio of medians, with both medians and their inner quartiles."""
    medians = " / ".join(
        f"{np.median(side):.3g} ms ({np.quantile(side, 0.25):.3g}..{np.quantile(side, 0.75):.3g})"
        for side in (slow, fast)
    )
    return Figure(value=float(np.median(slow) / np.median(fast)), unit="x", bound=bound, spread=medians, note=note)


def shortened(figures: Mapping[str, Figure], training: str) -> dict[str, Figure]:
    """Figures of a quick form that depend on a shortened training: no bounds apply, and their notes say so."""
    return {
        key: msgspec.structs.replace(figure, bound=None, note="; ".join(filter(None, (figure.note, training))))
        for key, figure in figures.items()
    }


def mean(values: Sequence[float], *, unit: str = "", **more: Any) -> Figure:
    """Mean of a figure over seeds, without a unit by default; the spread lists the values."""
    spread = ", ".join(f"{value:.3f}" for value in values)
    return Figure(value=float(np.mean(values)), unit=unit, spread=spread, **more)


_EXTENSIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def isa() -> str:
    """CPU architecture and its extensions that int8 and float kernels use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    return ", ".join((platform.machine(), *(name for name in _EXTENSIONS if name in flags)))


def finish(figures: Mapping[str, Figure], before: str, path: Path | None) -> None:
    """Print the table, write the JSON to `path`, and print the machine, its load and how many bounds are met.

    What `path` held before stays beside it as an earlier run (`earlier.py`).
    """
    table = Table(title="figures", title_justify="left")
    for title in ("figure", "value", "bound", "met", "spread", "note"):
        table.add_column(title, overflow="fold")
    for key, figure in figures.items():
        sign = "" if figure.bound is None else (">=" if figure.better == "higher" else "<=")
        value = "not measured" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        met = {True: "yes", False: "NO", None: ""}[figure.ok]
        bound = "" if figure.bound is None else f"{sign} {figure.bound:g}"
        table.add_row(key, value, bound, met, figure.spread, figure.note)
    show(table)
    measured_on, after = machine() | {"isa": isa()}, cpu_pressure()
    if path is not None:
        tree = {
            "machine": measured_on,
            "finished": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": versions(),
            "pressure": {"before": before, "after": after},
            "figures": {k: msgspec.to_builtins(f) | {"ok": f.ok} for k, f in figures.items()},
            "earlier": earlier_runs(path, measured_on),
        }
        write_bytes(path, msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n")
    bounded = [f for f in figures.values() if f.bound is not None]
    print(f"{measured_on['processor']}, {measured_on['cores']} cores ({measured_on['isa']})")
    print(f"pressure before and after: {before}; {after}")
    print(f"{sum(f.ok is True for f in bounded)} of {len(bounded)} bounds met")
