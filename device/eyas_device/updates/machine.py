"""The updater: one look at the repository, and what follows from it, as an explicit machine whose state is on the disk.

    idle ─▶ downloading ─▶ installing ─▶ probation ─▶ committed
                 │              │            └──────▶ rolled back
                 └──────────────┴──▶ refused, failed

Each state is written to `STATE/updates/update.json` before what it stands for begins, so that after a kill or a power
cut at any instruction the next run goes on or begins again, and a release whose installation ends again and again
without a word is refused. The slots are the truth about what is installed: the record only says why.

The model is checked in this process. The agent, if one runs, is then asked to load it: it puts it on probation on real
frames, and rolls back by itself. Nothing here waits for anybody to be told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eyas_device import __version__
from eyas_device.board import board_kind
from eyas_device.bundle import Bundle
from eyas_device.config import Config, UpdateSection
from eyas_device.errors import BundleError, EyasError, RuntimeUnavailable
from eyas_device.runtimes import RUNTIMES, artefact_runtime, load
from eyas_device.runtimes.selection import read_selection
from eyas_device.updates.activate import attempt_key
from eyas_device.updates.fetch import Progress, Staging
from eyas_device.updates.judge import prove
from eyas_device.updates.plan import (
    Device,
    Held,
    Install,
    Keep,
    Plan,
    Refuse,
    Switch,
    decide,
    escape_revoked,
    wanted_target,
)
from eyas_device.updates.progress import UPDATES, WAITS, State, UpdateRecord, read_progress, write_progress
from eyas_device.updates.records import Lock, read_agent, short_reason
from eyas_device.updates.refusals import BusyError, SlowDataError, TrustError, UnreachableError
from eyas_device.updates.release import Channel, Release, UpdateError
from eyas_device.updates.reload import request_reload
from eyas_device.updates.slots import Slots
from eyas_device.updates.trust import Refreshed, TrustedRepository

logger = logging.getLogger(__name__)

_TEMPORARY = (BusyError, UnreachableError, SlowDataError)
"""Troubles of the way to the repository, not of what it says."""

Check = Callable[[Path], object]


class Wanted(NamedTuple):
    """What the repository wants of this device, and what the device makes of it."""

    plan: Plan
    channel: Channel | None = None
    release: Release | None = None
    signed: bytes = b""
    """The release as it was signed."""
    target: str = ""
    key: str = ""
    """What a refusal of the release depends on."""
    revoked: str = ""
    """Why what is current stays although it was revoked; empty if it was not."""


class Updater:
    """Updates the model of one device.

    Args:
        config: The device's configuration.
        url: Repository in place of `update.url`: a folder, for example on a USB stick.
        now: Whether somebody asks for it at this moment: outside of maintenance hours, and although it was refused.
        on_state: Called with each state that begins.
        progress: Called while blobs arrive.
        check: Proves a bundle in its slot; by default `eyas_device.updates.judge.prove`, as an installation by hand.

    """

    def __init__(
        self,
        config: Config,
        *,
        url: str = "",
        now: bool = False,
        on_state: Callable[[UpdateRecord], None] = lambda record: None,
        progress: Progress = lambda done, total: None,
        check: Check | None = None,
    ) -> None:
        if config.model.bundle:
            raise UpdateError(
                f"[model] bundle = {config.model.bundle!r}: this device runs a bundle outside of the slots, which are "
                "what is updated; leave it empty"
            )
        self._config, self._state = config, Path(config.device.state)
        self._section: UpdateSection = msgspec.structs.replace(config.update, url=url or config.update.url)
        if not self._section.url:
            raise UpdateError("[update] url: empty, so there is no repository; set it, or name a folder with --from")
        self._now, self._on_state, self._progress = now, on_state, progress
        self._slots = Slots(self._state)
        self._staging = Staging(self._state / UPDATES, rate_kb=self._section.rate_kb)
        self._check = check or (lambda root: prove(root, config.model, self._state))
        self._record = UpdateRecord()

    def run_once(self) -> UpdateRecord:
        """Go on with an update that is under way, look at the repository once, and do what follows.

        Raises `UpdateError` only if another update runs, or the record cannot be kept; everything else is in the
        record that is returned.
        """
        with self._alone():
            self._begin()
            try:
                with self._repository() as repository:
                    wanted = self._look(repository)
                    self._act(wanted, repository)
            except UpdateError as error:
                self._in_trouble(error)
            return self._record

    def preview(self) -> Plan:
        """What `run_once` would do; nothing is downloaded but metadata. Raises `UpdateError`."""
        with self._alone():
            self._record = read_progress(self._state)
            with self._repository() as repository:
                return self._look(repository).plan

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = self._state / UPDATES
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = Lock.acquire(folder / ".lock")
        except OSError as error:
            raise UpdateError(f"{folder}: cannot be written ({error.strerror})") from None
        if lock is None:
            raise BusyError(f"{folder}: another update runs; wait until it ends")
        with lock:
            yield

    def _repository(self) -> TrustedRepository:
        return TrustedRepository(self._section, self._config.device.site, self._state)

    # --- what is there -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        record = read_progress(self._state)
        self._record = msgspec.structs.replace(record, channel=self._section.channel, group=self._section.group)
        if record.state == "installing" and (held := self._installed()) is not None:
            self._enter("probation", slot=held.slot, interrupted=0)
        if self._record.state in ("probation", "rolled back") and self._reload_was_lost():
            self._activate()
        elif self._record.state == "probation":
            self._judge(looks=True)

    def _installed(self) -> Held | None:
        """The current slot, if it has what the record was about to install."""
        wanted = self._record.manifest_sha256
        return next((one for one in self._held() if one.current and one.manifest_sha256 == wanted), None)

    def _held(self) -> list[Held]:
        return [
            Held(
                slot=state.slot,
                name=state.name,
                version=state.version,
                identity=state.identity,
                manifest_sha256=state.manifest_sha256,
                current=state.current,
                good=state.good,
            )
            for state in self._slots.states()
            if state.identity
        ]

    def _device(self, held: list[Held], refreshed: Refreshed) -> Device:
        running = next((one for one in held if one.current), None)
        model = self._section.model or (running.name if running is not None else "")
        if not model:
            raise UpdateError("no model is installed yet: name the one to follow in [update] model")
        local = time.localtime()
        return Device(
            name=self._config.device.name,
            site=self._config.device.site,
            group=self._section.group,
            model=model,
            board=board_kind(),
            agent=__version__,
            runtimes=self._runtimes(running),
            minute=60 * local.tm_hour + local.tm_min,
            hours=self._section.hours,
            clock=refreshed.clock,
        )

    def _runtimes(self, running: Held | None) -> tuple[str, ...]:
        """Runtimes of artefacts that this device loads, as its configuration, its saved selection and they rank."""
        if self._config.model.runtime:
            return (artefact_runtime(self._config.model.runtime),)
        names = []
        if running is not None:
            with suppress(BundleError):
                saved = read_selection(self._state, Bundle.open(self._slots.folder / running.slot))
                names += [saved.runtime] if saved is not None else []
        for name in RUNTIMES:
            with suppress(RuntimeUnavailable):
                load(name)
                names.append(name)
        return tuple(dict.fromkeys(map(artefact_runtime, names)))

    # --- what is wanted ----------------------------------------------------------------------------------------------

    def _look(self, repository: TrustedRepository) -> Wanted:
        refreshed = repository.refresh()
        for doubt in filter(None, (refreshed.clock, refreshed.frozen)):
            logger.warning("%s", doubt)
        self._record = msgspec.structs.replace(
            self._record, checked=refreshed.checked, clock=refreshed.clock or refreshed.frozen, trouble="", cause=""
        )
        held, policy = self._held(), repository.policy()
        escape = escape_revoked(policy, held)
        if isinstance(escape, Switch):
            return Wanted(escape)
        revoked = escape.reason if escape is not None else ""
        device = self._device(held, refreshed)
        channel = repository.channel(device.model)
        target = wanted_target(channel, device)
        if isinstance(target, Keep) or channel is None:
            keep = escape or (target if isinstance(target, Keep) else Keep(""))
            return Wanted(keep, channel, revoked=revoked)
        release, signed = repository.release(target)
        key = f"{attempt_key(self._config)}:{channel.rollout}"
        plan = decide(release, channel, policy, held, device, self._record, key=key, now=self._now)
        if escape is not None and isinstance(plan, Keep):
            plan = escape
        return Wanted(plan, channel, release, signed, target, key, revoked)

    # --- what follows ------------------------------------------------------------------------------------------------

    def _act(self, wanted: Wanted, repository: TrustedRepository) -> None:
        plan = wanted.plan
        if self._record.state == "probation" and not isinstance(plan, Switch):
            # one at a time: the other slot holds the model that it is compared with
            if wanted.revoked:
                self._enter("probation", "; ".join(filter(None, (self._record.reason, wanted.revoked))))
            self._save()
            return
        if isinstance(plan, Switch):
            self._switch(plan, wanted)
            return
        if isinstance(plan, Install):
            self._install(plan, wanted, repository)
            return
        about = self._about(wanted)
        if isinstance(plan, Refuse):
            self._enter("rolled back" if plan.rolled_back else "refused", plan.reason, **about)
        elif plan.current:
            self._enter("committed", **about, installed=about["identity"])
        else:
            self._enter("idle", plan.reason, **about)
            self._record = msgspec.structs.replace(self._record, wait_s=60.0 * plan.wait_min)
        self._save()

    def _about(self, wanted: Wanted) -> dict[str, str]:
        """The record's fields about a release."""
        release = wanted.release
        return {
            "model": f"{release.model} {release.version}" if release is not None else "",
            "digest": release.identity[:12] if release is not None else "",
            "identity": release.identity if release is not None else "",
            "rollout": wanted.channel.rollout if wanted.channel is not None and release is not None else "",
            "target": wanted.target,
            "key": wanted.key,
        }

    def _install(self, plan: Install, wanted: Wanted, repository: TrustedRepository) -> None:
        same = (self._record.identity, self._record.key) == (plan.release.identity, wanted.key)
        about: dict[str, Any] = self._about(wanted) | {"slot": "", "manifest_sha256": plan.variant.manifest_sha256}
        about |= {"attempts": self._record.attempts + 1} if same else {"attempts": 1, "interrupted": 0}
        self._enter("downloading", **about)
        self._save(required=True)
        try:
            bundle = self._staging.assemble(
                plan.variant,
                repository.fetcher,
                (path for name in ("a", "b") for path in sorted((self._slots.folder / name).rglob("*"))),
                extra_bytes=sum(file.size_bytes for file in plan.variant.files),
                progress=self._progress,
            )
            _check_bundle(bundle, plan.release)
            refreshed = {"refreshed": wanted.channel.rollout} if plan.refresh and wanted.channel is not None else {}
            self._enter("installing", interrupted=self._record.interrupted + 1, **refreshed)
            self._save(required=True)
            slot = self._slots.install(bundle, check=self._check, release=wanted.signed)
        except KeyboardInterrupt:  # asked to stop: no fault of the release
            self._record = msgspec.structs.replace(self._record, interrupted=max(0, self._record.interrupted - 1))
            self._save()
            raise
        except (BundleError, RuntimeUnavailable) as error:
            self._record = self._record.bar("refused", short_reason(error))
            self._save()
            self._staging.clean()
            return
        except UpdateError:
            raise
        except EyasError as error:  # the slots cannot be written
            raise UpdateError(short_reason(error)) from None
        self._enter("probation", slot=slot.name, interrupted=0)
        self._save()
        self._staging.clean()
        self._activate()

    def _switch(self, plan: Switch, wanted: Wanted) -> None:
        held = plan.held
        about = self._about(wanted) | {"slot": held.slot, "manifest_sha256": held.manifest_sha256}
        if plan.revoked:
            about |= self._about_running()
        self._enter("installing", plan.reason, **about)
        self._save()
        try:
            self._slots.roll_back()
        except EyasError as error:
            raise UpdateError(short_reason(error)) from None
        self._enter("rolled back" if plan.revoked else "probation", plan.reason, interrupted=0)
        self._save()
        self._activate()

    def _about_running(self) -> dict[str, str]:
        """The record's fields about what runs: it is what is left, not what is installed."""
        running = next((one for one in self._held() if one.current), None)
        identity = running.identity if running is not None else ""
        return {"model": str(running or ""), "identity": identity, "digest": identity[:12]}

    def _activate(self) -> None:
        """Ask the agent to load the current slot; without one, its next start does."""
        try:
            request_reload(self._state)
        except EyasError as error:
            logger.error("%s", short_reason(error))
        if self._record.state == "probation":
            self._judge()

    def _reload_was_lost(self) -> bool:
        """Whether the agent runs another slot than the current one, which it has not refused: by a kill before it was
        asked.
        """
        agent, linked = read_agent(self._state), self._slots.linked()
        runs_other = agent is not None and linked is not None and agent.slot not in ("", linked)
        return runs_other and not self._slots.refusal(linked or "")

    def _judge(self, *, looks: bool = False) -> None:
        """Take over what the agent found out about the model on probation.

        Where that is nothing yet and the repository is looked at next, nobody is told before what it says is known.
        """
        record, slots = self._record, self._slots
        held = next((one for one in self._held() if one.slot == record.slot), None)
        verdict = slots.verdict(record.slot)
        if held is None or held.manifest_sha256 != record.manifest_sha256:
            self._enter("idle", f"slot {record.slot} was overwritten during the probation")
        elif verdict is not None and verdict.state == "failed":
            self._record = record.bar("rolled back", verdict.reason)
        elif refusal := slots.refusal(record.slot):
            with suppress(EyasError):
                if slots.linked() == record.slot:
                    slots.roll_back()
            self._record = record.bar("rolled back", refusal)
        elif not held.current:
            self._enter("rolled back", "switched back by hand", installed=record.identity)
        elif (verdict is not None and verdict.state == "passed") or slots.release(record.slot) is None:
            self._enter("committed", verdict.reason if verdict is not None else "", installed=record.identity)
        else:
            agent = read_agent(self._state)
            waits = "" if agent is not None and agent.slot == record.slot else WAITS
            self._enter("probation", waits)
            if looks:
                return
        self._save()

    def _in_trouble(self, error: UpdateError) -> None:
        """Say what is wrong: the state changes if it is about an update that is under way, or about trust."""
        reason = short_reason(error)
        logger.error("%s", reason)
        cause = error.reason if isinstance(error, TrustError) else ""
        self._record = msgspec.structs.replace(self._record, trouble=reason, cause=cause)
        temporary = not isinstance(error, TrustError) or isinstance(error, _TEMPORARY)
        if self._record.state in ("downloading", "installing"):
            self._enter("failed" if temporary else "refused", reason, interrupted=0)
        elif not temporary and self._record.state != "probation":
            self._enter("refused", reason, model="", digest="", identity="", rollout="", target="", key="")
        elif self._record.state in ("idle", "failed"):
            self._enter(self._record.state, reason)
        self._save()

    # --- the record --------------------------------------------------------------------------------------------------

    def _enter(self, state: State, reason: str = "", **changes: object) -> None:
        self._record = self._record.entered(state, reason, **changes)

    def _save(self, *, required: bool = False) -> None:
        """Write the record before its state is acted on; unless it is `required`, a disk that fails stops nothing."""
        try:
            write_progress(self._state, self._record)
        except OSError as error:
            problem = f"{self._state / UPDATES}: {error.strerror}; free some space, or check the disk"
            if required:
                raise UpdateError(problem) from None
            logger.warning("%s", problem)
        self._report()

    def _report(self) -> None:
        self._on_state(self._record)


def _check_bundle(root: Path, release: Release) -> None:
    """Raise `BundleError` unless a bundle is the one that a release names."""
    bundle = Bundle.open(root)
    manifest = bundle.manifest
    if (manifest.name, manifest.version) != (release.model, release.version):
        actual = f"{manifest.name} {manifest.version}"
        raise BundleError(f"the release of {release.model} {release.version} holds {actual}: publish it again")
    if bundle.identity != release.identity:
        raise BundleError(f"the release of {manifest.name} {manifest.version} holds another bundle than it names")
