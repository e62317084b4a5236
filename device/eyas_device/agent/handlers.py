"""Handlers of the host's commands."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from typing import Any

from eyas_device.agent.loop import Loop
from eyas_device.agent.overrides import Overrides
from eyas_device.agent.reporter import Reporter
from eyas_device.config import Config
from eyas_device.predict import Classifier
from eyas_device.support.processes import module_command, run_group
from eyas_device.telemetry.messages import Profile
from eyas_device.telemetry.remote import Arguments, CommandRefused, Handler

PAUSE_S, MAX_PAUSE_S = 3600.0, 86_400.0
"""Duration of a pause: by default, and at most."""
THRESHOLD_S, MAX_THRESHOLD_S = 86_400.0, 7 * 86_400.0
"""Duration of a changed threshold: by default, and at most."""
_BENCH_S = 5
_BENCH_TIMEOUT_S = 180.0
_UNITS = {"seconds": 1.0, "minutes": 60.0}


def handlers(
    config: Config, loop: Loop, reporter: Reporter, overrides: Overrides, *, bench_timeout_s: float = _BENCH_TIMEOUT_S
) -> Mapping[str, Handler]:
    """Return the handler of each command; `telemetry.commands` decides which of them are called."""
    return {
        "pause": lambda arguments: _pause(overrides, arguments),
        "resume": lambda arguments: _resume(overrides, arguments),
        "set-thresholds": lambda arguments: _set_thresholds(loop, overrides, arguments),
        "snapshot": lambda arguments: _snapshot(loop, reporter, arguments),
        "bench": lambda arguments: _bench(loop, reporter, bench_timeout_s, arguments),
        "doctor": lambda arguments: _doctor(config, arguments),
    }


def _running(loop: Loop) -> Classifier:
    if loop.classifier is None:
        raise CommandRefused("no model runs; `eyas-device slots` on the device says why")
    return loop.classifier


def _check_arguments(command: str, arguments: Arguments, *allowed: str) -> None:
    """Raises `CommandRefused` for an argument that the command does not take."""
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        takes = ", ".join(allowed) if allowed else "no arguments"
        raise CommandRefused(f"{command}: unknown argument {unknown[0][:64]!r}; it takes {takes}")


def _number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _seconds(command: str, arguments: Arguments, *, default_s: float, max_s: float) -> float:
    """The duration in `seconds` or `minutes`. Raises `CommandRefused` for an impossible one."""
    given = [unit for unit in _UNITS if unit in arguments]
    if not given:
        return default_s
    unit = given[0]
    number = _number(arguments[unit])
    if len(given) > 1 or number is None or not 0 < number * _UNITS[unit] <= max_s:
        raise CommandRefused(
            f"{command}: {unit} = {arguments[unit]!r}; either seconds, above 0 to {max_s:g}, "
            f"or minutes, above 0 to {max_s / 60:g}, are allowed"
        )
    return number * _UNITS[unit]


def _pause(overrides: Overrides, arguments: Arguments) -> dict[str, Any]:
    """Process no frames for `seconds` or `minutes` (60 minutes without either)."""
    _check_arguments("pause", arguments, *_UNITS)
    return {"until": overrides.pause(_seconds("pause", arguments, default_s=PAUSE_S, max_s=MAX_PAUSE_S))}


def _resume(overrides: Overrides, arguments: Arguments) -> dict[str, Any]:
    _check_arguments("resume", arguments)
    overrides.resume()
    return {}


def _set_thresholds(loop: Loop, overrides: Overrides, arguments: Arguments) -> dict[str, Any]:
    """Set `threshold`: predictions below it are uncertain, for `seconds` or `minutes` (a day without either).

    It ends earlier with a model swap or a restart of the agent. The most probable of n labels has a probability of 1/n
    or more, so a threshold that is not above it would declare every prediction certain.
    """
    _check_arguments("set-thresholds", arguments, "threshold", *_UNITS)
    classifier = _running(loop)
    threshold, least = _number(arguments.get("threshold")), 1 / len(classifier.bundle.manifest.labels)
    if threshold is None or not least < threshold <= 1:
        raise CommandRefused(
            f"set-thresholds: threshold = {arguments.get('threshold')!r}; a number above {least:.3g} to 1 is needed, "
            "because at less no prediction would be uncertain"
        )
    seconds = _seconds("set-thresholds", arguments, default_s=THRESHOLD_S, max_s=MAX_THRESHOLD_S)
    before, until = overrides.set_threshold(classifier, threshold, seconds)
    return {"before": before, "threshold": threshold, "until": until}


def _snapshot(loop: Loop, reporter: Reporter, arguments: Arguments) -> dict[str, Any]:
    """Report a prediction as an event, with its image if the privacy rules allow that."""
    _check_arguments("snapshot", arguments)
    _running(loop)
    if loop.paused:
        raise CommandRefused("snapshot: the loop is paused; send resume first")
    return {"image": reporter.request_event()}


def _bench(loop: Loop, reporter: Reporter, timeout_s: float, arguments: Arguments) -> dict[str, Any]:
    """Measure what runs now (bundle, artefact, runtime, threads) in a process beside the loop; report a profile."""
    _check_arguments("bench", arguments)
    classifier = _running(loop)
    words = ["bench", "--bundle", str(classifier.bundle.root), "--runtime", classifier.runtime.name]
    words += ["--artefact", classifier.artefact.name, "--threads", str(classifier.threads)]
    words += ["--seconds", str(_BENCH_S), "--json", "-"]
    try:
        _, output, _ = run_group(module_command("eyas_device.cli", *words), timeout_s)
        measured = json.loads(output)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        reason = f"no result within {timeout_s:g} s" if late else type(error).__name__
        raise CommandRefused(
            f"the benchmark failed ({reason}); run `eyas-device bench` on the device to see why"
        ) from None
    results = [{**row, "settings": measured["settings"]} for row in measured["results"]]
    profile = Profile(**{name: measured[name] for name in ("board", "os", "versions", "pressure")}, results=results)
    reporter.report_profile(profile)
    return {"results": len(results)}


def _doctor(config: Config, arguments: Arguments) -> dict[str, Any]:
    """Run all checks but those of the camera, which the loop holds, and of the broker, which delivered the command."""
    from eyas_device.doctor import CHECKS, Context, examine, probes

    _check_arguments("doctor", arguments)
    busy = (probes.camera, probes.view, probes.broker)
    rows = examine(Context(config=config), [check for check in CHECKS if check not in busy])
    return {"checks": [{"check": r.check, "status": r.status, "finding": r.finding, "fix": r.fix} for r in rows]}
