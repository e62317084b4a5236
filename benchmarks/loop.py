"""Drift on simulated fleets: delay at equal false alarms beside other detectors, false alarms, and scale; promotions.

    python benchmarks/loop.py --quick
    python benchmarks/loop.py --json benchmarks/results/loop.json

Every detector is calibrated to the same alarms in 30 stable days of a device with day and night, on the same streams.
The detectors of river are compared where river is installed.

Promotions: versions that are no better, with a look after each labelled disagreement, by the bet of
`eyas_host.fleet.rollout.proof` and by the rules that others use; and labels until a better version is promoted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Figure, finish
from drift_detectors import (
    Bools,
    Floats,
    calibrate,
    delays,
    ks_scores,
    rate,
    river_alarms,
    river_detectors,
)
from drift_streams import KINDS, LABELS, STRENGTHS, Scripts, days, scripts
from eyas_host.fleet.drift.calibration import Calibration
from eyas_host.fleet.drift.detectors import cusum
from eyas_host.fleet.drift.fleet_state import Model, Tuning
from eyas_host.fleet.drift.measures import measure
from eyas_host.fleet.drift.profile import STEPS_OF_DAY
from eyas_host.fleet.rollout.proof import labels_needed, log_wealth
from eyas_host.support.machine import cpu_pressure

LEARNED, START, FOLLOWED = 7, 14, 7
"""Days that are learned, day in which drift begins, days that it is followed."""
FIXED = 288 * 30
"""Steps between the alarms of the dummy that alarms at fixed times."""


class Streams:
    """What our charts and the mean confidence did on all streams."""

    def __init__(self, seeds: int, stable: int, seed: int = 1) -> None:
        drifting, self.cases = scripts(KINDS, seeds, START, seed=seed)
        calm = Scripts.stable(stable)
        self.scripts = Scripts(
            *(
                np.concatenate([getattr(drifting, name), getattr(calm, name)])
                for name in ("kind", "strength", "start", "stop")
            )
        )
        n, self.learned = len(self.scripts.kind), LEARNED * STEPS_OF_DAY
        model, rows = Model("simulated", LABELS), np.arange(n)
        model.add([str(number) for number in rows])
        ratios, confidence, deviations = [], [], []
        for day, block in enumerate(days(self.scripts, START + 1 + FOLLOWED, seed)):
            for step in range(STEPS_OF_DAY):
                number = np.full(n, day * STEPS_OF_DAY + step)
                values = measure(block.sums[step])
                confidence.append(values[:, 0])
                deviations.append(np.nan_to_num(model.profiles.deviations(rows, number, values)[:, 0]))
                model.advance(rows, number, block.sums[step], Tuning())
                ratios.append(model.ratios().max(axis=1).astype(np.float32))
        self.ours = np.array(ratios)[self.learned :]
        self.confidence = np.array(confidence)
        self.deviations = np.array(deviations)
        steps = np.arange(self.learned, len(self.confidence))[:, None]
        self.stable: Bools = steps < self.scripts.start
        self.start = self.scripts.start[: len(self.cases)] - self.learned


def detection(streams: Streams, per_month: float, kswin: bool) -> dict[str, Figure]:
    """Delays of all detectors at equal false alarms, and theirs at their defaults."""
    drifting, limit = len(streams.cases), FOLLOWED * STEPS_OF_DAY
    alarms: dict[str, Bools] = {}
    scores: dict[str, Floats] = {"eyas": streams.ours}
    for length, name in ((36, "3 h"), (288, "a day")):
        scores[f"KS on mean confidence, last {name}"] = ks_scores(streams.confidence, streams.learned, length)
    scores["KS on deviations from our profile, last 3 h"] = ks_scores(streams.deviations, streams.learned, 36)
    for name, values in scores.items():
        alarms[name] = values >= calibrate(values, streams.stable, per_month)
    figures: dict[str, Figure] = {}
    for name, (make, settings) in river_detectors(kswin).items():
        of_setting = river_alarms(make, settings, streams.confidence, streams.learned)
        default = of_setting[settings[0]]
        figures[f"river {name}, default: alarms in 30 stable days"] = Figure(
            value=rate(default, streams.stable),
            unit="",
            note=_hours(delays(default[:, :drifting], streams.start, limit)),
        )
        quiet = {key: one for key, one in of_setting.items() if rate(one, streams.stable) <= per_month}
        if quiet:
            best = min(quiet, key=lambda key: _middle(delays(quiet[key][:, :drifting], streams.start, limit)))
            alarms[f"river {name}, {best}"] = quiet[best]
    dummy = np.zeros(streams.ours.shape, bool)
    every = int(FIXED / per_month)
    columns = len(dummy.T)
    for stream in range(columns):
        dummy[every * stream // columns :: every, stream] = True
    alarms["dummy at fixed times"] = dummy
    found = {name: delays(one[:, :drifting], streams.start, limit) for name, one in alarms.items()}
    for name, hours in found.items():
        figures[f"delay: {name}"] = Figure(
            value=_middle(hours),
            unit="h",
            spread=_cells(streams.cases, hours),
            note=f"{rate(alarms[name], streams.stable):.2f} alarms in 30 stable days; {_hours(hours)}",
        )
    own = _middle(found["eyas"])
    for name, hours in found.items():
        if name.startswith(("KS on mean", "river")):
            figures[f"delay, eyas / {name}"] = Figure(value=own / _middle(hours), unit="x", bound=0.7, better="lower")
    ours = streams.ours >= 1
    thousand = [
        (ours[begin : begin + 1000] & streams.stable[begin : begin + 1000]).any(axis=0)
        for begin in range(0, START * STEPS_OF_DAY - streams.learned - 1000, 1000)
    ]
    figures["eyas as installed: alarms in 30 stable days"] = Figure(
        value=rate(ours, streams.stable), unit="", note=_hours(delays(ours[:, :drifting], streams.start, limit))
    )
    figures["eyas as installed: stable streams of 1,000 steps with an alarm"] = Figure(
        value=float(np.mean(thousand)), unit="", bound=0.05, better="lower", note=f"{np.size(thousand)} streams"
    )
    return figures


def textbook(streams: int) -> dict[str, Figure]:
    """Streams of 1,000 independent normal samples on which a textbook CUSUM alarms, and the charts of one measure."""
    rng = np.random.default_rng(0)
    high = low = np.zeros(streams)
    state: Floats = np.zeros((streams, 1, 2, 3))
    thresholds = Calibration().thresholds[:6].reshape(1, 2, 3)
    book, ours = np.zeros(streams, bool), np.zeros(streams, bool)
    for _ in range(1000):
        z = rng.normal(size=streams)
        high, low = np.maximum(high + z - 0.5, 0), np.maximum(low - z - 0.5, 0)
        book |= (high > 5) | (low > 5)
        state = cusum(state, z[:, None])
        ours |= (state >= thresholds).any(axis=(1, 2, 3))
    return {
        "textbook CUSUM, k=.5, h=5: independent streams of 1,000 with an alarm": Figure(
            value=float(book.mean()), unit=""
        ),
        "eyas, charts of one measure: the same": Figure(value=float(ours.mean()), unit="", bound=0.05, better="lower"),
    }


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
        "A/A, p < .05 at each look: promoted": Figure(value=float((wins >= naive).any(axis=1).mean()), unit=""),
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


def _middle(hours: Floats) -> float:
    """Geometric mean: delays of minutes and of days count alike."""
    return float(np.exp(np.log(hours).mean()))


def _hours(hours: Floats) -> str:
    found = hours < FOLLOWED * 24
    return f"{found.mean():.0%} found in {FOLLOWED} days, median {np.median(hours):.1f} h"


def _cells(cases: list[tuple[str, str]], hours: Floats) -> str:
    """Median delay of each drift at its three strengths."""
    parts = []
    for kind in KINDS:
        medians = [
            np.median([h for case, h in zip(cases, hours, strict=True) if case == (kind, strength)])
            for strength in STRENGTHS
        ]
        parts.append(f"{kind} {' / '.join(f'{median:.1f}' for median in medians)}")
    return "; ".join(parts)


def main() -> None:
    """Run all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and devices (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    before = cpu_pressure()
    quick = args.quick
    figures: dict[str, Any] = detection(
        Streams(2 if quick else 10, 10 if quick else 60), 1.0 if quick else 0.5, not quick
    )
    figures |= textbook(500 if quick else 5000)
    figures |= promotion(500 if quick else 4000, 400 if quick else 2000)
    with tempfile.TemporaryDirectory(prefix="eyas-loop-") as folder:
        figures |= scale(1000 if quick else 10_000, 1, f"sqlite:///{folder}/fleet.db", "SQLite")
    if not quick:
        from tests.support.postgres import PostgresServer

        server = PostgresServer()
        try:
            server.start()
            figures |= scale(10_000, 1, server.create_database(), "PostgreSQL")
        finally:
            server.close()
    finish(figures, before, args.json)


if __name__ == "__main__":
    main()
