"""After a flash: whether the camera delivers and the broker is connected, with the device's own configuration.

Neither undoes a flash: a hall may be dark and a broker down while a bundle is brought.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from eyas_device.telemetry.local import AgentStatus
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_host.fleet.connect.ssh import CommandResult

_WAIT_S = 20.0
"""How long a service that has just started may take to open its camera and to connect."""
_POLL_S = 1.0
_DOCTOR_S = 180.0
_CHECKS = ("camera", "broker")

Agent = Callable[..., CommandResult]
"""Runs `eyas-device` on the device with arguments, as the service's user."""


class Report(msgspec.Struct, frozen=True):
    """What was seen."""

    works: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class _Finding(msgspec.Struct, frozen=True):
    check: str
    status: str
    finding: str
    fix: str = ""


class _Doctor(msgspec.Struct, frozen=True):
    findings: tuple[_Finding, ...] = ()


def service_report(agent: Agent, state: str, hint: str) -> Report:
    """Ask the service's agent until its camera delivers and its broker is connected.

    `hint` says how to find out more.
    """
    deadline = time.monotonic() + _WAIT_S
    while True:
        result = agent("status", "--state", state, "--json")
        try:
            status = msgspec.json.decode(result.out, type=AgentStatus)
        except msgspec.DecodeError:
            return Report(warnings=(f"camera and broker are not known: {result.last_line}; {hint}",))
        works, troubles = judge_status(status)
        if not troubles or time.monotonic() > deadline:
            return Report(works, tuple(f"{trouble}; {hint}" for trouble in troubles))
        time.sleep(_POLL_S)


def judge_status(status: AgentStatus) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What works, and what does not."""
    camera, link = status.camera, status.link
    works, troubles = [], []
    if camera.state not in ("", "delivering"):
        reason = f": {camera.reason}" if camera.reason else ""
        troubles.append(f"camera {camera.source} does not deliver ({camera.state}{reason})")
    elif camera.state:
        works.append(f"camera {camera.source} delivers")
    if link is not None and link.state.startswith(LinkState.NO_COLLECTOR.value):
        works.append(f"broker {link.broker} is connected; messages wait on the device for `eyas collect`")
    elif link is not None and link.state != LinkState.CONNECTED.value:
        troubles.append(f"broker {link.broker}: {link.state}")
    elif link is not None:
        works.append(f"broker {link.broker} is connected")
    return tuple(works), tuple(troubles)


def doctor_report(agent: Agent, config: str) -> Report:
    """Let the doctor try camera and broker of a configuration, where no service runs."""
    result = agent("doctor", "--config", config, "--json", timeout_s=_DOCTOR_S)
    try:
        found = msgspec.json.decode(result.out, type=_Doctor).findings
    except msgspec.DecodeError:
        return Report(warnings=(f"camera and broker were not tried: {result.last_line}",))
    return Report(
        tuple(f"{one.check}: {one.finding}" for one in found if one.check in _CHECKS and one.status == "green"),
        tuple(_warnings(found)),
    )


def _warnings(found: tuple[_Finding, ...]) -> Iterator[str]:
    for one in found:
        if one.check in _CHECKS and one.status in ("yellow", "red"):
            yield f"{one.check}: {one.finding}" + (f" -> {one.fix}" if one.fix else "")
