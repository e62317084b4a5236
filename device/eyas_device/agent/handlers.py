"""What a device does when the host tells it to: the handlers of the commands that `telemetry.commands` allows."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eyas_device.agent.loop import Loop
from eyas_device.config import Config
from eyas_device.errors import EyasError
from eyas_device.support.processes import module_command
from eyas_device.telemetry.messages import Profile
from eyas_device.telemetry.remote import Arguments, Handler

if TYPE_CHECKING:
    from eyas_device.agent.reporter import Reporter

_BENCH_S = 5
_BENCH_MOST_S = 180


class Refused(EyasError):  # noqa: N818 - reads as the answer it is
    """A command cannot be obeyed here; the message says why."""


def handlers(config: Config, loop: Loop, link: Callable[[], Reporter]) -> Mapping[str, Handler]:
    """Command -> what it does. `link` gives the link, which exists only after its handlers."""
    return {
        "pause": lambda _: _told(loop.pause, link),
        "resume": lambda _: _told(loop.resume, link),
        "set-thresholds": lambda arguments: _set_thresholds(loop, arguments),
        "snapshot": lambda _: _snapshot(link),
        "bench": lambda _: _bench(loop, link),
        "doctor": lambda _: _doctor(config),
        "check-update": lambda _: _check_update(),
    }


def _told(change: Callable[[], None], link: Callable[[], Reporter]) -> dict[str, Any]:
    change()
    link().tell_status()
    return {}


def _set_thresholds(loop: Loop, arguments: Arguments) -> dict[str, Any]:
    """`threshold`, 0..1: below it an answer is uncertain, until the model is exchanged or the agent starts again."""
    wanted = arguments.get("threshold")
    if set(arguments) != {"threshold"} or isinstance(wanted, bool | str) or wanted is None:
        raise Refused("set-thresholds takes one argument: threshold, a number from 0 to 1")
    if not (math.isfinite(wanted) and 0 <= wanted <= 1):
        raise Refused(f"threshold {wanted}: 0 to 1 is allowed")
    before, loop.classifier.threshold = loop.classifier.threshold, float(wanted)
    return {"before": before, "threshold": float(wanted)}


def _snapshot(link: Callable[[], Reporter]) -> dict[str, Any]:
    """The next answer becomes an event, with its image if the privacy rules allow that."""
    link().ask_event()
    return {}


def _bench(loop: Loop, link: Callable[[], Reporter]) -> dict[str, Any]:
    """A short measurement in a process of its own, beside the running loop; the figures go out as a profile."""
    words = ["bench", "--bundle", str(loop.classifier.bundle.root), "--runtime", loop.classifier.runtime.name]
    words += ["--seconds", str(_BENCH_S), "--json", "-"]
    try:
        done = subprocess.run(
            module_command("eyas_device.cli", *words),
            capture_output=True,
            text=True,
            timeout=_BENCH_MOST_S,
            check=False,
        )
        measured = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise Refused(f"the measurement failed ({type(error).__name__}); `eyas-device bench` there says more") from None
    link().tell_profile(
        Profile(**{name: measured[name] for name in ("board", "os", "versions", "pressure", "results")})
    )
    return {"results": len(measured["results"])}


def _doctor(config: Config) -> dict[str, Any]:
    """All checks but those that need the camera, which the loop holds, and the broker, which was just heard."""
    from eyas_device.doctor import CHECKS, Context, examine, probes

    busy = (probes.camera, probes.view, probes.broker)
    rows = examine(Context(config=config), [check for check in CHECKS if check not in busy])
    return {"checks": [{"check": r.check, "status": r.status, "finding": r.finding, "fix": r.fix} for r in rows]}


def _check_update() -> dict[str, Any]:
    raise Refused("this agent has no updater yet; `eyas flash` brings a bundle")
