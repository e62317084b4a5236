"""Handlers of the host's commands."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eyas_device.agent.loop import Loop
from eyas_device.agent.overrides import Overrides
from eyas_device.agent.reporter import Reporter
from eyas_device.config import Config
from eyas_device.predict import Classifier
from eyas_device.support.processes import module_command, run_group
from eyas_device.telemetry.arguments import CommandRefused, read_arguments
from eyas_device.telemetry.messages import Command, Profile
from eyas_device.telemetry.remote import Handler

_BENCH_S = 5
_BENCH_TIMEOUT_S = 150.0


def handlers(
    config: Callable[[], Config],
    loop: Loop,
    reporter: Reporter,
    overrides: Overrides,
    *,
    config_path: Path | None = None,
    bench_timeout_s: float = _BENCH_TIMEOUT_S,
) -> Mapping[str, Handler]:
    """Return the handler of each command; `telemetry.commands` decides which of them are called.

    Args:
        config: Returns the configuration in force.
        loop: The frame loop.
        reporter: Sends what a command reports.
        overrides: Temporary changes of the loop and its model.
        config_path: File that the configuration was read from; None if it is the command line's alone.
        bench_timeout_s: Time limit of a benchmark.

    """
    return {
        "pause": lambda command: _pause(overrides, command),
        "resume": _without_arguments(lambda: _resume(overrides)),
        "set-thresholds": lambda command: _set_thresholds(loop, overrides, command),
        "snapshot": lambda command: _snapshot(loop, reporter, command),
        "bench": _without_arguments(lambda: _bench(loop, reporter, bench_timeout_s)),
        "doctor": _without_arguments(lambda: _doctor(config(), config_path)),
    }


def _without_arguments(handler: Callable[[], dict[str, Any]]) -> Handler:
    """Refuse arguments, then call the handler."""

    def execute(command: Command) -> dict[str, Any]:
        read_arguments(command.name, command.arguments)
        return handler()

    return execute


def _running(loop: Loop) -> Classifier:
    if loop.classifier is None:
        raise CommandRefused("no model runs; `eyas-device slots` on the device says why")
    return loop.classifier


def _pause(overrides: Overrides, command: Command) -> dict[str, Any]:
    """Process no frames for `seconds` or `minutes` (60 minutes without either)."""
    return {"until": overrides.pause(read_arguments(command.name, command.arguments).seconds)}


def _resume(overrides: Overrides) -> dict[str, Any]:
    overrides.resume()
    return {}


def _set_thresholds(loop: Loop, overrides: Overrides, command: Command) -> dict[str, Any]:
    """Set `threshold`: predictions below it are uncertain, for `seconds` or `minutes` (a day without either).

    It ends earlier with a model swap or a restart of the agent.
    """
    classifier = _running(loop)
    least = 1 / len(classifier.bundle.manifest.labels)
    settings = read_arguments(command.name, command.arguments, min_threshold=least)
    before, until = overrides.set_threshold(classifier, settings.threshold, settings.seconds)
    return {"before": before, "threshold": settings.threshold, "until": until}


def _snapshot(loop: Loop, reporter: Reporter, command: Command) -> dict[str, Any]:
    """Report a prediction as an event, with its image if the privacy rules allow that."""
    read_arguments(command.name, command.arguments)
    _running(loop)
    if loop.paused:
        raise CommandRefused("snapshot: the loop is paused; send resume first")
    return {"image": reporter.request_event(command.id, command.expires - time.time())}


def _bench(loop: Loop, reporter: Reporter, timeout_s: float) -> dict[str, Any]:
    """Measure what runs now (bundle, artefact, runtime, threads) in a process beside the loop; report a profile."""
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
    whole = [(row, row["loop"].get("total", {})) for row in results]
    profile = Profile(**{name: measured[name] for name in ("board", "os", "versions", "pressure")}, results=results)
    reporter.report_profile(profile)
    return {
        "results": len(results),
        "measured": [
            {
                "runtime": row["runtime"],
                "artefact": row["artefact"],
                "threads": classifier.threads,
                "p50_ms": total.get("p50"),
                "p99_ms": total.get("p99"),
                "frames_per_second": row["frames_per_second"],
            }
            for row, total in whole
        ],
    }


def _doctor(config: Config, config_path: Path | None) -> dict[str, Any]:
    """Run all checks but those of the camera, which the loop holds, and of the broker, which delivered the command."""
    from eyas_device.doctor import CHECKS, Context, examine, probes

    busy = (probes.camera, probes.view, probes.broker)
    rows = examine(Context(config=config, config_path=config_path), [check for check in CHECKS if check not in busy])
    return {"checks": [{"check": r.check, "status": r.status, "finding": r.finding, "fix": r.fix} for r in rows]}
