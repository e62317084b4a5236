"""Which model an agent runs: the configured bundle, or else the best slot whose bundle is good here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device import __version__
from eyas_device.bundle import read_manifest
from eyas_device.config import Config
from eyas_device.errors import BundleError, CheckFailed, EyasError
from eyas_device.predict import Classifier
from eyas_device.runtimes.selection import library_versions
from eyas_device.support.closing import Closing
from eyas_device.updates.judge import judge
from eyas_device.updates.records import MAX_ATTEMPTS, AgentRecord, Lock, short_reason
from eyas_device.updates.slots import Slots

OnLoad = Callable[[str], None]
"""Called with the runtime's name before each load; empty if it is not known yet."""


class ActiveModel(Closing):
    """A model that is good here, and what was refused in its favour; holds its slot until it is closed."""

    def __init__(self, classifier: Classifier, record: AgentRecord, lock: Lock | None = None) -> None:
        self.classifier = classifier
        self.record = record
        self._lock = lock

    def release(self) -> None:
        """Let installations write to the slot again; the model itself belongs to whoever runs it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close(self) -> None:
        """Free the model and release the slot."""
        self.classifier.close()
        self.release()


def open_model(config: Config, *, counted: bool = False, on_load: OnLoad = lambda _: None) -> ActiveModel:
    """Open a model that is good on this device.

    It comes from `model.bundle`, or else from the current slot, or from the other one if the current is refused.

    Args:
        config: The device's configuration.
        counted: Count the attempt before loading, and remember refusals; the caller reports how it ended.
        on_load: Called before each load.

    Raises:
        BundleError: None is good (`CheckFailed` if predictions differ), or there is none.
        RuntimeUnavailable: No runtime for the bundle works here.

    """
    state = Path(config.device.state)
    if config.model.bundle:
        judged = judge(Path(config.model.bundle), config.model, state, on_load=on_load)
        return ActiveModel(judged.classifier, _record(judged.classifier, "", judged.selection))
    return _SlotOpener(config, Slots(state), counted, on_load).open()


def open_slot(config: Config, slots: Slots, name: str) -> ActiveModel:
    """Open the model of one slot, whichever is the current one; no attempt is counted. Raises like `open_model`."""
    lock: Lock | None = None
    with suppress(OSError):  # a disk that takes no lock file keeps no model from running
        lock = slots.hold(name)
    try:
        judged = judge(slots.folder / name, config.model, slots.state)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return ActiveModel(judged.classifier, _record(judged.classifier, name, judged.selection), lock)


def attempt_key(config: Config) -> str:
    """Identity of what an attempt depends on besides the bundle: settings, library versions and the agent's version."""
    parts = (msgspec.to_builtins(config.model), library_versions(), __version__)
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:16]


class _SlotOpener:
    """Tries the slots one after the other."""

    def __init__(self, config: Config, slots: Slots, counted: bool, on_load: OnLoad) -> None:
        self._config, self._slots, self._counted, self._on_load = config, slots, counted, on_load
        self._key = attempt_key(config)
        self._errors: dict[str, Exception] = {}

    def open(self) -> ActiveModel:
        slots = self._slots
        names = slots.candidates(self._key)
        if not names:
            raise BundleError(
                f"{slots.folder}: no good slot yet; fill one with `eyas-device install BUNDLE` or `eyas flash`"
            )
        wanted = slots.linked() or names[0]
        if self._counted and wanted in names[1:]:
            self._give_up(wanted)
        for name in names:
            opened = self._try(name, wanted)
            if opened is not None:
                return opened
        raise self._error()

    def _try(self, name: str, wanted: str) -> ActiveModel | None:
        slots = self._slots
        lock: Lock | None = None
        with suppress(OSError):  # a disk that takes no lock file keeps no model from running
            lock = slots.hold(name)
            if lock is None:
                self._errors[name] = BundleError(f"{slots.folder / name}: is being written")
                return None
        if self._counted:
            slots.count_attempt(name, self._key)
        try:
            self._on_load("")
            judged = judge(
                slots.folder / name,
                self._config.model,
                slots.state,
                on_load=lambda runtime: self._before_load(name, runtime),
                last=slots.deadly_runtimes(name, self._key),
            )
        except BaseException as error:
            if lock is not None:
                lock.close()
            if not isinstance(error, Exception):
                raise
            self._errors[name] = error  # a camera never goes dark because of one bad slot
            if self._counted:
                slots.refuse(name, short_reason(error))
                slots.note_runtime(name, self._key, "")
            return None
        if self._counted:
            slots.accept(name)
        record = _record(judged.classifier, name, judged.selection)
        if name != wanted:
            record = msgspec.structs.replace(
                record, refused_model=self._model_in(wanted), refused_reason=self._reason(wanted)
            )
        return ActiveModel(judged.classifier, record, lock)

    def _before_load(self, name: str, runtime: str) -> None:
        if self._counted:
            self._slots.note_runtime(name, self._key, runtime)
        self._on_load(runtime)

    def _give_up(self, name: str) -> None:
        """Say why a slot is not tried first any more, unless that is known better."""
        verdict = self._slots.verdict(name)
        if self._slots.refusal(name):
            return
        if verdict is not None and verdict.state == "failed":
            self._slots.refuse(name, f"failed on probation: {verdict.reason}")
            return
        count = self._slots.attempts(name)
        self._slots.refuse(name, f"{count} attempts to run it ended before it was healthy ({MAX_ATTEMPTS} count)")

    def _reason(self, name: str) -> str:
        error = self._errors.get(name)
        return short_reason(error) if error else self._slots.refusal(name) or self._slots.problem(name)

    def _model_in(self, name: str) -> str:
        with suppress(BundleError, OSError):
            manifest = read_manifest(self._slots.folder / name)
            return f"{manifest.name} {manifest.version}"
        return f"slot {name}"

    def _error(self) -> Exception:
        errors = list(self._errors.values())
        if len(errors) == 1 and isinstance(errors[0], EyasError):
            return errors[0]
        failed = any(isinstance(error, CheckFailed) for error in errors)
        text = "; ".join(f"slot {name}: {short_reason(error)}" for name, error in self._errors.items())
        return (CheckFailed if failed else BundleError)(f"{self._slots.folder}: no slot is good here: {text}")


def _record(classifier: Classifier, slot: str, selection: str) -> AgentRecord:
    manifest, root = classifier.bundle.manifest, classifier.bundle.root
    return AgentRecord(
        slot=slot,
        bundle=str(root),
        model=f"{manifest.name} {manifest.version}",
        manifest_sha256=classifier.bundle.identity,
        artefact=classifier.artefact.name,
        runtime=f"{classifier.runtime.name} {classifier.runtime.version}",
        selection=selection,
    )
