"""One-line summaries of a training stage's validation metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eyas_host.train.schedule import Epoch, best_epoch


def best_metrics(history: Sequence[Epoch], metric: str) -> dict[str, float]:
    """Validation metrics of the best epoch by the selection metric."""
    return history[best_epoch(history, metric)].metrics


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`balanced accuracy 0.832, AUC 0.902`."""
    return f"balanced accuracy {metrics['balanced_accuracy']:.3f}, AUC {metrics['auc']:.3f}"
