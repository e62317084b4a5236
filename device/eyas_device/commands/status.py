"""`eyas-device status`: ask the running agent what it is doing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.slots import STATE_HELP, state_folder
from eyas_device.errors import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    from eyas_device.telemetry.local import AgentStatus, LinkReport
    from eyas_device.telemetry.messages import Update

HELP = "ask the running agent what it does; exit code 1 if something is wrong, 2 without an agent"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("--config", type=values.path, metavar="FILE", help="the device's configuration")
    parser.add_argument("--state", type=values.path, metavar="DIR", help=STATE_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--timeout", type=values.positive_number, default=5.0, metavar="SECONDS", help="longest wait (default 5)"
    )


def main(args: argparse.Namespace) -> int:
    """Print the agent's status: model, camera, predictions of the last minute, link, board and the last warnings."""
    from eyas_device.support.logs import show
    from eyas_device.support.streams import to_json
    from eyas_device.telemetry.local import ask

    status = ask(state_folder(args.state, args.config), timeout_s=args.timeout)
    if args.json:
        print(to_json(status, sys.stdout))
    else:
        for name, text in _rows(status):
            show(f"{name:10}{text}")
    return 0 if status.healthy else EXIT_CHECK_FAILED


def _rows(status: AgentStatus) -> Iterator[tuple[str, str]]:
    yield "device", f"{status.site}/{status.device}: " + ("healthy" if status.healthy else "degraded")
    for problem in status.problems:
        yield "", f"! {problem}"
    model = status.model
    slot = f", slot {model.slot}" if model.slot else ""
    yield "model", f"{model.name} ({model.digest}{slot}): {model.artefact}, {model.selection}" if model.name else "none"
    if model.refused:
        yield "", f"refused: {model.refused}"
    if status.update is not None:
        yield "update", _update(status.update)
        if status.probation:
            yield "", status.probation
    if status.agent_update is not None:
        yield "", _update(status.agent_update)
    camera = status.camera
    since = f" for {_duration(camera.since_s)}" if camera.since_s is not None else ""
    seen = f", last frame {_duration(camera.last_frame_s)} ago" if camera.last_frame_s is not None else ""
    yield "camera", f"{camera.source}: {camera.state or 'finite source'}{since}{seen}, lost {camera.losses} times"
    recent = status.recent
    yield (
        "frames",
        f"{status.frames:,} since the start; last {recent.seconds:.0f} s: {recent.frames:,}, {recent.fps:.1f} fps",
    )
    if recent.latency_ms:
        yield "latency", ", ".join(f"{name} {ms:.1f} ms" for name, ms in recent.latency_ms.items())
    if recent.frames:
        counts = sorted(recent.counts.items(), key=lambda item: -item[1])
        yield "labels", ", ".join(f"{label} {count:,}" for label, count in counts)
    share = recent.uncertain / max(recent.frames, 1)
    yield "quality", f"uncertain {100 * share:.1f} %, unreadable {100 * recent.unreadable_share:.1f} %, {_ood(status)}"
    yield "mqtt", _link(status.link) if status.link is not None else "not configured"
    if status.paused:
        until = "" if status.paused_until is None else f" until {_clock(status.paused_until)}"
        yield "paused", f"yes{until}"
    yield "restarts", ", ".join(f"{name} {count}" for name, count in status.restarts.items()) or "none"
    heat = "not measured" if status.temperature_c is None else f"{status.temperature_c:.0f} °C"
    yield "board", f"{heat}, throttled: {', '.join(status.throttled) or 'no'}"
    yield "agent", f"{status.agent}, process {status.pid}, up {_duration(status.uptime_s)}"
    for number, warning in enumerate(status.warnings):
        times = f" ({warning.count:,} times)" if warning.count > 1 else ""
        yield "log" if number == 0 else "", f"{_clock(warning.time)} {warning.level}: {warning.text}{times}"


def _ood(status: AgentStatus) -> str:
    if status.ood is None:
        return "out of distribution: not known"
    reason = f" ({status.ood_reason})" if status.ood_reason else ""
    return f"out of distribution: {'yes' if status.ood else 'no'}{reason}"


def _update(update: Update) -> str:
    followed = f"channel {update.channel}, group {update.group}" if update.channel else "by hand"
    if not update.model:
        return f"none yet ({followed})"
    since = f" since {_clock(update.since)}" if update.since else ""
    reason = f": {update.reason}" if update.reason else ""
    return f"{update.model} ({update.digest}): {update.state}{since}{reason} ({followed})"


def _link(link: LinkReport) -> str:
    text = f"{link.broker}, for {_duration(link.since_s)}: {link.state}"
    text += f"; waiting {link.on_disk:,} on disk, {link.in_memory:,} in memory"
    if link.given_up:
        text += "; given up " + ", ".join(f"{kind} {count:,}" for kind, count in link.given_up.items())
    if link.certificate_days is not None:
        text += f"; certificate {link.certificate_days:.0f} days"
    return text


def _clock(seconds: float) -> str:
    """A time of the wall clock; the agent's clock may be far off."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OSError, OverflowError, ValueError):
        return f"{seconds:.0f} s"


def _duration(seconds: float) -> str:
    from eyas_device.support.logs import duration

    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
