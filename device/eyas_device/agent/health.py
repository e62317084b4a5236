"""The health of a running agent: model, camera, loop, threads, link and board."""

from __future__ import annotations

import logging
import time

from eyas_device.agent.active import ModelSwitch
from eyas_device.agent.finite import FiniteWatch
from eyas_device.agent.loop import Loop
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.output import error_with_place
from eyas_device.agent.outputs import Outputs
from eyas_device.agent.overrides import Overrides
from eyas_device.agent.recent import Recent
from eyas_device.agent.reporter import Reporter
from eyas_device.agent.update_state import UpdateWatch
from eyas_device.board import read_vitals
from eyas_device.board.identity import machine
from eyas_device.camera import Camera
from eyas_device.camera.reconnecting import CameraState
from eyas_device.telemetry.messages import Health
from eyas_device.updates.records import AgentRecord

logger = logging.getLogger(__name__)


class HealthMonitor:
    """Asks the parts of the agent how they are. Parts are None until they have been started; any thread may ask."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        """Start of the agent, monotonic seconds."""
        self.recent = Recent()
        """Predictions of the last minute."""
        self.ood = OodDetector()
        self.finite = FiniteWatch()
        self.reporter: Reporter | None = None
        self.models: ModelSwitch | None = None
        self.camera: Camera | None = None
        self.loop: Loop | None = None
        self.overrides: Overrides | None = None
        self.outputs: Outputs | None = None
        self.updates: UpdateWatch | None = None
        self._restarts: dict[str, int] = {}

    @property
    def camera_state(self) -> CameraState | None:
        """State of a live camera; None for a finite source, and before it is opened."""
        return getattr(self.camera, "state", None)

    @property
    def link(self) -> str:
        """State of the link and, if it fails, of the spool's disk, for people; empty without telemetry."""
        return self.reporter.description if self.reporter is not None else ""

    @property
    def record(self) -> AgentRecord:
        """What the agent runs, and what it refused."""
        return self.models.record if self.models is not None else AgentRecord()

    @property
    def restarts(self) -> dict[str, int]:
        """Part of the agent -> errors after which it started again."""
        errors = {"loop": self.loop.errors} if self.loop is not None and self.loop.errors else {}
        return self._restarts | errors

    @property
    def faults(self) -> tuple[str, ...]:
        """Further problems that people should know of."""
        own = (self.finite.fault, self.overrides.fault if self.overrides is not None else "")
        outputs = self.outputs.faults if self.outputs is not None else ()
        return (*(fault for fault in own if fault), *outputs)

    def health(self) -> Health:
        """Return the health for a status or a window."""
        state, loop, record = self.camera_state, self.loop, self.record
        overrides = self.overrides
        judgement = self.ood.judgement()
        board = read_vitals()
        return Health(
            selection=record.selection,
            refused_model=record.refused_model,
            refused_reason=record.refused_reason,
            restarts=self.restarts,
            camera=state.condition if state else "",
            reason=state.reason_at(time.monotonic()) if state else "",
            losses=state.losses if state else 0,
            paused=loop is not None and loop.paused,
            dropped=loop.dropped if loop is not None else 0,
            ood_quantile=round(judgement.ood_quantile, 3) if judgement and judgement.images else None,
            ood_images=judgement.images if judgement else 0,
            ood=judgement.ood if judgement and judgement.enough else None,
            ood_reason=judgement.reason if judgement else "",
            paused_until=overrides.paused_until if overrides is not None else None,
            update=self.updates.update if self.updates is not None else None,
            agent_update=self.updates.agent if self.updates is not None else None,
            faults=self.faults + (self.reporter.link_faults if self.reporter is not None else ()),
            machine=machine(),
            certificate_days=self.reporter.certificate_days if self.reporter is not None else None,
            temperature_c=board.temperature_c,
            throttled=board.throttled,
        )

    def on_thread_error(self, name: str, error: BaseException) -> None:
        """Count, log and report that a thread starts again after an error."""
        self._restarts = self._restarts | {name: self._restarts.get(name, 0) + 1}
        logger.error("the %s thread starts again after an error: %s", name, error_with_place(error))
        if self.reporter is not None:
            self.reporter.report_status()

    def last_words(self) -> list[str]:
        """What becomes of the telemetry after `Reporter.close`, for people."""
        if self.reporter is None:
            return []
        waiting, texts = self.reporter.spool.waiting(), [f"mqtt: {self.link}"]
        if waiting.on_disk:
            texts.append(f"{_messages(waiting.on_disk)} on disk for the next start")
        if waiting.in_memory:
            texts.append(f"{_messages(waiting.in_memory)} in memory only: lost")
        return texts


def _messages(number: int) -> str:
    return f"{number:,} messages wait" if number > 1 else "1 message waits"
