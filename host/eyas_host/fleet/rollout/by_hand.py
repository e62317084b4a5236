"""What people decide in a rollout: pause, resume, approve, abort."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from eyas_host.fleet.rollout.engine import Decision, aborting, count_failed, next_wave
from eyas_host.fleet.rollout.plan import RolloutError
from eyas_host.fleet.rollout.state import Rollout, Seen, Step


def pause(rollout: Rollout, why: str, now: float) -> Decision:
    """Pause: no device begins. Raises `RolloutError` where that is not possible."""
    if rollout.state.status not in ("running", "waiting"):
        raise RolloutError(f"{rollout.id} is {rollout.state.status}: only a rollout that goes on can be paused")
    state = replace(rollout.state, status="paused", wants="resume", reason=why or "paused by hand")
    return Decision(state, (Step(what="paused", why=why, at=now),))


def resume(rollout: Rollout, devices: Sequence[Seen], why: str, now: float) -> Decision:
    """Go on after a pause, within the wave or with the next one.

    Failures and figures that were seen so far do not stop it again.

    Raises:
        RolloutError: It is not paused, or it waits for an approval.

    """
    state = rollout.state
    if state.wants == "approve":
        raise RolloutError(f"{rollout.id} waits for an approval: `eyas rollout approve {rollout.id}`")
    if state.status == "waiting":
        return next_wave(rollout, devices, now, why or "resumed by hand")
    if state.status != "paused":
        raise RolloutError(f"{rollout.id} is {state.status}: only a paused rollout can be resumed")
    forgiven = {*state.forgiven, *count_failed(rollout, devices, now)}
    cohorts = tuple(
        replace(cohort, accepted=cohort.accepted or any(figure.worse for figure in cohort.figures))
        for cohort in state.cohorts
    )
    again = replace(
        state,
        status="running",
        wants="",
        reason="",
        timer=now,
        reached=0.0,
        only_installed="",
        forgiven=tuple(sorted(forgiven)),
        cohorts=cohorts,
        worse_accepted=state.worse_accepted or (state.evidence is not None and state.evidence.verdict == "roll back"),
    )
    return Decision(again, (Step(what="resumed", why=why, at=now),))


def approve(rollout: Rollout, devices: Sequence[Seen], why: str, now: float) -> Decision:
    """Approve the next wave. Raises `RolloutError` unless the rollout waits for that."""
    if rollout.state.status != "waiting" or rollout.state.wants != "approve":
        raise RolloutError(f"{rollout.id} is {rollout.state.status} and waits for no approval")
    return next_wave(rollout, devices, now, f"approved{': ' if why else ''}{why}")


def abort(rollout: Rollout, why: str, now: float, *, roll_back: bool | None = None) -> Decision:
    """Abort; `roll_back` overrides the plan. Raises `RolloutError` for a rollout that has ended."""
    if rollout.state.status in ("aborting", "aborted", "finished"):
        raise RolloutError(f"{rollout.id} is {rollout.state.status}: there is nothing to abort")
    if roll_back and not rollout.previous:
        raise RolloutError(f"{rollout.id}: no previous release is known to go back to; abort it with --finish")
    return aborting(rollout, why or "aborted by hand", now, roll_back=roll_back)
