"""Probation: a signed release proves itself on real frames within the bounds that were signed with it.

The new model is compared with the previous one, which answers a sample of the same frames in shadow. A bound counts as
violated only when the counts say so. Each rate is tested by Wald's sequential probability ratio test of "at the bound"
against "twice as bad" (A. Wald, "Sequential Tests of Statistical Hypotheses", 1945): by Ville's inequality a model at
a bound fails it with a probability of at most `FALSE_ALARM / 2`, however often it is looked at, and one that is twice
as bad passes with at most `MISS`, unless its time runs out. Counts that time cut short are judged by the exact binomial
test, with the other half of `FALSE_ALARM`.

Errors and latency may end a probation at any frame. The rates that compare answers are first looked at after
`Bounds.frames` predictions: neighbouring frames show the same scene, and a few of them say little. Where the counts
cannot tell by then, the probation goes on until they can, or until `Bounds.seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

import msgspec

from eyas_device.bundle import MANIFEST, sha256
from eyas_device.support.histogram import LogHistogram
from eyas_device.updates.records import Tally, Verdict, write_record
from eyas_device.updates.release import Bounds, Release, UpdateError, decode_document
from eyas_device.updates.slots import Slots

FALSE_ALARM = 0.05
"""Largest probability that a model exactly at a bound fails it."""
MISS = 0.05
"""Largest probability that a model twice as bad as a bound passes it, given enough frames."""
LATENCY_GROWTH = 1.05
"""Ratio of neighbouring bins of a tally's histograms of durations."""
_FAILS = math.log(2 / FALSE_ALARM)
_PASSES = math.log(MISS)


class Assessment(NamedTuple):
    """What the counts say so far."""

    state: Literal["running", "passed", "failed"]
    reason: str = ""
    """Why it failed, or what it passed on, for people; empty while it is running."""


class _Rate(NamedTuple):
    """A rate and its bound."""

    name: Literal["errors", "latency", "ood", "agreement"]
    hits: int
    of: int
    bound: float

    @property
    def early(self) -> bool:
        """Whether it may fail the model at any frame."""
        return self.name in ("errors", "latency")

    def state(self, *, final: bool) -> Literal["within", "beyond", "open"]:
        """What the counts say; `final` if there will be no more of them."""
        if self.bound >= 1:
            return "within"
        weight = evidence(self.hits, self.of, self.bound)
        if weight >= _FAILS or (final and tail(self.hits, self.of, self.bound) <= FALSE_ALARM / 2):
            return "beyond"
        return "within" if final or weight <= _PASSES else "open"


def evidence(hits: int, of: int, bound: float) -> float:
    """Log-likelihood ratio of `hits` among `of`: a rate twice as high as `bound` (0..1) against one at the bound.

    Of a bound above 2/3, "twice as high" is half-way to 1. A single hit proves that a bound of 0 is violated.
    """
    if bound <= 0:
        return math.inf if hits else -math.inf
    worse = min(2 * bound, (1 + bound) / 2)
    return hits * math.log(worse / bound) + (of - hits) * math.log((1 - worse) / (1 - bound))


def tail(hits: int, of: int, rate: float) -> float:
    """Probability of at least `hits` among `of` at `rate` (0..1), exactly: the binomial distribution's upper tail."""
    if hits <= 0:
        return 1.0
    if rate <= 0 or hits > of:
        return 0.0
    if rate >= 1:
        return 1.0
    if hits <= of * rate:  # away from the middle, where terms only become smaller: too small ones count as nothing
        return 1.0 - _mass(of - hits + 1, of, 1 - rate)
    return _mass(hits, of, rate)


def _mass(hits: int, of: int, rate: float) -> float:
    """Probability of at least `hits` among `of` at `rate`, for `hits` above the mean."""
    log = math.lgamma(of + 1) - math.lgamma(hits + 1) - math.lgamma(of - hits + 1)
    term = math.exp(log + hits * math.log(rate) + (of - hits) * math.log1p(-rate))
    total = 0.0
    for count in range(hits, of + 1):
        total += term
        term *= (of - count) / (count + 1) * rate / (1 - rate)
        if term < 1e-12 * total:
            break
    return min(total, 1.0)


