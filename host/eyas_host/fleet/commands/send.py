"""Send a command to devices and collect their answers.

Nothing is left behind: a device that is not connected is sent nothing, and a command expires with the time that its
answer is waited for, by the device's clock and at the broker, so that none is executed hours later.
"""

from __future__ import annotations

import difflib
import getpass
import os
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import check_name, host_name
from eyas_device.telemetry.arguments import LONG_S, TAKES, Arguments, read_arguments
from eyas_device.telemetry.messages import Command, Event, Result, Status
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.commands.link import CommandLink, Device, Refused
from eyas_host.fleet.status import is_connected, since

State = Literal["executed", "refused", "offline", "no answer"]

ANSWER_S = 15.0
"""Time to wait for the answer to a quick command."""
MAX_TIMEOUT_S = 3600.0
_SNAPSHOT_S = 30.0
_TICK_S = 0.25
_PROGRESS_S = (2.0, 10.0)
"""When it is first said who has not answered, and how often."""
_SKEW_S = 2.0
_MAX_ISSUER = 64


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command to one device."""

    site: str
    device: str
    command: str
    state: State
    detail: str = ""
    """Why it was not executed; what devices write is not cleaned."""
    data: Mapping[str, Any] = {}
    """Data of the device's result."""
    seconds: float = 0.0
    """Time until the answer."""
    event: Event | None = None
    """Event of a snapshot."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A command and whom it is for."""

    command: str
    arguments: Arguments = {}
    devices: tuple[str, ...] = ()
    """Names; empty: all, or all of `site`."""
    site: str | None = None
    timeout_s: float | None = None
    """Time to wait for answers, after which the command has expired; None: as the command needs."""

    @property
    def wait_s(self) -> float:
        """Time to wait for answers."""
        own = _SNAPSHOT_S if self.command == "snapshot" else LONG_S.get(self.command, ANSWER_S)
        return own if self.timeout_s is None else self.timeout_s


def check(request: Request) -> None:
    """Check a request without any network, as the devices will.

    Raises `CommandRefused` for arguments that no device accepts, `LinkError` for an unknown command or impossible name.
    """
    if request.command not in TAKES:
        raise LinkError(f"{request.command!r} is no command; there are: {', '.join(TAKES)}")
    read_arguments(request.command, request.arguments)
    for kind, names in (("device", request.devices), ("--site", (request.site,) if request.site is not None else ())):
        for name in names:
            try:
                check_name(name)
            except ValueError as error:
                raise LinkError(f"{kind} {error}") from None


def send(
    access: BrokerAccess, request: Request, on_progress: Callable[[str], None] = lambda text: None
) -> Iterator[Outcome]:
    """Send a command and yield what became of it, device by device as they answer.

    `on_progress` receives a line now and then: who has not answered yet.

    Raises what `check` raises, `LinkError` for devices that the broker does not know (then nothing was sent), and
    `BrokerUnreachable`.
    """
    check(request)
    with CommandLink(access) as link:
        chosen = choose(link.statuses, request.devices, request.site)
        present = [device for device, status in chosen.items() if is_connected(status)]
        for device, status in chosen.items():
            if device not in present:
                yield _outcome(request, device, state="offline", detail=f"{since(status)}; nothing was sent")
        snapshot = request.command == "snapshot"
        link.listen(present, ("cmd/result", "event") if snapshot else ("cmd/result",))
        waiting = _Waiting(link, request, present, on_progress)
        try:
            yield from waiting.outcomes()
        except KeyboardInterrupt as error:
            error.add_note(f"{waiting}; they may still execute {request.command}")
            raise


