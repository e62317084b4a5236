"""The engine: from a rollout and what its devices report to the next state, without reading or writing anything.

    running --good--> running (next wave) ... --last wave good--> finished
    running --good, then = pause or ask--> waiting --resume or approve--> running
    running --timeout, or by hand--> paused --resume--> running
    running, waiting --failures or worse--> aborting --everybody is back--> aborted      (or paused)

What the devices see is computed from the state (`state.channel_of`); who carries the state out twice does no harm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from msgspec.structs import replace

from eyas_device.updates.release import ALL_GROUPS
from eyas_host.fleet.rollout.cohorts import cohort_of, fix_cohort, look_at, verdict, worse
from eyas_host.fleet.rollout.plan import RetrySection, Wave
from eyas_host.fleet.rollout.proof import Evidence
from eyas_host.fleet.rollout.quality import DeviceFigures, devices_text
from eyas_host.fleet.rollout.shares import control_group, shares_of
from eyas_host.fleet.rollout.state import (
    UNDER_WAY,
    Progress,
    Reminder,
    Rollout,
    RolloutState,
    Seen,
    Step,
    takes_part,
)

_MAX_REASON = 500
_FAILED = ("failed", "silent")


class Decision(NamedTuple):
    """What the engine decided."""

    state: RolloutState
    steps: tuple[Step, ...] = ()
    """What happened and why, for the log."""
    remind: frozenset[tuple[str, str]] = frozenset()
    """Sites and groups whose devices should look at the repository now."""


class WaveCount(NamedTuple):
    """Devices of a wave by their progress."""

    members: int
    counts: Mapping[str, int]
    installed: int = 0
    """Devices on which the new version was installed, whatever came then."""

    @property
    def failed(self) -> int:
        """Devices that failed or went silent."""
        return sum(self.counts.get(name, 0) for name in _FAILED)

    @property
    def through(self) -> int:
        """Devices that committed or failed."""
        return self.counts.get("done", 0) + self.failed

    @property
    def judged(self) -> int:
        """All but those that are not connected and have not begun."""
        return self.members - self.counts.get("offline", 0)

    def __str__(self) -> str:
        parts = [f"{count} {name}" for name, count in self.counts.items() if count]
        return devices_text(self.members) + (f": {', '.join(parts)}" if parts else "")


def progress(rollout: Rollout, seen: Seen, now: float) -> Progress:
    """How far a device of the rollout is."""
    plan = rollout.plan
    about_it = _is_about(rollout, seen)
    runs_it = seen.digest == rollout.digest
    under_way = about_it and seen.update in UNDER_WAY
    if about_it and seen.update in ("refused", "rolled back"):
        return "failed"
    if about_it and seen.update == "failed":
        return "retrying" if _may_retry(plan.retry, seen) else "failed"
    if (runs_it or under_way) and seen.lost and now - seen.last_seen > plan.rollout.silent_s:
        return "silent"
    if under_way:
        return "under way"
    if runs_it:
        return "done"
    if not seen.connected:
        return "offline"
    return "back" if rollout.state.rolled_back else "waiting"


def is_installed(rollout: Rollout, seen: Seen) -> bool:
    """Whether the new version was installed on a device, which is all that an installer can see."""
    if seen.digest == rollout.digest:
        return True
    return _is_about(rollout, seen) and seen.update in ("probation", "committed", "rolled back")


def wave_members(rollout: Rollout, devices: Sequence[Seen], wave: int | None = None) -> list[Seen]:
    """Devices that begin in a wave, by default the present one."""
    state = rollout.state
    number = state.wave if wave is None else wave
    if not 0 <= number < len(state.bounds):
        return []
    before = state.bounds[number - 1] if number else {}
    return [
        seen
        for seen in devices
        if takes_part(rollout, state.bounds[number], seen) and not takes_part(rollout, before, seen)
    ]


def count_wave(rollout: Rollout, devices: Sequence[Seen], now: float, wave: int | None = None) -> WaveCount:
    """Count the devices of a wave by their progress, by default of the present one; without the forgiven ones."""
    forgiven = set(rollout.state.forgiven)
    members = [seen for seen in wave_members(rollout, devices, wave) if seen.device not in forgiven]
    counts: Counter[str] = Counter(progress(rollout, seen, now) for seen in members)
    return WaveCount(len(members), counts, sum(is_installed(rollout, seen) for seen in members))


def count_failed(rollout: Rollout, devices: Sequence[Seen], now: float) -> list[str]:
    """Names of the devices of the present wave that failed or went silent."""
    members = wave_members(rollout, devices)
    return [seen.device for seen in members if progress(rollout, seen, now) in _FAILED]


def decide(
    rollout: Rollout,
    devices: Sequence[Seen],
    now: float,
    figures: Mapping[int, Mapping[str, DeviceFigures]] | None = None,
    evidence: Evidence | None = None,
) -> Decision:
    """Decide what comes next.

    Args:
        rollout: The rollout with its present state.
        devices: All devices that the rollout is for.
        now: Seconds since 1970.
        figures: For each index of `due_cohorts`, the figures of its devices by name.
        evidence: What labelled disagreements say; None if nobody looked.

    """
    if rollout.state.status == "aborting":
        return _abort_further(rollout, devices, now)
    if rollout.state.status not in ("running", "waiting"):
        return Decision(rollout.state)
    if rollout.state.wave < 0:
        return _start_wave(rollout, devices, now, "the rollout starts")
    state, steps = look_at(rollout, now, figures or {})
    state = replace(state, evidence=evidence or state.evidence)
    rollout = replace(rollout, state=state)
    for cohort in state.cohorts:
        if found := worse(cohort):
            why = f"worse than the control group in wave {cohort.wave + 1}: {found}"
            return _after(steps, _stop(rollout, rollout.plan.rollout.on_worse, why, devices, now))
    if state.evidence is not None and state.evidence.verdict == "roll back" and not state.worse_accepted:
        why = f"worse than the previous version: {state.evidence}"
        return _after(steps, _stop(rollout, rollout.plan.rollout.on_worse, why, devices, now))
    wave, count = rollout.plan.wave[state.wave], count_wave(rollout, devices, now)
    if problem := _failures(wave, count):
        why = f"wave {state.wave + 1}: {problem}{_reasons(rollout, devices, now)}"
        return _after(steps, _stop(rollout, rollout.plan.rollout.on_error, why, devices, now))
    rollout = replace(rollout, state=_compare(rollout, devices, count, now))
    state, remind = _remind(rollout, devices, now)
    rollout = replace(rollout, state=state)
    if state.status != "waiting":
        decision = _judge_wave(rollout, devices, count, now)
    elif wave.then == "proven" and _is_proven(state):
        decision = next_wave(rollout, devices, now, f"proven: {state.evidence}")
    else:
        decision = Decision(state)
    return Decision(decision.state, (*steps, *decision.steps), remind)


def next_wave(rollout: Rollout, devices: Sequence[Seen], now: float, why: str) -> Decision:
    """Begin the next wave, or finish after the last one."""
    if rollout.state.wave + 1 < len(rollout.plan.wave):
        return _start_wave(rollout, devices, now, why)
    state = replace(rollout.state, status="finished", wants="", reason="")
    what = "finished: all devices may take it, the control group included"
    return Decision(state, (Step(what=what, why=why, at=now),))


def aborting(rollout: Rollout, why: str, now: float, *, roll_back: bool | None = None) -> Decision:
    """Abort: devices go back to the previous version or keep what they have, by `roll_back` or the plan."""
    back = rollout.plan.rollout.abort == "roll_back" if roll_back is None else roll_back
    back = back and bool(rollout.previous)
    what = f"aborted: {f'all devices go back to {rollout.previous_version}' if back else 'devices keep what they have'}"
    state = replace(rollout.state, status="aborting" if back else "aborted", rolled_back=back, wants="", reason=why)
    return Decision(state, (Step(what=what, why=why, at=now),))


def _is_about(rollout: Rollout, seen: Seen) -> bool:
    """Whether the last update of a device is that of the rollout, and not an earlier one to the same version."""
    return seen.update_digest == rollout.digest and seen.rollout in ("", rollout.id)


def _may_retry(retry: RetrySection, seen: Seen) -> bool:
    return seen.attempts < retry.attempts and bool(re.search(retry.reasons, seen.reason[:_MAX_REASON], re.IGNORECASE))


def _start_wave(rollout: Rollout, devices: Sequence[Seen], now: float, why: str) -> Decision:
    """Begin the wave after the present one."""
    state = rollout.state
    number = state.wave + 1
    wave = rollout.plan.wave[number]
    control = state.control if number else control_group(rollout.id, devices, rollout.plan.control.share)
    shares = shares_of(rollout.id, wave, devices, control, state.shares)
    state = replace(
        state,
        status="running",
        wave=number,
        since=now,
        timer=now,
        reached=0.0,
        bounds=(*state.bounds, shares),
        control=control,
        wants="",
        reason="",
    )
    members = wave_members(replace(rollout, state=state), devices)
    group = "" if wave.group == ALL_GROUPS else f" of group {wave.group}"
    what = f"wave {number + 1} of {len(rollout.plan.wave)}: {100 * wave.share:.6g} % of the devices{group}"
    step = Step(what=f"{what}, {len(members)} begin, {len(control)} control", why=why, at=now)
    return Decision(state, (step,))


def _compare(rollout: Rollout, devices: Sequence[Seen], count: WaveCount, now: float) -> RolloutState:
    """Fix who is compared in the present wave, once it is good, or takes long and enough of it is through."""
    state, quality = rollout.state, rollout.plan.quality
    if not (quality.enabled and state.control and count.members) or cohort_of(state) is not None:
        return state
    good = _is_good(rollout.plan.wave[state.wave], count)
    done = [s for s in wave_members(rollout, devices) if progress(rollout, s, now) == "done"]
    if not good and not (done and now - state.since >= 2 * quality.look_s):
        return state
    return fix_cohort(rollout, done, devices, now, good=good)


def _judge_wave(rollout: Rollout, devices: Sequence[Seen], count: WaveCount, now: float) -> Decision:
    """Whether a wave without too many failures is good, and for long enough."""
    state, wave = rollout.state, rollout.plan.wave[rollout.state.wave]
    if not _is_good(wave, count):
        if now - state.timer > wave.timeout_s:
            return _pause(state, f"wave {state.wave + 1} is not good after {wave.timeout_s:.0f} s ({count})", now)
        return Decision(replace(state, reached=0.0))
    steps = []
    if not state.reached:
        steps.append(Step(what=f"wave {state.wave + 1} is good", why=str(count), at=now))
        state = replace(state, reached=now)
    cohort = cohort_of(state)
    looked = cohort is None or cohort.accepted or bool(cohort.short) or cohort.looks > 0
    if count.members and (now - state.reached < wave.wait_s or not looked):
        return Decision(state, tuple(steps))
    found = verdict(cohort)
    if cohort is not None and cohort.short and rollout.plan.quality.undecided == "ask":
        return _after(steps, _wait(state, "approve", found, now))
    if wave.then == "proven":
        if _is_proven(state):
            return _after(steps, next_wave(replace(rollout, state=state), devices, now, f"proven: {state.evidence}"))
        return _after(steps, _wait(state, "approve", f"not proven to be better: {state.evidence or Evidence()}", now))
    if wave.then != "next":
        return _after(steps, _wait(state, "approve" if wave.then == "ask" else "resume", found, now))
    return _after(steps, next_wave(replace(rollout, state=state), devices, now, f"{count}; {found}"))


def _is_proven(state: RolloutState) -> bool:
    return state.evidence is not None and state.evidence.verdict == "promote"


def _failures(wave: Wave, count: WaveCount) -> str:
    """Why the failures of a wave are too many, for people; empty if they are not."""
    judged = count.through >= min(wave.min_count, count.judged) and count.failed > wave.error * count.through
    if judged or count.failed > wave.error * count.members:
        return f"{count.failed} of {count.through} failed, more than {wave.error:.3g} of them"
    return ""


def _is_good(wave: Wave, count: WaveCount) -> bool:
    if not count.members:
        return True
    done = count.counts.get("done", 0)
    return done >= max(1, min(wave.min_count, count.judged), wave.success * count.judged)


def _reasons(rollout: Rollout, devices: Sequence[Seen], now: float) -> str:
    """Why devices of the wave failed, the most frequent reasons first."""
    found = Counter(
        seen.reason or seen.update
        for seen in wave_members(rollout, devices)
        if progress(rollout, seen, now) == "failed"
    )
    shown = "; ".join(f"{reason[:120]} ({number})" for reason, number in found.most_common(3))
    return f": {shown}" if shown else ""


def _remind(rollout: Rollout, devices: Sequence[Seen], now: float) -> tuple[RolloutState, frozenset[tuple[str, str]]]:
    """Remind devices that may try again, at growing intervals."""
    retry, reminders, due = rollout.plan.retry, {}, set()
    for seen in devices:
        if not takes_part(rollout, rollout.state.shares, seen) or progress(rollout, seen, now) != "retrying":
            continue
        reminder = rollout.state.reminders.get(seen.device) or Reminder(at=now + retry.wait_s)
        if now >= reminder.at:
            wait_s = retry.wait_s * retry.factor ** min(reminder.count + 1, 20)
            reminder = Reminder(at=now + wait_s, count=reminder.count + 1)
            due.add((seen.site, seen.group))
        reminders[seen.device] = reminder
    return replace(rollout.state, reminders=reminders), frozenset(due)


def _wait(state: RolloutState, wants: Literal["resume", "approve"], why: str, now: float) -> Decision:
    state = replace(state, status="waiting", wants=wants, reason=f"wave {state.wave + 1} is good; {why}")
    return Decision(state, (Step(what=f"waits for `eyas rollout {wants}`", why=state.reason, at=now),))


def _pause(state: RolloutState, why: str, now: float) -> Decision:
    state = replace(state, status="paused", wants="resume", reason=why)
    return Decision(state, (Step(what="paused", why=why, at=now),))


def _stop(rollout: Rollout, how: str, why: str, devices: Sequence[Seen], now: float) -> Decision:
    """Stop because of what the devices report."""
    wave, count = rollout.plan.wave[rollout.state.wave], count_wave(rollout, devices, now)
    judged = max(1, count.judged)
    goes_on = "would have gone on" if count.installed >= wave.success * judged else "would not have gone on either"
    gate = f'"install succeeded" as the only gate: {count.installed} of {judged}, it {goes_on}'
    rollout = replace(rollout, state=replace(rollout.state, only_installed=gate))
    return _pause(rollout.state, why, now) if how == "pause" else aborting(rollout, why, now)


def _after(steps: Sequence[Step], decision: Decision) -> Decision:
    return Decision(decision.state, (*steps, *decision.steps), decision.remind)


def _abort_further(rollout: Rollout, devices: Sequence[Seen], now: float) -> Decision:
    """After an abort: wait until no connected device has the new version."""
    left = [
        s
        for s in devices
        if s.digest == rollout.digest or (s.update_digest == rollout.digest and s.update in UNDER_WAY)
    ]
    if any(seen.connected for seen in left):
        return Decision(rollout.state)
    gone = f"; {len(left)} are not connected and go back when they return" if left else ""
    step = Step(what="all connected devices are back", why=f"{rollout.previous_version} runs again{gone}", at=now)
    return Decision(replace(rollout.state, status="aborted"), (step,))