def assess(tally: Tally, bounds: Bounds, *, compared: bool = True) -> Assessment:
    """Judge a new model by what was counted so far.

    Args:
        tally: The counts.
        bounds: The release's bounds.
        compared: Whether there is a previous model to compare with; without one, only errors are judged.

    """
    enough, final = tally.frames >= bounds.frames, tally.seconds >= bounds.seconds
    comparable = compared and tally.frames >= min(bounds.min_frames, bounds.frames)
    undecided = False
    for rate in _rates(tally, bounds, compared=compared, comparable=comparable):
        if not (rate.early or enough or final):
            continue
        state = rate.state(final=final)
        if state == "beyond":
            return Assessment("failed", _reason(rate, tally, bounds))
        undecided |= state == "open"
    if final or (enough and not undecided):
        return Assessment("passed", _passed(tally, compared=compared, comparable=comparable))
    return Assessment("running")


def describe_tally(tally: Tally) -> str:
    """The counts, for people."""
    texts = [f"{tally.frames} predictions in {tally.seconds:.0f} s", f"{tally.errors} failed"]
    if tally.shadowed:
        now, before = _median(tally.latency_bins), _median(tally.previous_latency_bins)
        texts.append(f"the same label on {tally.shadowed - tally.different} of {tally.shadowed} frames")
        texts.append(f"median {now:.1f} ms against {before:.1f} ms")
    return ", ".join(texts)


def read_release(slots: Slots, name: str) -> Release | None:
    """The signed release that a slot was installed from; None for an unsigned one, or if its record is damaged."""
    data = slots.release(name)
    with suppress(UpdateError):
        return None if data is None else decode_document(data, Release, f"{name}.release")
    return None


def write_verdict(slots: Slots, name: str, verdict: Verdict) -> bool:
    """Write a verdict durably; False if the disk does not take it."""
    return write_record(slots.folder / f"{name}.probation", verdict)


def begin(slots: Slots, name: str, *, now: float) -> tuple[Release, Verdict] | None:
    """The release in a slot and its verdict, a new one if its probation has not begun.

    None for a slot that owes no proof: an unsigned one, or one whose probation has ended.
    """
    release = read_release(slots, name)
    if release is None:
        return None
    verdict = slots.verdict(name)
    if verdict is None:
        try:
            digest = sha256(slots.folder / name / MANIFEST)
        except OSError:
            return None
        model = f"{release.model} {release.version}"
        verdict = Verdict(manifest_sha256=digest, model=model, identity=release.identity, started=now)
    return (release, verdict) if verdict.state == "running" else None


def ended(verdict: Verdict, assessment: Assessment, tally: Tally, *, now: float) -> Verdict:
    """The verdict after its probation has ended at `now`, seconds since 1970."""
    return msgspec.structs.replace(verdict, state=assessment.state, reason=assessment.reason, tally=tally, ended=now)


def _rates(tally: Tally, bounds: Bounds, *, compared: bool, comparable: bool) -> Iterator[_Rate]:
    yield _Rate("errors", tally.errors, tally.frames, bounds.max_error_rate)
    if compared:  # a median is beyond a bound when more than half of the values are: the sign test
        yield _Rate("latency", tally.slower, tally.shadowed, 0.5)
    if comparable:
        yield _Rate("ood", tally.ood, tally.shadowed, bounds.max_ood_share)
        yield _Rate("agreement", tally.different, tally.shadowed, 1 - bounds.min_agreement)


def _reason(rate: _Rate, tally: Tally, bounds: Bounds) -> str:
    """Why a model fails by a rate, for people."""
    if rate.name == "errors":
        allowed = f"{bounds.max_error_rate:.1%} are allowed"
        return f"{rate.hits} of {rate.of} predictions failed or were not finite; {allowed}"
    if rate.name == "latency":
        now, before = _median(tally.latency_bins), _median(tally.previous_latency_bins)
        return (
            f"more than {bounds.max_latency_factor:g} times as slow as the previous model on {rate.hits} of {rate.of} "
            f"frames (median {now:.1f} ms against {before:.1f} ms)"
        )
    if rate.name == "ood":
        allowed = f"{bounds.max_ood_share:.1%} are allowed"
        return (
            f"{rate.hits} of {rate.of} frames are out of distribution for it and not for the previous model; {allowed}"
        )
    required = f"{bounds.min_agreement:.1%} are required"
    return f"the previous model's label on {rate.of - rate.hits} of {rate.of} frames; {required}"


def _passed(tally: Tally, *, compared: bool, comparable: bool) -> str:
    text = describe_tally(tally)
    if not compared:
        return f"{text}; not compared with a previous model"
    if not comparable:
        return f"{text}; too few to compare the answers"
    return text if tally.shadowed else f"{text}; not compared, the previous model answered no frame"


def _median(bins: dict[int, int]) -> float:
    """Median of durations in milliseconds; 0 without any."""
    return LogHistogram(LATENCY_GROWTH, bins=bins, max_ms=math.inf).quantile(0.5)
