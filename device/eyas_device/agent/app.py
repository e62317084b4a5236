"""The device agent: opens camera and model as configured and runs the frame loop with its listeners."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from eyas_device.agent.active import ModelSwitch, Reread
from eyas_device.agent.handlers import handlers
from eyas_device.agent.health import HealthMonitor
from eyas_device.agent.loop import Listener, Loop, Pace
from eyas_device.agent.output import RunLog
from eyas_device.agent.outputs import Outputs, open_outputs
from eyas_device.agent.overrides import Overrides
from eyas_device.agent.reloading import Reloader
from eyas_device.agent.report import StatusText, describe
from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.agent.signals import Signals
from eyas_device.agent.systemd import LOAD_S, Notifier
from eyas_device.agent.update_state import UpdateWatch, poke
from eyas_device.board.limits import usable_cores
from eyas_device.camera import Camera, is_live, open_configured
from eyas_device.camera.reconnecting import ReconnectingCamera
from eyas_device.config import STATE, CameraSection, Config, ModelSection, connection_errors, read_config, with_home
from eyas_device.errors import CameraSpecError, ConfigError, EyasError, LinkError
from eyas_device.runtimes import use_engine_cache
from eyas_device.support.closing import Closing
from eyas_device.support.logs import LogHandler
from eyas_device.support.opencv import silence_opencv
from eyas_device.support.toml import error_report
from eyas_device.telemetry.local import StatusServer
from eyas_device.telemetry.messages import hint_topic
from eyas_device.telemetry.mqtt import UplinkSettings
from eyas_device.telemetry.spool.spool import Spool, SpoolLimits, SpoolState
from eyas_device.telemetry.tls import Security

logger = logging.getLogger(__name__)


def load_config(path: Path | None, **over: dict[str, Any]) -> Config:
    """Read the configuration and override it with the command line's values: section -> key -> value.

    Values of None override nothing. Raises `ConfigError` for a faulty file or connection, `LinkError` for one that the
    command line alone describes, and `CameraSpecError` if no camera is configured.
    """
    config = read_config(path) if path else Config()
    for name, section in over.items():
        values = {key: value for key, value in section.items() if value is not None}
        config = with_home(replace(config, **{name: replace(getattr(config, name), **values)}))
    if errors := list(connection_errors(config.telemetry)):
        raise (
            ConfigError(error_report(path, [f"[telemetry] {error}" for error in errors]))
            if path
            else LinkError(f"telemetry: {'; '.join(errors)}")
        )
    if not config.camera.source:
        raise CameraSpecError("no camera: give --camera SPEC, or camera.source in the configuration")
    return config


def limit_cpu(model: ModelSection) -> None:
    """Limit the process to its configured cores and threads. Raises `ConfigError` for cores that do not exist.

    Call it before a runtime or OpenCV starts threads of its own.
    """
    if model.affinity:
        try:
            os.sched_setaffinity(0, model.affinity)
        except OSError as error:
            cores = sorted(os.sched_getaffinity(0))
            raise ConfigError(
                f"model.affinity {list(model.affinity)}: {error.strerror}; this process may use {cores}"
            ) from None
    if model.threads > (usable := usable_cores()):
        logger.warning("[model] threads = %d, but this process may use %d cores only", model.threads, usable)
    silence_opencv()
    import cv2

    cv2.setNumThreads(model.threads)


def open_source(camera: CameraSection, *, loop: bool = False) -> Camera:
    """Open the camera: a live one reconnects for ever, a finite one plays once (or again and again with `loop`).

    Raises `CameraSpecError` for a wrong specification and `CameraError` for a finite source that does not open.
    """

    def opened() -> Camera:
        return open_configured(camera, loop=loop)

    if not is_live(camera.source):
        return opened()
    return ReconnectingCamera(opened, frozen_s=camera.frozen_s, black_level=camera.black_level)


class Agent(Closing):
    """Telemetry, checked model, camera and the loop between them, as configured; they start in this order.

    It handles signals until it is closed: see `eyas_device.agent.signals.Signals`. SIGHUP reads the configuration
    again, opens and checks the model that is configured now, in a thread beside the loop, and swaps it in before the
    next frame; if that fails, the present model stays.
    """

    def __init__(
        self,
        config: Config,
        *,
        listeners: Callable[[Agent], Iterable[Listener]] = lambda agent: (),
        loop: bool = False,
        service: Callable[[], Config] | None = None,
        config_path: Path | None = None,
        log: LogHandler | None = None,
    ) -> None:
        """Open everything; `run` starts the loop.

        Args:
            config: The device's configuration.
            listeners: Returns further listeners; called when everything is open. There is no model yet
                (`loop.classifier`) for a service that has no good one.
            loop: Start a finite source again when it ends.
            service: Reads the configuration again. With it, the lack of a good model does not end the agent: that is
                reported and tried again.
            config_path: File that `config` was read from, for the doctor; None if it is the command line's alone.
            log: Where log messages go; it writes its counts of repeated ones from time to time.

        """
        self._config, self._config_path = config, config_path
        self._reread: Reread = service or (lambda: config)
        self.monitor = monitor = HealthMonitor()
        """The health of the agent's parts."""
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            self._notifier = stack.enter_context(Notifier())
            self._notifier.extend(LOAD_S)
            limit_cpu(config.model)
            use_engine_cache(Path(config.device.state))
            self._reporter = monitor.reporter = self._open_reporter()
            self._models = monitor.models = ModelSwitch(config, self._notifier)
            monitor.updates = UpdateWatch(Path(config.device.state), config.update, lambda: self._models.verdict)
            if self._reporter is not None:
                self._start_reporter(stack.enter_context(self._reporter))
            stack.enter_context(self._models)
            classifier = self._models.open_first(required=service is None)
            self._notifier.extend(LOAD_S)
            camera = monitor.camera = stack.enter_context(open_source(config.camera, loop=loop))
            if not camera.live:
                monitor.ood.interval_s = 0.0
            self.loop = monitor.loop = Loop(classifier, camera, pace=_pace(config))
            self._reloader = stack.enter_context(
                Reloader(self._reload, has_model=lambda: self.loop.classifier is not None)
            )
            self._models.submit = self._reloader.submit
            self._models.connect(self.loop, self._reread)
            self._outputs = monitor.outputs = self._open_outputs()
            if self._outputs is not None:
                stack.enter_context(self._outputs)
            self._add_listeners(listeners(self), log)
            self._serve_status(stack, log)
            signals.guard(self.loop, reload=self._reloader.request)
            stack.enter_context(self._notifier)  # says that the service stops before anything else is closed
            self._stack = stack.pop_all()

    def run(self, *, frames: int | None = None) -> None:
        """Run until the source ends, `frames` were predicted, or a signal came; raises what `Loop.run` raises."""
        self._reloader.start()
        try:
            self.loop.run(frames=frames)
        except (EyasError, KeyboardInterrupt):
            raise
        except BaseException:
            self._models.crashed = True
            raise

    def close(self) -> None:
        """Send the final telemetry, release camera and model, and restore the signal handlers."""
        self._stack.close()

    def _start_reporter(self, reporter: Reporter) -> None:
        reporter.watch(self.monitor.on_thread_error)
        self._notifier.stalled = lambda: reporter.stalled
        monitor = self.monitor
        self._models.on_change = monitor.finite.on_change = monitor.ood.on_change = reporter.report_status
        self._models.on_arm = reporter.refresh_arm
        self._models.on_disagreement = reporter.on_disagreement
        if monitor.updates is not None:
            monitor.updates.on_change = reporter.report_status
        reporter.start()
        if reporter.spool.state is SpoolState.IN_MEMORY:
            state = self._config.device.state
            logger.warning("%s does not exist: messages wait in memory only (see device.state)", state)

    def _serve_status(self, stack: ExitStack, log: LogHandler | None) -> None:
        """Answer `eyas-device status`, if this is the agent of its state folder."""
        monitor, state = self.monitor, Path(self._config.device.state)
        if not self._models.holds_state:
            logger.debug("%s is missing or another agent's: `eyas-device status` cannot ask this one", state)
            return
        try:
            stack.enter_context(
                StatusServer(
                    state, lambda: describe(monitor, self._models.config, log), on_error=monitor.on_thread_error
                )
            )
        except OSError as error:
            logger.warning("%s: `eyas-device status` cannot ask this agent: %s", state, error.strerror or error)

    def _add_listeners(self, further: Iterable[Listener], log: LogHandler | None) -> None:
        loop, reporter, monitor = self.loop, self._reporter, self.monitor
        run_log = RunLog(monitor.recent, camera=lambda: monitor.camera_state, link=lambda: monitor.link, handler=log)
        loop.listeners += [monitor.recent, run_log, *further, self._models, monitor.ood, monitor.finite, self._reloader]
        loop.listeners += [monitor.updates] if monitor.updates is not None else []
        if reporter is not None:
            loop.listeners.append(reporter)
            monitor.ood.on_descriptor.append(reporter.add_descriptor)
            monitor.overrides = overrides = Overrides(loop, on_change=reporter.report_status)
            loop.listeners.append(overrides)
            reporter.register(
                handlers(lambda: self._models.config, loop, reporter, overrides, config_path=self._config_path)
            )
        if self._outputs is not None:
            loop.listeners.append(self._outputs)
            self._outputs.watch(monitor.on_thread_error)
            self._outputs.start()
        loop.listeners += [self._models.probation, StatusText(monitor, self._notifier), self._notifier]
        self._models.on_config = self._use_config

    def _use_config(self, config: Config) -> None:
        self.loop.pace = _pace(config)

    def _reload(self) -> None:
        self._models.reload(self.loop, self._reread)

    def _open_outputs(self) -> Outputs | None:
        reporter, monitor, loop = self._reporter, self.monitor, self.loop

        def is_ood() -> bool:
            judgement = monitor.ood.judgement()
            return judgement is not None and judgement.ood

        return open_outputs(
            self._config,
            publish=reporter.publish_answer if reporter is not None else None,
            is_paused=lambda: loop.paused,
            is_ood=is_ood,
            on_change=reporter.report_status if reporter is not None else lambda: None,
        )

    def _open_reporter(self) -> Reporter | None:
        telemetry, device = self._config.telemetry, self._config.device
        if not telemetry.broker:
            return None
        address = telemetry.address
        settings = ReporterSettings(
            uplink=UplinkSettings(
                host=address.host,
                port=address.port,
                site=device.site,
                device=device.name,
                delivery=telemetry.delivery,
                security=Security.from_config(telemetry),
                hint=hint_topic(device.site, self._config.update.group) if self._config.update.url else "",
            ),
            window_s=telemetry.window_s,
            privacy=self._config.privacy,
            commands=telemetry.commands,
        )
        limits = SpoolLimits(
            max_bytes=int(telemetry.spool_mb * (1 << 20)), max_days=telemetry.spool_days, sync_s=telemetry.sync_s
        )
        spool = Spool(_spool_folder(Path(device.state)), device=device.name, limits=limits)
        return Reporter(
            settings,
            health=self.monitor.health,
            arm=lambda: self._models.arm,
            on_hint=lambda: poke(Path(device.state)),
            spool=spool,
        )


def _spool_folder(state: Path) -> Path | None:
    """The spool's folder; None without the default state folder, so that a first try leaves nothing behind."""
    return None if str(state) == STATE and not state.is_dir() else state / "spool"


def _pace(config: Config) -> Pace:
    loop = config.loop
    return Pace(
        fps=loop.fps or None,
        duty=loop.duty,
        max_age_s=loop.max_age_ms / 1000 or None,
        give_up_s=config.camera.give_up_s or None,
    )
