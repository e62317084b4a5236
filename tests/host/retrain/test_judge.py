"""The judgement: exact where it can be, and what it lets pass and keeps out with few images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom, binomtest

from eyas_host.retrain.judge import compare
from eyas_host.retrain.outcome import BETTER, LEVEL, MAX_LOSS, UNSHOWN, WORSE, Compared, decide_outcome

DOCS = Path(__file__).parents[3] / "docs/versions.md"
NOISE = 0.10
"""Share of images that chance alone predicts differently, half of them for the better."""
KINDS = {"equal": 0.0, "3 points worse": -0.03, "5 points better": 0.05}
IMAGES = (150, 400, 2000)


def versions(
    gained: int, lost: int, both: int, neither: int = 0, classes: int = 2
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Predictions of two versions, of which only the second one is right on `gained` images; all of class 0."""
    right, wrong = np.eye(classes)[0], np.eye(classes)[1]
    before = [wrong] * gained + [right] * (lost + both) + [wrong] * neither
    after = [right] * gained + [wrong] * lost + [right] * both + [wrong] * neither
    return np.array(before), np.array(after), np.zeros(len(before), np.int64)


@pytest.mark.parametrize(("gained", "lost", "both"), [(9, 2, 36), (6, 0, 30), (1, 0, 5), (12, 9, 400), (3, 14, 130)])
def test_it_is_the_exact_test_of_mcnemar(gained: int, lost: int, both: int) -> None:
    found = compare(*versions(gained, lost, both))
    better = binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue
    worse = binomtest(lost, gained + lost, 0.5, alternative="greater").pvalue
    assert found.p_better == pytest.approx(better, abs=0.03), "of 2,000 draws"
    assert found.p_worse == pytest.approx(worse, abs=0.03)
    assert found.gain == pytest.approx((gained - lost) / (gained + lost + both))
    assert (found.interval[0] > 0) == (found.p_better < LEVEL), "interval and test say the same"
    assert (found.interval[1] < 0) == (found.p_worse < LEVEL)


def test_look_alikes_are_one_image() -> None:
    before, after, targets = versions(6, 0, 30)
    units = np.array([0] * 6 + list(range(1, 31)))
    assert compare(before, after, targets).p_better < LEVEL < compare(before, after, targets, units=units).p_better


def test_a_small_class_counts_like_a_large_one() -> None:
    """Ten images of a class of ten are lost for twenty of a class of a thousand."""
    targets = np.array([0] * 1000 + [1] * 10)
    before = np.eye(2)[np.where(np.arange(1010) < 20, 1 - targets, targets)]
    after = np.eye(2)[np.zeros(1010, int)]
    found = compare(before, after, targets)
    assert found.gain == pytest.approx((0.02 - 1) / 2) and found.p_worse < 0.001


def test_the_same_predictions_are_no_gain() -> None:
    old, new = compare(*versions(0, 0, 100, 10)), compare(*versions(0, 0, 40, 5))
    found = decide_outcome(old, new)
    assert (found.outcome, found.passes) == (UNSHOWN, False) and "nothing changed" in found.problems[0]
    assert new.interval[0] < 0 < new.interval[1] and (new.p_better, new.p_worse) == (1, 1)
    assert not decide_outcome(old, new, level=0.5).passes


def test_another_wrong_label_changes_something_and_gains_nothing() -> None:
    before, after, targets = versions(0, 0, 40, 5, classes=3)
    after[-1] = np.eye(3)[2]
    found = decide_outcome(None, compare(before, after, targets))
    assert not found.passes and "gains nothing" in found.problems[0]


CASES = (
    # old (gained, lost, both), new, outcome, kept out for
    ((0, 0, 147), (30, 1, 100), BETTER, ""),
    ((2, 5, 140), (30, 1, 100), BETTER, ""),
    ((3, 7, 137), (12, 2, 31), BETTER, ""),
    ((1, 20, 126), (30, 1, 100), WORSE, "points on the old test images, where 1 may be lost"),
    ((5, 5, 137), (7, 5, 135), UNSHOWN, ""),
    ((5, 5, 137), (5, 7, 135), UNSHOWN, "it gains nothing on 147 new held-out images"),
    ((5, 5, 137), (5, 5, 137), UNSHOWN, "it gains nothing on 147 new held-out images"),
    ((5, 5, 137), (2, 20, 100), WORSE, "on the new held-out images"),
    ((5, 5, 137), None, UNSHOWN, "none of the new images was held out"),
)


