"""The plan of a rollout: a TOML file, or the options of `eyas rollout start`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.hours import parse_hours
from eyas_device.support.names import check_name
from eyas_device.support.toml import Section, convert, error_report, parse
from eyas_device.updates.release import ALL_GROUPS

_MAX_BYTES = 1 << 20
_WAVE = re.compile(r"(?:(?P<group>[^\s=]+)=)?(?P<share>\d+(?:\.\d+)?)\s*%")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
SomeShare = Annotated[float, msgspec.Meta(gt=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=90 * 86_400)]
Stop = Literal["abort", "pause"]
Abort = Literal["roll_back", "finish"]


class RolloutError(EyasError, ValueError):
    """A rollout cannot be started or changed as it was asked for; nothing was changed."""


class RolloutSection(Section, frozen=True):
    """What stops a rollout, and what becomes of the devices then."""

    on_error: Stop = "abort"
    """When a wave has more failures than its `error` allows: `abort`, or `pause` and wait for people."""
    on_worse: Stop = "abort"
    """When a figure of `[quality]` is worse than in the control group: `abort` or `pause`."""
    abort: Abort = "roll_back"
    """After an abort, devices that have the new version go back (`roll_back`), or keep it (`finish`); in both cases no
    device begins."""
    silent_s: Annotated[float, msgspec.Meta(ge=1)] = 1800.0
    """A device that began and that the broker has lost for this long counts as failed."""
    hours: str = ""
    """Maintenance hours in each device's time zone, e.g. `22:00-05:00`; empty: always."""


class Wave(Section, frozen=True):
    """One wave: which devices take the new version, when the wave is good, and what comes then."""

    share: SomeShare = 1.0
    """Share of the devices, those of earlier waves included; at least one device."""
    group: str = ALL_GROUPS
    """Group of devices that the share is of; `*`: of all."""
    success: SomeShare = 0.95
    """Share of the wave's connected devices that must have committed the new version."""
    error: Share = 0.05
    """Share of the devices that are through, beyond which failures stop the rollout; 0: the first one."""
    min_count: Annotated[int, msgspec.Meta(ge=1)] = 5
    """Devices that must be through before a share is judged; where fewer are connected, all of these. Failures beyond
    `error` of the whole wave stop at once."""
    then: Literal["next", "pause", "ask", "proven"] = "next"
    """After a good wave: the next one; `pause` until `eyas rollout resume`; `ask` for `eyas rollout approve`; `proven`:
    the next one when labelled disagreements prove that the new version is better (`[proof]`), or somebody approves."""
    wait_s: Seconds = 3600.0
    """How long a good wave is watched before the next one, seconds."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=90 * 86_400)] = 86_400.0
    """A wave that is not good after this long pauses the rollout, seconds."""


class RetrySection(Section, frozen=True):
    """Which failures are no verdict yet: the device tries again, and is reminded with growing intervals."""

    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    """Attempts after which a failure counts; 1: each failure counts."""
    wait_s: Annotated[float, msgspec.Meta(ge=1)] = 300.0
    """Time before the first reminder, seconds."""
    factor: Annotated[float, msgspec.Meta(ge=1, le=10)] = 2.0
    """Each further interval is this many times longer."""
    reasons: str = "."
    """Regular expression, in any case of letters, of the reasons for which a device may try again, e.g.
    `timed out|no space`. A version that a device refused or rolled back is not tried again."""


class ControlSection(Section, frozen=True):
    """The control group: devices that install the old version again and keep it until the last wave is good."""

    share: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.1
    """Share of each group with two devices and more, rounded up; 0: no control group, quality is not judged."""


class QualitySection(Section, frozen=True):
    """By how much a figure may be worse than in the control group, as a change from before on each device."""

    enabled: bool = True
    """Whether figures are compared at all."""
    alpha: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.05
    """Probability that a version that is no worse is stopped, over the whole rollout and all figures."""
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """Loss of mean confidence that is tolerated."""
    ood: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    """Gain of the share of windows that are out of distribution."""
    errors: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.001
    """Gain of the share of predictions that are not finite."""
    latency: Annotated[float, msgspec.Meta(ge=1)] = 1.25
    """Median latency, as a multiple."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 5.0
    """Gain of the processor's mean temperature, degrees Celsius; not compared without a sensor."""
    baseline_s: Annotated[float, msgspec.Meta(gt=0)] = 21_600.0
    """Time before the wave that a device is compared with, seconds."""
    look_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """Time from a wave's installation to the first look at its figures, seconds; later looks are rarer."""
    min_frames: Annotated[int, msgspec.Meta(ge=1)] = 100
    """Predictions that a device needs before and after."""
    undecided: Literal["next", "ask"] = "next"
    """When there are too few devices to judge: go on as `then` says, or `ask`."""


