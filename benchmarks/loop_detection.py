"""Drift on simulated fleets: delay at equal false alarms beside other detectors, and false alarms.

Every detector is calibrated to the same alarms in 30 stable days of a device with day and night, on the same streams.
The detectors of river are compared where river is installed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import Figure
from drift_detectors import (
    CALM,
    KSWIN_DEFAULT,
    KSWIN_WINDOWS,
    Bools,
    Floats,
    Kswin,
    calibrate,
    delays,
    ks_scores,
    kswin_alarms,
    kswin_alpha,
    rate,
    river_alarms,
    river_detectors,
)
from drift_streams import KINDS, LABELS, STRENGTHS, Scripts, days, scripts
from eyas_host.fleet.drift import fleet_state
from eyas_host.fleet.drift.calibration import Calibration
from eyas_host.fleet.drift.detectors import cusum
from eyas_host.fleet.drift.fleet_state import Model, Tuning
from eyas_host.fleet.drift.measures import measure
from eyas_host.fleet.drift.profile import STEPS_OF_DAY
from eyas_host.support.files import write_bytes

LEARNED, START, FOLLOWED = 7, 14, 7
"""Days that are learned, day in which drift begins, days that it is followed."""
_IN_CONFIDENCE = ("dirt", "light", "slow blur")
FIXED = 288 * 30
"""Steps between the alarms of the dummy that alarms at fixed times."""


class Kept:
    """Arrays that are computed once, in a folder of the code that computed them: an interrupted run goes on."""

    def __init__(self, folder: Path, name: str) -> None:
        here = Path(__file__).parent
        code = (here / "drift_streams.py", here / "drift_detectors.py", *Path(fleet_state.__file__).parent.glob("*.py"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()[:12]
        self._folder = folder / f"{name}-{digest}"

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The array, from the folder or computed and stored."""
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            buffer = io.BytesIO()
            np.save(buffer, compute())
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, buffer.getvalue())
        return np.load(path)


class Streams:
    """What our charts and the mean confidence did on all streams."""

    def __init__(self, seeds: int, stable: int, folder: Path, seed: int = 1) -> None:
        drifting, self.cases = scripts(KINDS, seeds, START, seed=seed)
        calm = Scripts.stable(stable)
        self.scripts = Scripts(
            *(
                np.concatenate([getattr(drifting, name), getattr(calm, name)])
                for name in ("kind", "strength", "start", "stop")
            )
        )
        self.learned, self.seed = LEARNED * STEPS_OF_DAY, seed
        self.kept = Kept(folder, f"detection-{len(KINDS)}-{seeds}-{stable}-{seed}")
        ratios, self.confidence, self.deviations = self.kept("streams", self._followed)
        self.ours = ratios[self.learned :]
        steps = np.arange(self.learned, len(self.confidence))[:, None]
        self.stable: Bools = steps < self.scripts.start
        self.start = self.scripts.start[: len(self.cases)] - self.learned

    def _followed(self) -> Floats:
        """Our largest chart, the mean confidence and its deviation from the profile, [3, steps, streams]."""
        n = len(self.scripts.kind)
        model, rows = Model("simulated", LABELS), np.arange(n)
        model.add([str(number) for number in rows])
        ratios, confidence, deviations = [], [], []
        for day, block in enumerate(days(self.scripts, START + 1 + FOLLOWED, self.seed)):
            for step in range(STEPS_OF_DAY):
                number = np.full(n, day * STEPS_OF_DAY + step)
                values = measure(block.sums[step])
                confidence.append(values[:, 0])
                deviations.append(np.nan_to_num(model.profiles.deviations(rows, number, values)[:, 0]))
                model.advance(rows, number, block.sums[step], Tuning())
                ratios.append(model.ratios().max(axis=1).astype(np.float32))
        return np.array([ratios, confidence, deviations])


def detection(streams: Streams, per_month: float) -> dict[str, Figure]:
    """Delays of all detectors at equal false alarms, and theirs at their defaults."""
    drifting, limit = len(streams.cases), FOLLOWED * STEPS_OF_DAY
    alarms: dict[str, Bools] = {}
    scores: dict[str, Floats] = {"eyas": streams.ours}
    for length, name in ((36, "3 h"), (288, "a day")):
        scores[f"KS on mean confidence, last {name}"] = streams.kept(
            f"KS {length}", partial(ks_scores, streams.confidence, streams.learned, length)
        )
    scores["KS on deviations from our profile, last 3 h"] = streams.kept(
        "KS of deviations", partial(ks_scores, streams.deviations, streams.learned, 36)
    )
    for name, values in scores.items():
        alarms[name] = values >= calibrate(values, streams.stable, per_month)
    figures: dict[str, Figure] = {}
    of_river, by_default = _river(streams, per_month)
    alarms |= of_river
    for name, default in by_default.items():
        figures[f"river {name}, default: alarms in 30 stable days"] = Figure(
            value=rate(default, streams.stable),
            unit="",
            note=_hours(delays(default[:, :drifting], streams.start, limit)),
        )
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
    plain = np.array([kind in _IN_CONFIDENCE for kind, _ in streams.cases])
    others = {name: _middle(hours[plain]) for name, hours in found.items() if name.startswith(("KS on mean", "river"))}
    best = min(others, key=others.__getitem__)
    figures[f"delay of {', '.join(_IN_CONFIDENCE)} alone, eyas / the best other"] = Figure(
        value=_middle(found["eyas"][plain]) / others[best],
        unit="x",
        note=f"{best}; mean confidence, all that the others see, shows these drifts best",
    )
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


def _river(streams: Streams, per_month: float) -> tuple[dict[str, Bools], dict[str, Bools]]:
    """Alarms of river's detectors: each with its best setting of those that are quiet enough, and with its defaults."""
    drifting, limit = len(streams.cases), FOLLOWED * STEPS_OF_DAY
    alarms: dict[str, Bools] = {}
    defaults: dict[str, Bools] = {}
    if not river_detectors():
        return alarms, defaults

    def middle(found: Bools) -> float:
        return _middle(delays(found[:, :drifting], streams.start, limit))

    def enough(calm: Bools) -> bool:
        return rate(calm, streams.stable[:, -CALM:]) <= 3 * per_month

    for name, (make, settings) in river_detectors().items():
        of_setting = {
            setting: streams.kept(
                f"{name} {setting} {per_month}",
                partial(river_alarms, make, setting, streams.confidence, streams.learned, enough if place else None),
            )
            for place, setting in enumerate(settings)
        }
        defaults[name] = of_setting[settings[0]]
        quiet = {key: one for key, one in of_setting.items() if one.size and rate(one, streams.stable) <= per_month}
        if quiet:
            best = min(quiet, key=lambda key: middle(quiet[key]))
            alarms[f"river {name}, {best}"] = quiet[best]

    def kswin(setting: Kswin) -> Bools:
        found = streams.kept(str(setting), partial(kswin_alarms, setting, streams.confidence, streams.learned))
        return np.asarray(found)

    defaults["KSWIN"] = kswin(KSWIN_DEFAULT)
    for window, recent in KSWIN_WINDOWS:
        calm = slice(-CALM, None)
        values, stable = streams.confidence[:, calm], streams.stable[:, calm]
        search = partial(kswin_alpha, window, recent, values, streams.learned, stable, per_month)
        alpha = float(streams.kept(f"alpha {window} {recent} {per_month}", search))
        own = kswin(Kswin(alpha, window, recent))
        alarms[f"river KSWIN, the last {recent} of {window} steps, alpha {alpha:.2g}"] = own
    return alarms, defaults


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
