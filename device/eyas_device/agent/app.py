"""The device agent: opens camera and model as configured and runs the frame loop with its listeners."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from msgspec.structs import replace

from eyas_device.agent.handlers import handlers
from eyas_device.agent.loop import Listener, Loop, Pace
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.output import StatusLine
from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.agent.signals import Signals
from eyas_device.agent.systemd import Notifier
from eyas_device.board import read_vitals
from eyas_device.bundle import Bundle
from eyas_device.camera import Camera, is_live, open_camera
from eyas_device.camera.reconnecting import CameraState, ReconnectingCamera
from eyas_device.config import STATE, CameraSection, Config, LoopSection, ModelSection, read_config
from eyas_device.errors import BundleError, CameraSpecError, ConfigError, EyasError
from eyas_device.predict import Classifier
from eyas_device.runtimes.selection import read_selection
from eyas_device.support.closing import Closing
from eyas_device.support.names import parse_broker
from eyas_device.support.opencv import silence_opencv
from eyas_device.telemetry.aggregate import LoopStats
from eyas_device.telemetry.messages import Health
from eyas_device.telemetry.mqtt import UplinkSettings
from eyas_device.telemetry.spool.spool import Spool, SpoolLimits, SpoolState
from eyas_device.telemetry.tls import Security
from eyas_device.updates.golden import check_loaded
from eyas_device.updates.slots import Slots


def load_config(path: Path | None, **over: dict[str, Any]) -> Config:
    """Read the configuration and override it with the command line's values: section -> key -> value.

    Values of None override nothing. Raises `ConfigError` for a faulty file, and `CameraSpecError` if no camera is
    configured.
    """
    config = read_config(path) if path else Config()
    for name, section in over.items():
        values = {key: value for key, value in section.items() if value is not None}
        config = replace(config, **{name: replace(getattr(config, name), **values)})
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
    silence_opencv()
    import cv2

    cv2.setNumThreads(model.threads)


def open_source(camera: CameraSection, *, loop: bool = False) -> Camera:
    """Open the camera: a live one reconnects for ever, a finite one plays once (or again and again with `loop`).

    Raises `CameraSpecError` for a wrong specification and `CameraError` for a finite source that does not open.
    """

    def opened() -> Camera:
        return open_camera(camera.source, loop=loop, timeout_s=camera.timeout_s)

    if not is_live(camera.source):
        return opened()
    return ReconnectingCamera(opened, frozen_s=camera.frozen_s, black_level=camera.black_level)


def open_model(config: Config) -> Classifier:
    """Open a classifier that passes its golden check on this device.

    It comes from `model.bundle`, or else from the current slot, or from the other one if the current fails. Raises
    `BundleError` (`CheckFailed`) if none passes, and `RuntimeUnavailable` without a runtime for it.
    """
    if config.model.bundle:
        return _open_proven(Path(config.model.bundle), config)
    slots = Slots(Path(config.device.state))
    good = [Path(state.path) for state in sorted(slots.states(), key=lambda s: not s.current) if state.good]
    if not good:
        raise BundleError(
            f"{slots.folder}: no good slot yet; fill one with `eyas-device install BUNDLE` or `eyas flash`"
        )
    for path in good[:-1]:
        try:
            return _open_proven(path, config)
        except EyasError:
            continue  # a camera never goes dark because of one bad slot
    return _open_proven(good[-1], config)


class Agent(Closing):
    """Camera, checked model and the loop between them, as configured.

    It handles signals until it is closed: see `eyas_device.agent.signals.Signals`. SIGHUP opens and checks the model
    that is configured now, in a thread beside the loop, and swaps it in before the next frame; if it fails, the present
    model stays.
    """

    def __init__(
        self,
        config: Config,
        stream: TextIO,
        *,
        listeners: Callable[[Classifier], Sequence[Listener]] = lambda _: (),
        loop: bool = False,
    ) -> None:
        """Open everything; `run` starts the loop.

        Args:
            config: The device's configuration.
            stream: Where the status line goes.
            listeners: Returns further listeners for the first model.
            loop: Start a finite source again when it ends.

        """
        self._config = config
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            limit_cpu(config.model)
            self._camera = stack.enter_context(open_source(config.camera, loop=loop))
            classifier = open_model(config)
            self.loop = Loop(classifier, self._camera, pace=_pace(config.loop, config.camera))
            stack.callback(lambda: self.loop.classifier.close())  # the model may have been swapped
            self._ood = OodDetector(classifier.bundle)
            self._reporter = self._open_reporter(classifier)
            if self._reporter is not None:
                stack.enter_context(self._reporter)
            self.status = StatusLine(stream, LoopStats(), self._reporter)
            self.loop.listeners += [*listeners(classifier), self.status, self._ood]
            if self._reporter is not None:
                self.loop.listeners.append(self._reporter)
                self._ood.on_descriptor.append(self._reporter.add_descriptor)
                self._reporter.start(handlers(config, self.loop, self._reporter))
                if self._reporter.spool.state is SpoolState.IN_MEMORY:
                    state = config.device.state
                    self.status.say(f"{state} does not exist: messages wait in memory only (see device.state)")
            self._notifier = stack.enter_context(Notifier())
            self.loop.listeners.append(self._notifier)
            signals.guard(self.loop, reload=self._reload)
            self._stack = stack.pop_all()

    def run(self, *, frames: int | None = None) -> None:
        """Run until the source ends, `frames` were predicted, or a signal came; raises what `Loop.run` raises."""
        self.loop.run(frames=frames)

    def close(self) -> None:
        """Send the final telemetry, release camera and model, and restore the signal handlers."""
        self._stack.close()

    def health(self) -> Health:
        """Return the health of camera, loop and board."""
        state: CameraState | None = getattr(self._camera, "state", None)
        judgement = self._ood.judgement()
        board = read_vitals()
        return Health(
            camera=state.condition if state else "",
            reason=state.reason if state else "",
            losses=state.losses if state else 0,
            paused=self.loop.paused,
            dropped=self.loop.dropped,
            ood_quantile=round(judgement.ood_quantile, 3) if judgement and judgement.images else None,
            ood=judgement.ood if judgement and judgement.enough else None,
            temperature_c=board.temperature_c,
            throttled=board.throttled,
        )

    def _open_reporter(self, classifier: Classifier) -> Reporter | None:
        telemetry, device = self._config.telemetry, self._config.device
        if not telemetry.broker:
            return None
        host, port = parse_broker(telemetry.broker)
        settings = ReporterSettings(
            uplink=UplinkSettings(
                host=host,
                port=port,
                site=device.site,
                device=device.name,
                delivery=telemetry.delivery,
                security=Security.from_config(telemetry),
            ),
            window_s=telemetry.window_s,
            privacy=self._config.privacy,
            commands=telemetry.commands,
        )
        limits = SpoolLimits(
            max_bytes=int(telemetry.spool_mb * (1 << 20)), max_days=telemetry.spool_days, sync_s=telemetry.sync_s
        )
        spool = Spool(_spool_folder(Path(device.state)), device=device.name, limits=limits)
        return Reporter(settings, classifier, health=self.health, spool=spool)

    def _reload(self) -> None:
        threading.Thread(target=self._swap_model, name="reload", daemon=True).start()

    def _swap_model(self) -> None:
        self._notifier.reloading()
        try:
            self.loop.swap(open_model(self._config))
        except Exception as error:  # whatever it is, the present model goes on and systemd must not wait
            self._notifier.reloaded()
            self.status.say(f"the model stays as it is: {error}")
            if not isinstance(error, EyasError):
                raise


def _spool_folder(state: Path) -> Path | None:
    """The spool's folder; None without the default state folder, so that a first try leaves nothing behind."""
    return None if str(state) == STATE and not state.is_dir() else state / "spool"


def _pace(loop: LoopSection, camera: CameraSection) -> Pace:
    return Pace(
        fps=loop.fps or None,
        duty=loop.duty,
        max_age_s=loop.max_age_ms / 1000 or None,
        give_up_s=camera.give_up_s or None,
    )


def _open_proven(root: Path, config: Config) -> Classifier:
    model, bundle = config.model, Bundle.open(root)
    runtime, artefact = model.runtime or None, model.artefact or None
    if runtime is None and artefact is None:
        saved = read_selection(Path(config.device.state), bundle)
        if saved is not None:
            runtime, artefact = saved.runtime, saved.artefact
    classifier = Classifier.load(bundle, runtime, artefact, threads=model.threads)
    try:
        check_loaded(classifier, max_latency_ms=model.max_latency_ms or None)
    except BaseException:
        classifier.close()
        raise
    return classifier
