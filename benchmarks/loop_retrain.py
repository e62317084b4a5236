"""After a drift and one retraining: what comes back, and what is forgotten.

A small convolutional network goes on from its weights, as `eyas retrain` lets it: a few epochs on the old images and
the labelled new ones together. Beside it: the new ones alone, for as many epochs.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from common import Figure, mean
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.fleet.samples.choose import choose
from eyas_host.retrain.state import EPOCHS
from loop_choice import CAMERAS, events
from sides.garments import LABELS, Network, accuracy, first_version, fit, garments, logits

NEW = 600
"""Labelled samples."""
_RATE = 2e-3
OURS = "old and new"


def retraining(root: Path, seeds: int) -> dict[str, Figure]:
    """Shares of the loss that come back, and points lost on the usual test images."""
    rows: dict[str, list[tuple[float, float]]] = {}
    before, drifted = [], []
    for seed in range(seeds):
        learned, test = first_version(root, seed), garments(root, "t10k")
        usual, season = test.seen("usual"), test.seen("season")
        first = (accuracy(learned.network, usual, test.targets), accuracy(learned.network, season, test.targets))
        before.append(first[0])
        drifted.append(first[1])
        later = learned.later.seen("season")
        validation = logits(learned.network, learned.validation.seen("usual"))
        calibration = fit_calibration(validation, learned.validation.targets)
        cameras = np.arange(len(later)) % CAMERAS
        sent = events(logits(learned.network, later), calibration, LABELS, later, cameras, seed)
        chosen = np.array([sample.event.sequence for sample in choose(sent, NEW, seed=seed)])
        new, new_targets = later[chosen], learned.later.targets[chosen]
        both = np.concatenate([learned.train.seen("usual"), new])
        both_targets = np.concatenate([learned.train.targets, new_targets])
        for name, (images, targets) in {OURS: (both, both_targets), "new ones alone": (new, new_targets)}.items():
            model: Network = copy.deepcopy(learned.network)
            fit(model, images, targets, epochs=EPOCHS, rate=_RATE, seed=seed)
            again = accuracy(model, season, test.targets)
            share = (again - first[1]) / (first[0] - first[1])
            rows.setdefault(name, []).append((share, 100 * (first[0] - accuracy(model, usual, test.targets))))
    figures = {
        "accuracy before": mean(before, note="10,000 test images"),
        "accuracy after the drift": mean(drifted, note="the same images in another season"),
    }
    for name, found in rows.items():
        ours = name == OURS
        back, lost = zip(*found, strict=True)
        figures[f"{name}: share of the loss that came back"] = mean(
            back, bound=0.8 if ours else None, note=f"{NEW} labelled samples, chosen as `eyas samples queue` does"
        )
        figures[f"{name}: lost on the usual test images"] = Figure(
            value=float(np.mean(lost)),
            unit="points",
            bound=1.0 if ours else None,
            better="lower",
            spread=", ".join(f"{one:.2f}" for one in lost),
        )
    return figures
