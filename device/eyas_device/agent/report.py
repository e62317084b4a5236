"""The agent's own view of itself, for `eyas-device status`, the doctor and the line that `systemctl status` shows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec

from eyas_device import __version__
from eyas_device.agent.health import HealthMonitor
from eyas_device.agent.loop import Listener
from eyas_device.agent.systemd import Notifier
from eyas_device.config import Config
from eyas_device.support import logs
from eyas_device.support.logs import LogHandler
from eyas_device.support.redact import redact, redact_tree
from eyas_device.telemetry.local import AgentStatus, CameraReport, LinkReport, LogReport, ModelReport
from eyas_device.telemetry.messages import Health
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_device.telemetry.spool.spool import SpoolState

CERTIFICATE_DAYS = 30.0
"""A certificate that expires within this time is a problem."""
UNREADABLE_SHARE = 0.05
"""A larger share of unreadable frames is a problem."""
_DIGEST = 12
_LINE_S = 10.0


def describe(monitor: HealthMonitor, config: Config, log: LogHandler | None = None) -> AgentStatus:
    """Return the status of the agent, without passwords. It may read sensors: not for the frame loop."""
    health, record = monitor.health(), monitor.record
    status = AgentStatus(
        agent=__version__,
        pid=os.getpid(),
        site=config.device.site,
        device=config.device.name,
        machine=health.machine,
        uptime_s=round(time.monotonic() - monitor.started, 1),
        model=ModelReport(
            name=record.model,
            digest=record.manifest_sha256[:_DIGEST],
            slot=record.slot,
            bundle=record.bundle,
            artefact=record.artefact,
            runtime=record.runtime,
            selection=record.selection,
            refused=record.refused_model,
            refused_reason=redact(record.refused_reason),
            problem=redact(record.problem),
        ),
        camera=_camera(monitor, config),
        recent=monitor.recent.figures(),
        frames=monitor.recent.frames,
        ood=health.ood,
        ood_quantile=health.ood_quantile,
        ood_reason=health.ood_reason,
        link=_link(monitor, config, health),
        paused=health.paused,
        paused_until=health.paused_until,
        restarts=health.restarts,
        temperature_c=health.temperature_c,
        throttled=health.throttled,
        update=health.update,
        agent_update=health.agent_update,
        probation=monitor.models.progress if monitor.models is not None else "",
        warnings=tuple(_warnings(log)),
    )
    problems = tuple(redact_tree(list(_problems(status, health))))
    return msgspec.structs.replace(status, healthy=not problems, problems=problems)


class StatusText(Listener):
    """Loop listener that keeps the line of `systemctl status` up to date, every ten seconds at most."""

    def __init__(self, monitor: HealthMonitor, notifier: Notifier) -> None:
        self._monitor, self._notifier, self._due = monitor, notifier, 0.0

    def on_tick(self) -> None:
        """Show the present figures if ten seconds have passed."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _LINE_S
        monitor, figures = self._monitor, self._monitor.recent.figures()
        texts = ["paused"] if monitor.loop is not None and monitor.loop.paused else []
        texts.append(f"{figures.fps:.1f} fps")
        if figures.latency_ms:
            texts.append(f"p50 {figures.latency_ms['p50']:.0f} ms")
        if figures.frames:
            texts.append(f"uncertain {100 * figures.uncertain / figures.frames:.0f} %")
        if figures.unreadable:
            texts.append(f"unreadable {100 * figures.unreadable_share:.0f} %")
        self._notifier.facts("; ".join([", ".join(texts), *([f"mqtt {monitor.link}"] if monitor.link else [])]))


def _warnings(log: LogHandler | None) -> Iterator[LogReport]:
    for message in log.warnings() if log is not None else ():
        yield LogReport(time=message.time, level=message.level_name, text=message.text, count=message.count)


def _camera(monitor: HealthMonitor, config: Config) -> CameraReport:
    state, now = monitor.camera_state, time.monotonic()
    source = redact(config.camera.source)
    if state is None:
        return CameraReport(source=source)
    return CameraReport(
        source=source,
        state=state.condition,
        reason=redact(state.reason_at(now)),
        since_s=round(now - state.since, 1),
        last_frame_s=None if state.last_frame is None else round(now - state.last_frame, 1),
        losses=state.losses,
    )


def _link(monitor: HealthMonitor, config: Config, health: Health) -> LinkReport | None:
    reporter = monitor.reporter
    if reporter is None:
        return None
    waiting, spool, link = reporter.spool.waiting(), reporter.spool, reporter.link
    return LinkReport(
        broker=config.telemetry.broker,
        state=redact(str(link)),
        since_s=round(time.monotonic() - link.since, 1) if link.since else 0.0,
        on_disk=waiting.on_disk,
        in_memory=waiting.in_memory,
        given_up=spool.evicted,
        spool=f"{spool.state.value}: {spool.detail}" if spool.state.is_fault else spool.state.value,
        certificate_days=health.certificate_days,
    )


def _problems(status: AgentStatus, health: Health) -> Iterator[str]:
    model, camera, link, recent = status.model, status.camera, status.link, status.recent
    if not model.name:
        yield f"no model runs: {model.problem or model.refused_reason or 'it is being loaded'}"
    elif model.refused_reason:
        yield f"{model.refused or 'a model'} was refused: {model.refused_reason}"
    if model.name and model.problem:
        yield f"the last reload changed nothing: {model.problem}"
    if status.paused:
        left = None if status.paused_until is None else status.paused_until - time.time()
        yield "paused" if left is None else f"paused for another {logs.duration(left)}"
    if camera.state not in ("", "delivering"):
        yield f"camera {camera.state}" + (f": {camera.reason.removeprefix('camera ')}" if camera.reason else "")
    if recent.unreadable_share > UNREADABLE_SHARE:
        yield f"{100 * recent.unreadable_share:.0f} % of the last minute's frames were unreadable"
    if status.ood:
        yield "the images are out of distribution" + (f": {status.ood_reason}" if status.ood_reason else "")
    if link is not None:
        if link.state != LinkState.CONNECTED.value:
            yield f"mqtt {link.state}"
        if link.spool not in (SpoolState.ON_DISK.value, SpoolState.IN_MEMORY.value):
            yield f"messages wait {link.spool}"
        if link.given_up:
            yield "given up since the start: " + ", ".join(f"{kind} {n}" for kind, n in link.given_up.items())
        if link.certificate_days is not None and link.certificate_days < CERTIFICATE_DAYS:
            yield f"the certificate expires in {link.certificate_days:.0f} days"
    if status.update is not None and status.update.state in ("refused", "failed"):
        yield f"the update to {status.update.model or 'another release'} {status.update.state}: {status.update.reason}"
    if status.throttled:
        yield f"the processor is throttled: {', '.join(status.throttled)}"
    yield from health.faults
