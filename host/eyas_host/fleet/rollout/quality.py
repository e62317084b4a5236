"""Whether a new version is worse than the old one, from what devices report anyway.

A device is compared with itself: the change of each figure since before the wave. These changes are compared between
the devices with the new version and the control group, one value a device, because a device's frames are no independent
samples. Where devices are too few for that, this says so instead of guessing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.messages import GROWTH, Window
from eyas_host.fleet.rollout.plan import QualitySection
from eyas_host.fleet.rollout.sequential import Bools, Floats, draws, possible_draws, spent, stop
from eyas_host.fleet.rollout.state import Cohort, Figure

FIGURES = ("confidence", "ood", "errors", "latency", "temperature")
MAX_DEVICES = 200
"""Devices of one arm that are compared; more would only cost time."""
LOOK_GROWTH = 1.25
"""Each look comes when the compared time has grown by this factor."""


class Sums(msgspec.Struct, kw_only=True):
    """Sums over the windows of one device."""

    windows: int = 0
    frames: int = 0
    confidence: float = 0.0
    nonfinite: int = 0
    ood: int = 0
    """Windows out of distribution."""
    latency_bins: dict[int, int] = {}
    temperature: float = 0.0
    """Sum of the processor's temperature over windows with one, degrees Celsius."""
    measured: int = 0
    """Windows with a temperature."""

    def add(self, window: Window) -> None:
        """Add a window; its counts come from the network, so the bins are bounded by its reader."""
        self.windows += window.merged
        self.frames += window.frames
        self.confidence += min(sum(window.confidence_sum.values()), float(window.frames))
        self.nonfinite += min(window.nonfinite, window.frames)
        self.ood += window.merged if window.ood_reason else 0
        for number, count in window.latency_bins.items():
            self.latency_bins[number] = self.latency_bins.get(number, 0) + count
        if window.temperature_c is not None and math.isfinite(window.temperature_c):
            self.temperature += window.temperature_c
            self.measured += 1

    def figures(self) -> dict[str, float]:
        """Each figure, larger is worse; NaN where nothing was measured."""
        median = LogHistogram(GROWTH, bins=self.latency_bins, max_ms=math.inf).quantile(0.5)
        return {
            "confidence": -self.confidence / self.frames if self.confidence else math.nan,
            "ood": self.ood / self.windows if self.windows else math.nan,
            "errors": self.nonfinite / self.frames if self.frames else math.nan,
            "latency": math.log(median) if median > 0 else math.nan,
            "temperature": self.temperature / self.measured if self.measured else math.nan,
        }


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a device reported before a wave, and since its figures are compared."""

    before: Sums
    after: Sums

    def changes(self, min_frames: int) -> dict[str, float]:
        """Change of each figure, larger is worse; NaN where one side has too few predictions."""
        if min(self.before.frames, self.after.frames) < min_frames:
            return dict.fromkeys(FIGURES, math.nan)
        before, after = self.before.figures(), self.after.figures()
        return {name: after[name] - before[name] for name in FIGURES}


def device_figures(windows: Iterable[Window], cohort: Cohort, baseline_s: float, digest: str) -> DeviceFigures:
    """Sum up the windows of one device.

    Args:
        windows: Its windows since the baseline's begin.
        cohort: The cohort that it is in.
        baseline_s: Time before the wave that counts, seconds.
        digest: First digits of the bundle that it should run; windows of another one are no figures after. Empty: all.

    """
    found = DeviceFigures(before=Sums(), after=Sums())
    for window in windows:
        if cohort.started - baseline_s <= window.time < cohort.started:
            found.before.add(window)
        elif window.time >= cohort.since and window.digest.startswith(digest):
            found.after.add(window)
    return found


def too_few(cohort: Cohort, alpha: float) -> str:
    """Why there are not enough devices for a verdict at `alpha`, for people; empty if there are."""
    if not cohort.control:
        return "no control group"
    names = [*cohort.treated, *cohort.control]
    treated = [name in set(cohort.treated) for name in names]
    possible = possible_draws(treated, [cohort.groups.get(name, "") for name in names])
    if possible * spent(1, alpha) >= 1:
        return ""
    needed = math.ceil(1 / spent(1, alpha))
    arms = f"{devices_text(len(cohort.treated))} and {len(cohort.control)} of the control group"
    return f"{arms} can be drawn in {possible} ways, {needed} are needed"


def look(
    cohort: Cohort, found: Mapping[str, DeviceFigures], quality: QualitySection, *, alpha: float, seed: str
) -> tuple[dict[str, str], tuple[Figure, ...]]:
    """Compare both arms once.

    Args:
        cohort: The devices, and what earlier looks stopped.
        found: Figures of each device.
        quality: What is tolerated.
        alpha: Rate of false alarms of this cohort, all looks and figures together.
        seed: Text that the draws are made from, the same at each look.

    Returns:
        The draws that have stopped, and the figures.

    """
    names = [*cohort.treated, *cohort.control]
    is_treated = np.array([name in set(cohort.treated) for name in names])
    matrix = draws(is_treated.tolist(), [cohort.groups.get(name, "") for name in names], _seed(seed))
    changes = [
        found[name].changes(quality.min_frames) if name in found else dict.fromkeys(FIGURES, math.nan) for name in names
    ]
    stopped, figures = {}, []
    for figure in FIGURES:
        values = np.array([change[figure] for change in changes])
        earlier = _unpack(cohort.stopped.get(figure, ""), len(matrix))
        shifted = values - np.where(is_treated, _tolerated(quality, figure), 0.0)
        now = stop(shifted, matrix, earlier, cohort.looks + 1, alpha / len(FIGURES))
        stopped[figure] = np.packbits(now).tobytes().hex()
        figures.append(_summary(figure, values, is_treated, worse=bool(now[0])))
    return stopped, tuple(figures)


def devices_text(count: int) -> str:
    """A number of devices, for people."""
    return f"{count} device{'' if count == 1 else 's'}"


def describe(figures: Sequence[Figure]) -> str:
    """The figures of a look in one line."""
    texts = []
    for figure in figures:
        if figure.treated is None or figure.control is None:
            continue
        difference = figure.treated - figure.control
        if figure.name == "latency":
            text = f"latency x{math.exp(difference):.2f}"
        elif figure.name == "confidence":
            text = f"confidence {-difference:+.3f}"
        elif figure.name == "temperature":
            text = f"temperature {difference:+.1f} C"
        else:
            text = f"{figure.name} {difference:+.2%}"
        texts.append(f"{text}{' (worse)' if figure.worse else ''}")
    return ", ".join(texts)


def _tolerated(quality: QualitySection, figure: str) -> float:
    return math.log(quality.latency) if figure == "latency" else float(getattr(quality, figure))


def _summary(name: str, values: Floats, treated: Bools, *, worse: bool) -> Figure:
    arms = [values[arm & np.isfinite(values)] for arm in (treated, ~treated)]
    means = [float(arm.mean()) if len(arm) else None for arm in arms]
    return Figure(name=name, treated=means[0], control=means[1], devices=(len(arms[0]), len(arms[1])), worse=worse)


def _unpack(text: str, count: int) -> Bools:
    if not text:
        return np.zeros(count, bool)
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
