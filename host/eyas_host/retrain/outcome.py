"""Whether the next version is better than the one that serves: three outcomes of two comparisons.

Two sets show it: the test images that both know, and the new images that were held out. Both predict every image as a
device does, by each bundle's own decision rule, so that the difference is that of pairs; `compare` has the test.

There are three outcomes, each at a stated level (5 %: chance alone gives it to 1 version in 20 at most):

- *better*: what was gained on the new images is more than chance explains. Registered.
- *worse*: what was lost on the new images is, or the old ones lose more than is allowed and more than chance explains.
  Kept out.
- *not shown to be better*: neither. Registered for trial if more was gained than lost on the new images, or kept out.

The last rule follows from what few images can show. Where chance alone changes the prediction of 10 images of 100, a
version that is truly 5 points better is shown to be so on 150 images in 40 tries of 100, but gains there in 93; one
that is truly 3 points worse gains in 13. This gate stands before a rollout that has a proof of its own, on live
frames and labelled disagreements (`then = "proven"`): it keeps out what is likely worse, and leaves the proof to the
rollout. Who rolls out without a proof asks for `strict`, which keeps out what is not shown to be better.

On the old images a point that may be lost (`max_loss`) is far below what 150 images can tell: judged by the figure
alone, an equal version is kept out in 35 tries of 100. By the test it is in 3; one that is truly 3 points worse is then
kept out in 20 tries, with 2,000 images in 98. docs/versions.md has the table, tests/host/retrain/test_judge.py computes
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

MAX_LOSS = 0.01
"""Balanced accuracy that may be lost on the old test images."""
LEVEL = 0.05
"""Largest probability that chance alone calls an equal version better, or worse."""
Outcome = Literal["better", "worse", "not shown to be better"]
BETTER: Outcome = "better"
WORSE: Outcome = "worse"
UNSHOWN: Outcome = "not shown to be better"


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The next version against its parent on the same images."""

    images: int
    changed: int
    """Images whose predicted label is another one."""
    gain: float
    """Balanced accuracy, 0..1; negative: lost."""
    interval: tuple[float, float]
    """Of the gain: at either end chance reaches beyond it with the level's probability."""
    p_better: float
    """How often chance alone would gain as much, if nothing were gained."""
    p_worse: float
    """How often chance alone would lose as much, if nothing were lost."""

    def describe(self) -> str:
        """The gain in points with its interval and the images."""
        gain, low, high = (100 * value for value in (self.gain, *self.interval))
        return (
            f"{gain:+.1f} points of balanced accuracy ({low:+.1f} to {high:+.1f}) on {self.images} images, "
            f"{self.changed} of them predicted differently"
        )


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What became better or worse."""

    outcome: Outcome
    level: float
    old: Compared | None
    """On the test images that the parent was tested on; null without any."""
    new: Compared | None
    """On held-out images that the parent never saw; null without any."""
    problems: tuple[str, ...]
    """Why it is kept out; empty if it may be tried."""

    @property
    def passes(self) -> bool:
        """Whether it may be tried in the parent's place."""
        return not self.problems

    @property
    def summary(self) -> str:
        """The outcome and what it rests on, for the version's note."""
        return self.outcome if self.new is None else f"{self.outcome}: {self.new.describe()}"

    def describe(self) -> Iterator[str]:
        """What was measured and what follows, a line each."""
        for what, compared in (("old test images", self.old), ("new held-out images", self.new)):
            yield f"{what}: {'none' if compared is None else compared.describe()}"
        yield f"{self.outcome}, at a level of {100 * self.level:g} %"


def decide_outcome(
    old: Compared | None,
    new: Compared | None,
    *,
    level: float = LEVEL,
    max_loss: float = MAX_LOSS,
    strict: bool = False,
) -> Judged:
    """The outcome of two comparisons, and why the next version is kept out, if it is.

    Args:
        old: On the old test images.
        new: On the new held-out images.
        level: Level of each test; 0.5 takes the point estimates.
        max_loss: Balanced accuracy that the old test images may lose.
        strict: Keep out what is not shown to be better.

    """
    problems = []
    if old is not None and -old.gain > max_loss and old.p_worse <= level:
        problems.append(
            f"it loses {-100 * old.gain:.1f} points on the old test images, where {100 * max_loss:g} may be lost, and "
            f"chance explains that in {100 * old.p_worse:.1f} % of cases at most"
        )
    if new is not None and new.gain < 0 and new.p_worse <= level:
        problems.append(f"it loses {-100 * new.gain:.1f} points on the new held-out images")
    outcome = WORSE if problems else UNSHOWN
    if not any(one is not None and one.changed for one in (old, new)):
        problems.append("nothing changed: it predicts what its parent does for every image")
    elif new is None:
        problems.append("none of the new images was held out, so that nothing shows that it is better")
    elif outcome != WORSE and new.gain > 0 and new.p_better <= level:
        outcome = BETTER
    elif outcome != WORSE and new.gain <= 0:
        problems.append(f"not shown to be better: it gains nothing on {new.images} new held-out images")
    elif outcome != WORSE and strict:
        problems.append(f"not shown to be better on {new.images} new held-out images: more of them are needed")
    return Judged(outcome=outcome, level=level, old=old, new=new, problems=tuple(problems))
