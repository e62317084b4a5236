"""Who is compared in each wave, and what the figures say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from eyas_device.updates.release import bucket
from eyas_host.fleet.rollout.quality import (
    FIGURES,
    LOOK_GROWTH,
    MAX_DEVICES,
    DeviceFigures,
    describe,
    look,
    too_few,
)
from eyas_host.fleet.rollout.state import Cohort, Rollout, RolloutState, Seen, Step


def due_cohorts(rollout: Rollout, now: float) -> list[int]:
    """Cohorts whose figures `decide` needs now, by their index."""
    state = rollout.state
    if state.status not in ("running", "waiting"):
        return []
    cohorts = enumerate(state.cohorts)
    return [i for i, cohort in cohorts if not (cohort.short or cohort.accepted) and now >= cohort.next_look]


def cohort_of(state: RolloutState) -> Cohort | None:
    """The cohort of the present wave; None before it is fixed."""
    return next((cohort for cohort in state.cohorts if cohort.wave == state.wave), None)


def fix_cohort(
    rollout: Rollout, done: Sequence[Seen], devices: Sequence[Seen], now: float, *, good: bool
) -> RolloutState:
    """Fix who is compared in the present wave.

    Args:
        rollout: The rollout.
        done: Devices of the wave that run the new version.
        devices: All devices.
        now: Seconds since 1970.
        good: Whether the wave is good; before that, only a cohort that is large enough is fixed.

    """
    state, quality = rollout.state, rollout.plan.quality
    control = [s for s in devices if s.device in state.control and s.connected and s.digest != rollout.digest]
    groups = {s.group for s in done} & {s.group for s in control}
    arms = [
        sorted((s for s in arm if s.group in groups), key=lambda s: bucket(rollout.id, s.device))[:MAX_DEVICES]
        for arm in (done, control)
    ]
    cohort = Cohort(
        wave=state.wave,
        treated=tuple(seen.device for seen in arms[0]),
        control=tuple(seen.device for seen in arms[1]),
        groups={seen.device: seen.group for arm in arms for seen in arm},
        started=state.since,
        since=now,
        next_look=now + quality.look_s,
    )
    cohort = replace(cohort, short=too_few(cohort, _alpha(rollout) / len(FIGURES)))
    return state if cohort.short and not good else replace(state, cohorts=(*state.cohorts, cohort))


def look_at(
    rollout: Rollout, now: float, found: Mapping[int, Mapping[str, DeviceFigures]]
) -> tuple[RolloutState, list[Step]]:
    """Look at the cohorts whose figures are given; returns the state and what was seen to be worse."""
    quality, cohorts = rollout.plan.quality, list(rollout.state.cohorts)
    steps = []
    for index, figures in found.items():
        cohort = cohorts[index]
        seed = f"{rollout.id}\n{cohort.wave}"
        stopped, summary = look(cohort, figures, quality, alpha=_alpha(rollout), seed=seed)
        next_look = max(now + 1, cohort.since + LOOK_GROWTH * (now - cohort.since))
        cohort = replace(cohort, stopped=stopped, figures=summary, looks=cohort.looks + 1, next_look=next_look)
        cohorts[index] = cohort
        if worse(cohort):
            steps.append(Step(what=f"wave {cohort.wave + 1} is worse", why=describe(summary), at=now))
    return replace(rollout.state, cohorts=tuple(cohorts)), steps


def worse(cohort: Cohort) -> str:
    """The figures of a cohort that is worse than the control group; empty for another one."""
    is_worse = any(figure.worse for figure in cohort.figures)
    return describe(cohort.figures) if is_worse and not cohort.accepted else ""


def verdict(cohort: Cohort | None) -> str:
    """What the figures of a wave say, in one line."""
    if cohort is None:
        return "quality is not judged"
    if cohort.accepted:
        return "worse, and accepted"
    if cohort.short:
        return f"not enough to judge quality: {cohort.short}"
    if not cohort.looks:
        return "quality is not looked at yet"
    if not any(min(figure.devices) for figure in cohort.figures):
        return "not enough to judge quality: one arm has no figures"
    looks = f"{cohort.looks} look{'' if cohort.looks == 1 else 's'}"
    state = "worse" if any(figure.worse for figure in cohort.figures) else "no worse"
    return f"{state} in {looks}: {describe(cohort.figures)}"


def _alpha(rollout: Rollout) -> float:
    """Rate of false alarms of one wave."""
    return rollout.plan.quality.alpha / len(rollout.plan.wave)