class ProofSection(Section, frozen=True):
    """What labelled disagreements on probation have to say before a wave with `then = "proven"` goes on."""

    alpha: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.05
    """Probability that a version that is no better is ever promoted, however often one looks; and that one that is no
    worse is ever stopped as worse (`on_worse`)."""
    spacing_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Disagreements of one device within this time count as one: they show one scene, seconds."""
    people: Annotated[int, msgspec.Meta(ge=1, le=10)] = 1
    """Persons that have to give the same label."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides how a rollout goes."""

    rollout: RolloutSection = RolloutSection()
    wave: tuple[Wave, ...] = ()
    retry: RetrySection = RetrySection()
    control: ControlSection = ControlSection()
    quality: QualitySection = QualitySection()
    proof: ProofSection = ProofSection()

    @property
    def wants_proof(self) -> bool:
        """Whether a wave waits for a proof that the new version is better."""
        return any(wave.then == "proven" for wave in self.wave)


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises `RolloutError` with all errors of the file."""
    try:
        if not path.is_file():
            raise RolloutError(f"{path}: no such file; a plan is a TOML file with [[wave]] tables")
        if path.stat().st_size > _MAX_BYTES:
            raise RolloutError(f"{path}: larger than {_MAX_BYTES} bytes; a plan is a small TOML file")
        tree = parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RolloutError(f"{path}: {reason}; a plan is a TOML file") from None
    except ValueError as error:
        raise error if isinstance(error, RolloutError) else RolloutError(f"{path}: {error}") from None
    sections, errors = convert(tree, Plan)
    plan = Plan(**sections)
    errors += _problems(plan)
    if errors:
        raise RolloutError(error_report(path, errors))
    return plan


def plan_of_waves(text: str, base: Plan | None = None, **settings: float) -> Plan:
    """The plan of `--waves`: shares with commas, e.g. `1%,10%,100%`, or `canary=100%,10%,100%`.

    Args:
        text: The waves.
        base: Everything else; the defaults without one.
        settings: Keys that all waves get, e.g. `wait_s`.

    Raises:
        RolloutError: A wave cannot be read, or is not larger than the one before.

    """
    waves = []
    for piece in text.split(","):
        match = _WAVE.fullmatch(piece.strip())
        if match is None:
            raise RolloutError(f"--waves {text}: {piece.strip()!r}; shares are needed, e.g. 1%,10%,100% or canary=100%")
        share = float(match["share"]) / 100
        tree = {"share": share, "group": match["group"] or ALL_GROUPS, **settings}
        try:
            waves.append(msgspec.convert(tree, Wave))
        except msgspec.ValidationError as error:
            raise RolloutError(f"--waves {text}: {piece.strip()!r}: {error}") from None
    plan = msgspec.structs.replace(base or Plan(), wave=tuple(waves))
    if errors := list(_problems(plan)):
        raise RolloutError(f"--waves {text}: {errors[0]}")
    return plan


def _problems(plan: Plan) -> Iterable[str]:
    """Errors of values that the types allow."""
    if not plan.wave:
        yield "[[wave]]: missing; one wave for all devices is `[[wave]]` with `share = 1.0`"
    elif not _covers(plan.wave):
        yield "[[wave]]: the last one must be for all devices: share = 1.0 without a group"
    largest: dict[str, float] = {}
    for number, wave in enumerate(plan.wave, 1):
        if wave.group != ALL_GROUPS:
            try:
                check_name(wave.group)
            except ValueError as error:
                yield f"[wave {number}] group {error}"
        before = max(largest.get(wave.group, 0.0), largest.get(ALL_GROUPS, 0.0))
        if wave.share <= before:
            yield f"[wave {number}] share = {wave.share:g}: not above {before:g} of an earlier wave, which it includes"
        largest[wave.group] = wave.share
    try:
        parse_hours(plan.rollout.hours)
    except ValueError as error:
        yield f"[rollout] hours: {error}"
    try:
        re.compile(plan.retry.reasons)
    except re.error as error:
        yield f"[retry] reasons = {plan.retry.reasons!r}: not a regular expression ({error})"


def _covers(waves: Sequence[Wave]) -> bool:
    return waves[-1].group == ALL_GROUPS and waves[-1].share == 1