class _Waiting:
    """Commands whose answers have not come yet."""

    def __init__(
        self, link: CommandLink, request: Request, devices: Sequence[Device], on_progress: Callable[[str], None]
    ) -> None:
        self._link, self._request, self._on_progress = link, request, on_progress
        self._total = len(devices)
        self._started = time.monotonic()
        self._ids: dict[Device, str] = {}
        self._results: dict[Device, Result] = {}
        """Of snapshots whose event has not come yet."""
        self._events: dict[Device, Event] = {}
        """Of snapshots whose result has not come yet."""
        for device in devices:
            command = Command(
                id=str(uuid.uuid4()),
                name=request.command,
                arguments=dict(request.arguments),
                expires=time.time() + request.wait_s,
                issuer=issuer(),
            )
            self._ids[device] = command.id
            link.publish(device, command, expires_s=request.wait_s, events=request.command == "snapshot")

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcome of each command; those without an answer in time come last."""
        end = self._started + self._request.wait_s
        progress = self._started + _PROGRESS_S[0]
        while self._ids and (left := end - time.monotonic()) > 0:
            try:
                device, answer = self._link.answers.get(timeout=min(left, _TICK_S))
            except queue.Empty:
                if time.monotonic() >= progress:
                    progress = time.monotonic() + _PROGRESS_S[1]
                    self._on_progress(f"{self}; {left:.0f} s left")
                continue
            outcome = self._take(device, answer)
            if outcome is not None:
                del self._ids[device]
                yield outcome
        for device in self._ids:
            yield self._late(device)

    def _take(self, device: Device, answer: Result | Event | Refused) -> Outcome | None:
        """What an answer settles; None while something is missing."""
        if device not in self._ids:
            return None
        if isinstance(answer, Refused):
            return self._outcome(device, state="no answer", detail=f"the broker did not pass it on: {answer.reason}")
        if isinstance(answer, Event):
            self._events[device] = answer
        elif not answer.ok:
            return self._outcome(device, state="refused", detail=f"{answer.detail}{_skew(answer)}")
        else:
            self._results[device] = answer
        result, event = self._results.get(device), self._events.get(device)
        if result is None or (event is None and self._request.command == "snapshot"):
            return None
        return self._outcome(device, state="executed", detail=result.detail, data=result.data, event=event)

    def _late(self, device: Device) -> Outcome:
        """A command whose answer did not come in time."""
        wait_s, status = self._request.wait_s, self._link.statuses.get(device, Status())
        if device in self._results:
            detail = (
                f"it began, but no event came within {wait_s:g} s: the camera delivers no frame, or the event waits on "
                "the device because no collector runs"
            )
        elif not is_connected(status):
            detail = f"it went offline meanwhile: {since(status)}; the command has expired"
        else:
            detail = f"nothing came within {wait_s:g} s; the command has expired and is not started any more"
        return self._outcome(device, state="no answer", detail=detail)

    def _outcome(self, device: Device, **fields: Any) -> Outcome:
        return _outcome(self._request, device, seconds=round(time.monotonic() - self._started, 2), **fields)

    def __str__(self) -> str:
        names = [f"{site}/{name}" for site, name in self._ids]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"waiting for {len(names)} of {self._total}: {shown}"


def choose(statuses: Mapping[Device, Status], names: Sequence[str], site: str | None) -> dict[Device, Status]:
    """Choose the devices of a request among those that the broker has statuses of.

    A device that moved from one site to another may have two: the one that is connected counts.

    Raises `LinkError` for a name or site that is not there, and for a name of two connected devices.
    """
    if not statuses:
        raise LinkError("the broker knows no device: none has connected yet")
    if site is not None and not any(where == site for where, _ in statuses):
        raise LinkError(f"no device of the site {site!r}; {_known(site, sorted({where for where, _ in statuses}))}")
    here = {device: status for device, status in statuses.items() if site in (None, device[0])}
    if not names:
        return dict(sorted(here.items()))
    chosen: dict[Device, Status] = {}
    problems = []
    for name in dict.fromkeys(names):
        found = {device: status for device, status in here.items() if device[1] == name}
        connected = [device for device, status in found.items() if is_connected(status)]
        if not found:
            where = f" at the site {site!r}" if site is not None else ""
            problems.append(f"device {name!r} is unknown{where}; {_known(name, sorted({n for _, n in here}))}")
        elif len(connected) > 1:
            sites = ", ".join(sorted(where for where, _ in connected))
            problems.append(f"device {name!r} is connected at several sites; choose one with --site: {sites}")
        else:
            newest = max(found, key=lambda device: found[device].time)
            device = connected[0] if connected else newest
            chosen[device] = found[device]
    if problems:
        raise LinkError("\n".join([*problems, "nothing was sent"]))
    return chosen


def issuer() -> str:
    """Who sends a command, for the device's log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{host_name()}"[:_MAX_ISSUER]


def _known(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are: {', '.join(names[:8])}{more}"


def _skew(result: Result) -> str:
    """How far the device's clock is from this one, where that may be why it refused."""
    ahead = result.time - time.time()
    if abs(ahead) < _SKEW_S or "expire" not in result.detail:
        return ""
    where = "ahead of" if ahead > 0 else "behind"
    return f": its clock is {abs(ahead):.0f} s {where} this machine's; set it, or give more --timeout"


def _outcome(request: Request, device: Device, *, state: State, **fields: Any) -> Outcome:
    return Outcome(site=device[0], device=device[1], command=request.command, state=state, **fields)