@pytest.mark.parametrize(("old", "new", "outcome", "reason"), CASES)
def test_three_outcomes(old: tuple[int, int, int], new: tuple[int, int, int] | None, outcome: str, reason: str) -> None:
    compared = None if new is None else compare(*versions(*new))
    found = decide_outcome(compare(*versions(*old)), compared)
    assert found.outcome == outcome and found.passes == (not reason)
    assert reason in "; ".join(found.problems)
    strict = decide_outcome(compare(*versions(*old)), compared, strict=True)
    assert strict.passes == (outcome == BETTER)
    assert list(found.describe())[-1] == f"{outcome}, at a level of 5 %"


def test_what_is_said_has_the_interval_and_the_images() -> None:
    found = compare(*versions(12, 10, 125))
    text = found.describe()
    assert text.startswith("+1.4 points of balanced accuracy (-") and text.endswith(
        "on 147 images, 22 of them predicted differently"
    )


class Chances(NamedTuple):
    """Probabilities of a version with a true difference on a number of images."""

    shown: float
    """Shown to be better on the new images."""
    tried: float
    """Registered for trial: gained there and is not worse."""
    old_out: float
    """Kept out by the old images."""
    old_out_by_figure: float
    """Kept out by the old images if the figure alone decided."""


def chances(images: int, difference: float) -> Chances:
    """Computed exactly: the number of images that differ is binomial, and so is how many of them are gained."""
    gains, loses = NOISE / 2 + max(difference, 0), NOISE / 2 + max(-difference, 0)
    shown = tried = old_out = by_figure = 0.0
    for differ in range(images + 1):
        if (weight := binom.pmf(differ, images, gains + loses)) < 1e-12:
            continue
        gained = np.arange(differ + 1)
        p = weight * binom.pmf(gained, differ, gains / (gains + loses))
        net = (2 * gained - differ) / images
        better = binom.sf(gained - 1, differ, 0.5) <= LEVEL
        worse = binom.sf(differ - gained - 1, differ, 0.5) <= LEVEL
        shown += p[better & (net > 0)].sum()
        tried += p[net > 0].sum()
        by_figure += p[net < -MAX_LOSS].sum()
        old_out += p[(net < -MAX_LOSS) & worse].sum()
    return Chances(shown, tried, old_out, by_figure)


def rows() -> list[str]:
    """The table of the documentation."""
    found = []
    for kind, difference in KINDS.items():
        for images in IMAGES:
            cells = [f"{100 * one:.0f}" for one in chances(images, difference)]
            found.append(f"| {kind} | {images:,} | " + " | ".join(cells) + " |")
    return found


def test_the_documentation_has_the_probabilities() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for row in rows():
        assert row in text, "\n".join(rows())


def test_the_judgement_passes_as_often_as_computed() -> None:
    """Ten thousand versions, judged by the outcome's own rule on the exact figures of their images."""
    dice = np.random.default_rng(0)
    for difference in KINDS.values():
        gains, loses = NOISE / 2 + max(difference, 0), NOISE / 2 + max(-difference, 0)
        drawn = dice.multinomial(150, [gains, loses, 1 - gains - loses], 10_000)
        expected = chances(150, difference)
        passed = shown = out = 0
        for (gained, lost, _), count in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True):
            one = exact(int(gained), int(lost), 150)
            alone = decide_outcome(None, one)
            passed, shown = passed + alone.passes * count, shown + (alone.outcome == BETTER) * count
            out += (decide_outcome(one, None).outcome == WORSE) * count
        assert passed / 10_000 == pytest.approx(expected.tried, abs=0.015)
        assert shown / 10_000 == pytest.approx(expected.shown, abs=0.015)
        assert out / 10_000 == pytest.approx(expected.old_out, abs=0.015)


def exact(gained: int, lost: int, images: int) -> Compared:
    """What `compare` finds, but for the draws."""
    gain, differ = (gained - lost) / images, gained + lost
    return Compared(
        images=images,
        changed=differ,
        gain=gain,
        interval=(gain, gain),
        p_better=float(binom.sf(gained - 1, differ, 0.5)),
        p_worse=float(binom.sf(lost - 1, differ, 0.5)),
    )
