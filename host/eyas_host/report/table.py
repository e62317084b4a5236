"""The comparison of all variants as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from eyas_host.report.model import Report


def comparison_table(report: Report) -> Table:
    """Teacher, student, pruned, QAT and each artefact on the held-out test set."""
    table = Table(title=f"{report.name} {report.version}: held-out test set", title_justify="left")
    table.add_column("variant", no_wrap=True)
    cost = ("cost",) if report.cost is not None else ()
    for title in ("balanced acc.", "95 % interval", "F1", "AUC", *cost, "agreement", "size MB", "p50 ms", "p90 ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for variant in report.variants:
        low, high = variant.balanced_accuracy_ci
        latency = variant.latency_ms
        table.add_row(
            variant.name + (" *" if variant.name in report.use.values() else ""),
            f"{variant.balanced_accuracy:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{variant.f1:.3f}",
            f"{variant.auc:.3f}",
            *(("" if variant.cost is None else f"{variant.cost:,.4g}",) if cost else ()),
            "" if variant.agreement is None else f"{variant.agreement:.3f}",
            "" if variant.size_bytes is None else f"{variant.size_bytes / 1e6:.2f}",
            "" if latency is None else f"{latency.p50:.2f}",
            "" if latency is None else f"{latency.p90:.2f}",
            style="bold" if variant.name == report.shipped else None,
        )
    table.caption = (
        f"* run by a runtime; latency: one image, one thread, {report.machine.get('processor', 'unknown processor')}"
    )
    return table
