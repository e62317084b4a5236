"""Handlers of the host's commands."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from eyas_device.agent.loop import Loop
from eyas_device.agent.reporter import Reporter
from eyas_device.config import Config
from eyas_device.predict import Classifier
from eyas_device.support.processes import module_command
from eyas_device.telemetry.messages import Profile
from eyas_device.telemetry.remote import Arguments, CommandRefused, Handler

_BENCH_S = 5
_BENCH_TIMEOUT_S = 180


def handlers(config: Config, loop: Loop, reporter: Reporter) -> Mapping[str, Handler]:
    """Return the handler of each command; `telemetry.commands` decides which of them are called."""
    return {
        "pause": lambda _: _change(loop.pause, reporter),
        "resume": lambda _: _change(loop.resume, reporter),
        "set-thresholds": lambda arguments: _set_thresholds(loop, arguments),
        "snapshot": lambda _: _snapshot(reporter),
        "bench": lambda _: _bench(loop, reporter),
        "doctor": lambda _: _doctor(config),
        "check-update": lambda _: _check_update(),
    }


def _change(change: Callable[[], None], reporter: Reporter) -> dict[str, Any]:
    change()
    reporter.report_status()
    return {}


def _running(loop: Loop) -> Classifier:
    if loop.classifier is None:
        raise CommandRefused("no model runs; `eyas-device slots` on the device says why")
    return loop.classifier


def _set_thresholds(loop: Loop, arguments: Arguments) -> dict[str, Any]:
    """Set `threshold`, 0..1: predictions below it are uncertain, until the next model swap or restart of the agent."""
    threshold = arguments.get("threshold")
    if set(arguments) != {"threshold"} or isinstance(threshold, bool | str) or threshold is None:
        raise CommandRefused("set-thresholds takes one argument: threshold, a number from 0 to 1")
    if not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise CommandRefused(f"threshold {threshold}: 0 to 1 is allowed")
    classifier = _running(loop)
    before, classifier.threshold = classifier.threshold, float(threshold)
    return {"before": before, "threshold": float(threshold)}


def _snapshot(reporter: Reporter) -> dict[str, Any]:
    """Report the next prediction as an event, with its image if the privacy rules allow that."""
    reporter.request_event()
    return {}


def _bench(loop: Loop, reporter: Reporter) -> dict[str, Any]:
    """Run a short benchmark in a process of its own beside the loop, and report it as a profile."""
    classifier = _running(loop)
    words = ["bench", "--bundle", str(classifier.bundle.root), "--runtime", classifier.runtime.name]
    words += ["--seconds", str(_BENCH_S), "--json", "-"]
    try:
        done = subprocess.run(
            module_command("eyas_device.cli", *words),
            capture_output=True,
            text=True,
            timeout=_BENCH_TIMEOUT_S,
            check=False,
        )
        measured = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise CommandRefused(
            f"the benchmark failed ({type(error).__name__}); run `eyas-device bench` on the device to see why"
        ) from None
    reporter.report_profile(
        Profile(**{name: measured[name] for name in ("board", "os", "versions", "pressure", "results")})
    )
    return {"results": len(measured["results"])}


def _doctor(config: Config) -> dict[str, Any]:
    """Run all checks but those of the camera, which the loop holds, and of the broker, which delivered the command."""
    from eyas_device.doctor import CHECKS, Context, examine, probes

    busy = (probes.camera, probes.view, probes.broker)
    rows = examine(Context(config=config), [check for check in CHECKS if check not in busy])
    return {"checks": [{"check": r.check, "status": r.status, "finding": r.finding, "fix": r.fix} for r in rows]}


def _check_update() -> dict[str, Any]:
    raise CommandRefused("this agent has no updater yet; `eyas flash` installs a bundle")
