"""Updates of a whole fleet's drift, and promotions of versions.

Promotions: versions that are no better, with a look after each labelled disagreement, by the bet of
`eyas_host.fleet.rollout.proof` and by the rules that others use; and labels until a better version is promoted.
"""

from __future__ import annotations

import time

import numpy as np
from scipy import stats

from common import Figure
from drift_detectors import Floats
from drift_streams import Scripts, days
from eyas_host.fleet.drift.fleet_state import Tuning
from eyas_host.fleet.rollout.proof import labels_needed, log_wealth


def scale(devices: int, windows: int, url: str, name: str) -> dict[str, Figure]:
    """One update of a fleet that sent `windows` windows a device, which close a step: processor seconds."""
    from eyas_host.fleet.drift.monitor import Monitor
    from eyas_host.fleet.store.database import Batch, Store
    from tests.support.drift_parts import BEGIN, message, window_of

    block = next(days(Scripts.stable(50), 1))
    spent, at = [], [BEGIN]
    with Store(url) as store:
        monitor = Monitor(store, Tuning(profile_days=0, calibration_days=0), clock=lambda: at[0])
        for step in range(3):
            for part in range(windows):
                moment = BEGIN + step * 300 + (part + 0.5) * 300 / windows
                batch = [
                    message(
                        window_of(
                            f"cam-{number}",
                            step * windows + part,
                            block.sums[step, number % 50],
                            time=moment,
                            seconds=30.0,
                        )
                    )
                    for number in range(devices)
                ]
                store.add(Batch(moment, batch))
            at[0] = BEGIN + (step + 1) * 300 + 120
            before = time.process_time()
            while monitor.turn(settle_s=0).more:
                pass
            spent.append(time.process_time() - before)
    return {
        f"update of {devices:,} devices, {windows} window each, {name}": Figure(
            value=float(max(spent[1:])),
            unit="s of one core",
            bound=10.0 if devices >= 10_000 else None,
            better="lower",
            note="reading, charts, evidence, storing",
        )
    }


def promotion(runs: int, labels: int) -> dict[str, Figure]:
    """How often a version that is no better is promoted, and how many labels a better one takes."""
    rng, looks = np.random.default_rng(5), np.arange(1, labels + 1)
    bound = _wins_needed(labels, 0.05)
    naive = stats.binom.isf(0.05, looks, 0.5) + 1
    wins = np.cumsum(rng.random((runs, labels)) < 0.5, axis=1)
    figures = {
        "A/A, a look after each label: promoted": Figure(
            value=float((wins >= bound).any(axis=1).mean()),
            unit="",
            bound=0.05,
            better="lower",
            note=f"{runs:,} runs of {labels:,} labelled disagreements",
        ),
        "A/A, p below .05 at each look: promoted": Figure(value=float((wins >= naive).any(axis=1).mean()), unit=""),
        "A/A, one p-value after all labels: promoted": Figure(value=float((wins[:, -1] >= naive[-1]).mean()), unit=""),
    }
    # surer and more often wrong: right on 40 of 100 disagreements, mean confidence .92 instead of .90, one look at 200
    surer = rng.normal(0.92, 0.08, (runs, 200)).mean(axis=1) - rng.normal(0.90, 0.08, (runs, 200)).mean(axis=1)
    worse = np.cumsum(rng.random((runs, labels)) < 0.4, axis=1)
    figures["surer and worse, one p-value of mean confidence: promoted"] = Figure(
        value=float((surer / (0.08 * np.sqrt(2 / 200)) > stats.norm.isf(0.05)).mean()),
        unit="",
        note="a rule that sees no labels",
    )
    figures["surer and worse, eyas: promoted"] = Figure(
        value=float((worse >= bound).any(axis=1).mean()), unit="", bound=0.05, better="lower"
    )
    lost = looks - worse
    stopped = np.where((lost >= bound).any(axis=1), (lost >= bound).argmax(axis=1) + 1, labels)
    figures["surer and worse, eyas: labels until it goes back"] = Figure(value=float(np.median(stopped)), unit="")
    for chance in (0.6, 0.65, 0.7, 0.8):
        own = np.cumsum(rng.random((min(runs, 1000), labels)) < chance, axis=1) >= bound
        needed = np.where(own.any(axis=1), own.argmax(axis=1) + 1, labels)
        figures[f"labels until promotion, right on {chance:.0%} of disagreements"] = Figure(
            value=float(np.median(needed)),
            unit="",
            spread=f"90 % by {np.quantile(needed, 0.9):.0f}",
            note=f"formula {labels_needed(chance):.0f}, for who knows the share",
        )
    return figures


def _wins_needed(labels: int, alpha: float) -> Floats:
    """For each number of labels, the wins from which the bet promotes."""
    level, wins, found = np.log(1 / alpha), 0, []
    for count in range(1, labels + 1):
        while wins <= count and log_wealth(wins, count - wins) < level:
            wins += 1
        found.append(wins)
    return np.array(found, float)
