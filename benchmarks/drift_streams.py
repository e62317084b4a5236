"""Simulated devices with day and night, weather, slow scenes and scripted drift, as sums of steps of five minutes.

A device sees four labels, whose shares follow the hour and wander. The logit of a prediction's confidence falls at
night, wanders within hours (an autoregression), differs from day to day and between devices; frames are correlated, as
those of a video are. Predictions are right with the probability that they claim, but for a concept drift. The sketch
follows light and scene; the distance from the training images follows the sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.telemetry.messages import CONFIDENCE_EDGES
from eyas_host.fleet.drift.measures import BINS, DIRECTIONS, MAX_LABELS, SUMS
from eyas_host.fleet.drift.profile import STEPS_OF_DAY

Floats = npt.NDArray[np.float64]

LABELS = ("bolt", "nut", "screw", "washer")
KINDS = ("dirt", "light", "new class", "label shift", "slow blur")
"""`slow blur` grows over three days; the others begin at once."""
STRENGTHS = {"weak": 0.35, "medium": 1.0, "strong": 2.5}
FRAMES, CORRELATED = 150, 5
"""Predictions of a step, and how many in a row are as one."""
_FINE = 400
_LOGITS = np.linspace(-1.0, 11.0, _FINE)
_P = 1 / (1 + np.exp(-_LOGITS))
_BIN = np.searchsorted(CONFIDENCE_EDGES, _P, side="right")
_MARGIN, _ENTROPY = 2 * _P - 1, -(_P * np.log(_P) + (1 - _P) * np.log1p(-_P)) / np.log(len(LABELS))
_SPREAD, _NEW_LOGIT, _NEW_SPREAD = 1.6, 0.4, 0.7


class Scripts(msgspec.Struct):
    """What happens to each of n devices."""

    kind: npt.NDArray[np.str_]
    """One of `KINDS`, `concept` (labels change, images do not) or empty, [n]."""
    strength: Floats
    start: Floats
    """Step at which it begins, [n]."""
    stop: Floats
    """Step at which it ends, [n]."""

    @classmethod
    def stable(cls, devices: int) -> Scripts:
        """Nothing happens to any device."""
        return cls(
            np.full(devices, "", dtype="U16"), np.zeros(devices), np.full(devices, np.inf), np.full(devices, np.inf)
        )


class Day(msgspec.Struct):
    """One day of n devices."""

    sums: Floats
    """[STEPS_OF_DAY, n, SUMS]"""
    accuracy: Floats
    """Expected accuracy of each step, [STEPS_OF_DAY, n]."""


def days(scripts: Scripts, count: int, seed: int = 0) -> Iterator[Day]:
    """Simulate `count` days; step 0 is midnight of the first one."""
    rng = np.random.default_rng(seed)
    n = len(scripts.kind)
    fixed = {
        "logit": rng.normal(3.4, 0.3, n),
        "place": rng.normal(0, 0.7, (n, DIRECTIONS)),
        "mix": rng.normal(0, 0.4, (n, len(LABELS))),
        "phase": rng.normal(0, 0.02, n),
        "dirt": rng.normal(0, 1, (n, DIRECTIONS)),
    }
    fixed["dirt"] /= np.linalg.norm(fixed["dirt"], axis=1, keepdims=True)
    state = rng.normal(0, 1, (n, 2 + len(LABELS) + DIRECTIONS))
    for day in range(count):
        weather = rng.normal(0, 1, (n, 3))
        yield _day(scripts, fixed, state, weather, day, rng)


def _day(
    scripts: Scripts, fixed: dict[str, Floats], state: Floats, weather: Floats, day: int, rng: np.random.Generator
) -> Day:
    n, t = len(scripts.kind), STEPS_OF_DAY
    memory = 0.93
    noise = rng.normal(0, np.sqrt(1 - memory**2), (t, *state.shape))
    scene = np.empty_like(noise)
    for step in range(t):
        state[:] = memory * state + noise[step]
        scene[step] = state
    hour = (np.arange(t)[:, None] + 0.5) / t + fixed["phase"]
    light = np.clip(1.6 * np.sin(np.pi * np.clip((hour % 1 - 0.22) / 0.56, 0, 1)), 0, 1)
    steps = day * t + np.arange(t)[:, None]
    inside = (steps >= scripts.start) & (steps < scripts.stop)
    slow = np.where(scripts.kind == "slow blur", np.clip((steps - scripts.start) / (3 * t), 0, 1), 1.0)
    amount = np.where(inside, scripts.strength * slow, 0.0)
    by = {kind: amount * (scripts.kind == kind) for kind in (*KINDS, "concept")}
    blur = by["dirt"] + by["slow blur"]
    mean_logit = fixed["logit"] - 0.7 * (1 - light) + 0.22 * scene[..., 0] + 0.12 * weather[:, 0]
    mean_logit = mean_logit - 0.35 * blur - 0.18 * by["light"]
    sketch = fixed["place"] + 0.35 * scene[..., -DIRECTIONS:]
    sketch[..., 0] += 1.5 * light * (1 + 0.1 * weather[:, 1]) + 0.15 * weather[:, 2] + 0.45 * by["light"]
    sketch += 0.4 * blur[..., None] * fixed["dirt"]
    new = np.minimum(0.05 * by["new class"], 0.5)
    mix = fixed["mix"] + 0.25 * scene[..., 1 : 1 + len(LABELS)]
    mix[..., 0] += 0.6 * light + 0.35 * by["label shift"]
    mix[..., 1] -= 0.35 * by["label shift"]
    shares = np.exp(mix)
    shares /= shares.sum(axis=-1, keepdims=True)
    return _count(rng, mean_logit, sketch, shares, new, by["concept"], n)


def _count(
    rng: np.random.Generator, mean_logit: Floats, sketch: Floats, shares: Floats, new: Floats, concept: Floats, n: int
) -> Day:
    """Draw the predictions of each step."""
    t, independent = len(mean_logit), FRAMES // CORRELATED
    known = np.exp(-0.5 * np.square((_LOGITS - mean_logit[..., None]) / _SPREAD))
    strange = np.exp(-0.5 * np.square((_LOGITS - _NEW_LOGIT) / _NEW_SPREAD))
    density = (1 - new)[..., None] * known / known.sum(axis=-1, keepdims=True) + new[
        ..., None
    ] * strange / strange.sum()
    in_bins = np.stack([density[..., number == _BIN].sum(axis=-1) for number in range(BINS)], axis=-1)
    in_bins /= in_bins.sum(axis=-1, keepdims=True)
    right = (density * _P).sum(axis=-1) * (1 - np.minimum(0.08 * concept, 0.9))
    right -= new * (strange * _P).sum() / strange.sum()  # none of the new class is right
    per_label = rng.multinomial(independent, shares)
    counts = CORRELATED * rng.multinomial(per_label, np.broadcast_to(in_bins[:, :, None], (*per_label.shape, BINS)))
    middle = np.stack([_mean_in(density, values) for values in (_P, _MARGIN, _ENTROPY)], axis=-2)
    sums = np.zeros((t, n, SUMS))
    bins = counts.sum(axis=2)
    sums[..., 0] = FRAMES
    sums[..., 1] = (bins * middle[..., 0, :]).sum(axis=-1)
    sums[..., 2] = bins[..., :2].sum(axis=-1)
    sums[..., 3] = (bins * middle[..., 1, :]).sum(axis=-1)
    sums[..., 4] = (bins * middle[..., 2, :]).sum(axis=-1)
    images = 30
    variance = 1 + 6.0 * (new * (1 - new))[..., None]
    mean = sketch + rng.normal(0, 1, sketch.shape) * np.sqrt(variance / images) + 1.2 * new[..., None]
    spread = variance * rng.chisquare(images - 1, sketch.shape) / images
    distance = np.sqrt(np.square(mean).mean(axis=-1) + spread.mean(axis=-1))
    quantile = np.clip(1 / (1 + np.exp(-(distance - 1.6) * 2.5)), 0, 1)
    sums[..., 5], sums[..., 6], sums[..., 8] = 10 * quantile, 10, 10
    sums[..., 7] = 10 * (quantile > 0.95)
    sums[..., 9] = images
    sums[..., 10 : 10 + DIRECTIONS] = images * mean
    sums[..., 10 + DIRECTIONS : 10 + 2 * DIRECTIONS] = images * (spread + np.square(mean))
    at = 10 + 2 * DIRECTIONS
    sums[..., at : at + len(LABELS)] = counts.sum(axis=-1)
    sums[..., at + MAX_LABELS : at + MAX_LABELS + len(LABELS)] = (counts * middle[..., None, 0, :]).sum(axis=-1)
    at += 2 * MAX_LABELS
    sums[..., at : at + len(LABELS) * BINS] = counts.reshape(t, n, -1)
    sums[..., at + MAX_LABELS * BINS :] = bins
    return Day(sums, right)


def _mean_in(density: Floats, values: Floats) -> Floats:
    """Mean of values in each bin of confidence, [..., BINS]."""
    parts = []
    for number in range(BINS):
        own = density[..., number == _BIN]
        parts.append((own * values[number == _BIN]).sum(axis=-1) / np.maximum(own.sum(axis=-1), 1e-12))
    return np.stack(parts, axis=-1)


def scripts(
    kinds: Sequence[str], seeds: int, start_day: float, *, seed: int = 0
) -> tuple[Scripts, list[tuple[str, str]]]:
    """Every kind at every strength, `seeds` times, each beginning somewhere within a day; and which is which."""
    rng = np.random.default_rng(seed)
    cases = [(kind, strength) for kind in kinds for strength in STRENGTHS for _ in range(seeds)]
    start = (start_day + rng.random(len(cases))) * STEPS_OF_DAY
    found = Scripts(
        np.array([kind for kind, _ in cases], dtype="U16"),
        np.array([STRENGTHS[strength] for _, strength in cases]),
        start,
        np.full(len(cases), np.inf),
    )
    return found, cases
