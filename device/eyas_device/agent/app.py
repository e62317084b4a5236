"""The device's agent: a configuration becomes a camera, a proven model, listeners and the loop between them."""

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
from eyas_device.agent.reporter import Reporter
from eyas_device.agent.signals import Signals
from eyas_device.agent.stats import LoopStats
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
from eyas_device.telemetry.messages import Health
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.telemetry.tls import Security
from eyas_device.updates.golden import prove
from eyas_device.updates.slots import Slots


def configured(path: Path | None, **over: dict[str, Any]) -> Config:
    """The configuration file's values, where there is one, under those of the command line: section -> key -> value.

    Values of None are not given. Raises `ConfigError` for a faulty file, and `CameraSpecError` if nothing names a
    camera.
    """
    config = read_config(path) if path else Config()
    for name, section in over.items():
        values = {key: value for key, value in section.items() if value is not None}
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    if not config.camera.source:
        raise CameraSpecError("no camera: give --camera SPEC, or camera.source in the configuration")
    return config


def settle(model: ModelSection) -> None:
    """Keep the process to the cores and threads that it was given. Raises `ConfigError` for cores that are not there.

    To be called before a runtime or OpenCV starts threads of its own.
    """
    if model.affinity:
        try:
            os.sched_setaffinity(0, model.affinity)
        except OSError as error:
            there = sorted(os.sched_getaffinity(0))
            raise ConfigError(
                f"model.affinity {list(model.affinity)}: {error.strerror}; this process may use {there}"
            ) from None
    silence_opencv()
    import cv2

    cv2.setNumThreads(model.threads)


def open_source(camera: CameraSection, *, loop: bool = False) -> Camera:
    """The camera that answers are wanted for: a live one is watched and opened again for ever, a finite one plays once.

    Raises `CameraSpecError` for a mistaken specification and `CameraError` for a finite source that does not open.
    """

    def opened() -> Camera:
        return open_camera(camera.source, loop=loop, timeout_s=camera.timeout_s)

    if not is_live(camera.source):
        return opened()
    return ReconnectingCamera(opened, frozen_s=camera.frozen_s, black_level=camera.black_level)


def open_model(config: Config) -> Classifier:
    """A classifier that has passed its golden check here.

    From `model.bundle`, or from the slots: the current one or, should it not answer as it did on the host, the other.
    Raises `BundleError` (`CheckFailed`) if none does, and `RuntimeUnavailable` without a runtime for it.
    """
    if config.model.bundle:
        return _open_proven(Path(config.model.bundle), config)
    slots = Slots(Path(config.device.state))
    good = [Path(state.path) for state in sorted(slots.states(), key=lambda s: not s.current) if state.good]
    if not good:
        raise BundleError(f"{slots.folder}: no good slot yet; `eyas-device install BUNDLE` or `eyas flash` fills one")
    for path in good[:-1]:
        try:
            return _open_proven(path, config)
        except EyasError:
            continue  # a camera never goes dark because of one bad slot
    return _open_proven(good[-1], config)


class Agent(Closing):
    """A camera, a proven model, and the loop between them, made from a configuration.

    Signals are heard until it is closed: see `eyas_device.agent.signals.Signals`. SIGHUP proves the model that the
    configuration names now, in a thread beside the loop, and lets it answer from the next frame on; if it does not
    pass, the present one stays.
    """

    def __init__(
        self,
        config: Config,
        people: TextIO,
        *,
        listeners: Callable[[Classifier], Sequence[Listener]] = lambda _: (),
        loop: bool = False,
    ) -> None:
        self._config = config
        with ExitStack() as stack:
            signals = stack.enter_context(Signals())
            settle(config.model)
            self._camera = stack.enter_context(open_source(config.camera, loop=loop))
            classifier = open_model(config)
            self.loop = Loop(classifier, self._camera, pace=_pace(config.loop, config.camera))
            stack.callback(self._free_model)
            self._ood = OodDetector(classifier.bundle)
            self.link = self._open_link(classifier)
            if self.link is not None:
                stack.enter_context(self.link)
                self._ood.on_descriptor.append(self.link.look)
            self.status = StatusLine(people, LoopStats(), self.link)
            if self.link is not None and self._spool_folder() is None:
                self.status.say(f"{config.device.state} is not there: messages wait in memory only (see device.state)")
            self.loop.listeners += [*listeners(classifier), self.status, self._ood]
            self.loop.listeners += [self.link] if self.link is not None else []
            self._notifier = stack.enter_context(Notifier())
            self.loop.listeners.append(self._notifier)
            signals.guard(self.loop, reload=self._reload)
            self._stack = stack.pop_all()

    def run(self, *, frames: int | None = None) -> None:
        """Answer until the source ends, `frames` were answered, or a signal came; raises what `Loop.run` raises."""
        self.loop.run(frames=frames)

    def close(self) -> None:
        """Say farewell, free camera and model, and let go of the signals."""
        self._stack.close()

    def vitals(self) -> Health:
        """How camera, loop and board feel now."""
        state: CameraState | None = getattr(self._camera, "state", None)
        judged = self._ood.judgement()
        board = read_vitals()
        return Health(
            camera=state.condition if state else "",
            reason=state.reason if state else "",
            losses=state.losses if state else 0,
            paused=self.loop.paused,
            dropped=self.loop.dropped,
            ood_quantile=round(judged.ood_quantile, 3) if judged and judged.images else None,
            ood=judged.ood if judged and judged.enough else None,
            temperature_c=board.temperature_c,
            throttled=board.throttled,
        )

    def _open_link(self, classifier: Classifier) -> Reporter | None:
        telemetry, device = self._config.telemetry, self._config.device
        if not telemetry.broker:
            return None
        host, port = parse_broker(telemetry.broker)
        return Reporter(
            host,
            port,
            site=device.site,
            device=device.name,
            classifier=classifier,
            window_s=telemetry.window_s,
            vitals=self.vitals,
            spool=Spool(
                self._spool_folder(),
                device=device.name,
                most_bytes=int(telemetry.spool_mb * (1 << 20)),
                most_days=telemetry.spool_days,
                sync_s=telemetry.sync_s,
            ),
            delivery=telemetry.delivery,
            security=Security.configured(telemetry),
            privacy=self._config.privacy,
            handlers=handlers(self._config, self.loop, self._the_link),
            commands=telemetry.commands,
        )

    def _spool_folder(self) -> Path | None:
        """Where messages wait; None where nobody set up the default folder: a first try leaves nothing behind."""
        state = Path(self._config.device.state)
        return None if str(state) == STATE and not state.is_dir() else state / "spool"

    def _the_link(self) -> Reporter:
        assert self.link is not None, "commands come only over the link"
        return self.link

    def _free_model(self) -> None:
        self.loop.classifier.close()

    def _reload(self) -> None:
        threading.Thread(target=self._take_over, name="reload", daemon=True).start()

    def _take_over(self) -> None:
        self._notifier.reloading()
        try:
            self.loop.swap(open_model(self._config))
        except Exception as error:  # whatever it is, the present model goes on and systemd must not wait
            self._notifier.reloaded()
            self.status.say(f"the model stays as it is: {error}")
            if not isinstance(error, EyasError):
                raise


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
        choice = read_selection(Path(config.device.state), bundle)
        if choice is not None:
            runtime, artefact = choice.runtime, choice.artefact
    classifier = Classifier.load(bundle, runtime, artefact, threads=model.threads)
    try:
        prove(classifier, max_latency_ms=model.max_latency_ms or None)
    except BaseException:
        classifier.close()
        raise
    return classifier
