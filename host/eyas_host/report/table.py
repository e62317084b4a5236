"""The ladder as a table in the terminal."""

from __future__ import annotations

from rich.table import Table

from eyas_host.report.model import Report


def ladder_table(report: Report) -> Table:
    """Teacher, student, pruned, QAT and each artefact on the sealed test part."""
    table = Table(title=f"{report.name} {report.version}: the sealed test part", title_justify="left")
    table.add_column("rung", no_wrap=True)
    priced = ("cost",) if report.cost is not None else ()
    for title in ("balanced acc.", "95 % interval", "F1", "AUC", *priced, "agreement", "size MB", "p50 ms", "p90 ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for rung in report.rungs:
        low, high = rung.balanced_accuracy_ci
        latency = rung.latency_ms
        table.add_row(
            rung.name + (" *" if rung.name in report.use.values() else ""),
            f"{rung.balanced_accuracy:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{rung.f1:.3f}",
            f"{rung.auc:.3f}",
            *(("" if rung.cost is None else f"{rung.cost:,.4g}",) if priced else ()),
            "" if rung.agreement is None else f"{rung.agreement:.3f}",
            "" if rung.size_bytes is None else f"{rung.size_bytes / 1e6:.2f}",
            "" if latency is None else f"{latency.p50:.2f}",
            "" if latency is None else f"{latency.p90:.2f}",
            style="bold" if rung.name == report.shipped else None,
        )
    table.caption = "* what a runtime runs; latency: one picture, one thread, this machine"
    return table
