"""Root's side of an update of the agent: verified again, built beside, proven, switched, watched, or back.

    /opt/eyas/venv-HASH           an environment; `venv` is a link to the one in use, as `eyas flash` leaves it
    /var/lib/eyas-agent/          root's own: trusted metadata, the wheels, and how far the update is

Root reads the folder that the service's user collected (`eyas_device.updates.agent_mirror`) as if a stranger had sent
it: every signature is checked from the pinned root on, every wheel is copied and hashed, and nothing of the user's is
executed. The new environment runs its golden check and its doctor as the service's user before the switch. After it,
the service has to start, report that it is ready, stay up, and run the model that it ran before; else the link goes
back.
A power cut after the switch is noticed at the next boot, where the same is asked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from eyas_device import __version__
from eyas_device.board import board_kind
from eyas_device.config import SERVICE_USER, Config
from eyas_device.updates.agent_mirror import MIRROR
from eyas_device.updates.environment import BUILD, LINK, UNPACK
from eyas_device.updates.fetch import Staging
from eyas_device.updates.plan import Device, Held, Install, Keep, Refuse, decide, wanted_target
from eyas_device.updates.progress import ROOT_STATE, UPDATES, State, UpdateRecord, read_record_of, write_progress
from eyas_device.updates.records import Lock, read_agent, short_reason
from eyas_device.updates.refusals import BusyError
from eyas_device.updates.release import AGENT, Channel, Policy, Release, UpdateError, Variant
from eyas_device.updates.trust import TrustedRepository

OPT = Path("/opt/eyas")
SETTLE_S = 20.0
"""How long a service has to stay up on a new agent."""
_DOCTORS = 4
"""So often a check has to be red that was green for the present agent: on a busy board it may be late once or twice."""
_BUILD_S, _CHECK_S, _START_S, _COMMAND_S = 1800.0, 1800.0, 660.0, 60.0


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def why(self) -> str:
        """The last line of what it complained about."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


class System(Protocol):
    """What an update of the agent asks of the machine."""

    def as_user(self, words: Sequence[str], timeout_s: float) -> Done:
        """Run a command as the service's user."""
        ...

    def restart(self) -> str:
        """Restart the service; why it is not ready, or empty."""
        ...

    def problem(self) -> str:
        """Why the service does not stay up, or empty; takes `SETTLE_S`."""
        ...


class Systemd:
    """The machine's own system."""

    def as_user(self, words: Sequence[str], timeout_s: float) -> Done:
        """Run a command as the service's user."""
        return _run(words, timeout_s, user=pwd.getpwnam(SERVICE_USER))

    def restart(self) -> str:
        """Restart the service and the further cameras; why it is not ready, or empty."""
        done = _run(["systemctl", "restart", "eyas-device"], _START_S)
        _run(["systemctl", "try-restart", "eyas-device@*.service"], _START_S)
        _run(
            ["systemctl", "try-restart", "--no-block", "eyas-device-update", "eyas-device-update@*.service"], _COMMAND_S
        )
        return f"the service does not start: {done.why}" if done.code else ""

    def problem(self) -> str:
        """Why the service does not stay up, or empty; takes `SETTLE_S`."""
        count = ["systemctl", "show", "--property=NRestarts", "--value", "eyas-device"]
        before = _run(count, _COMMAND_S).out
        time.sleep(SETTLE_S)
        active = _run(["systemctl", "is-active", "eyas-device"], _COMMAND_S).code == 0
        return "" if active and _run(count, _COMMAND_S).out == before else "the service does not stay up"


class AgentUpdateRecord(UpdateRecord, frozen=True, kw_only=True):
    """How far the update is; the environments beside what an update of a model records."""

    environment: str = ""
    """Name of the new environment."""
    previous: str = ""
    """Name of the environment before."""
    runs: str = ""
    """`name version` of the model that ran before."""


class AgentUpdater:
    """Updates the agent of one device, as root.

    Args:
        config: The device's configuration.
        config_path: Its file, for the new agent's checks.
        opt: Folder of the environments.
        state: Root's own folder.
        system: The machine.

    """

    def __init__(
        self,
        config: Config,
        config_path: Path,
        *,
        opt: Path = OPT,
        state: Path = ROOT_STATE,
        system: System | None = None,
    ) -> None:
        self._config, self._config_path, self._opt, self._state = config, config_path, opt, state
        self._system = system or Systemd()
        self._device_state = Path(config.device.state)
        self._record = AgentUpdateRecord()

    def run_once(self) -> AgentUpdateRecord:
        """Finish what a power cut interrupted, and install what the copy of the repository wants, if it is new."""
        self._state.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = Lock.acquire(self._state / ".lock")
        if lock is None:
            raise BusyError(f"{self._state}: another update of the agent runs")
        with lock:
            self._record = read_record_of(self._state, AgentUpdateRecord)
            if self._record.state == "probation" and self._linked() == self._record.environment:
                self._judge()
            try:
                self._look()
            except UpdateError as error:
                self._enter("failed" if self._record.unfinished else self._record.state, short_reason(error))
            return self._record

    def _look(self) -> None:
        mirror = self._device_state / UPDATES / MIRROR
        if not (mirror / "metadata").is_dir():
            return
        section = msgspec.structs.replace(self._config.update, url=str(mirror))
        with TrustedRepository(section, self._config.device.site, self._state) as repository:
            refreshed = repository.refresh()
            channel = repository.channel(AGENT)
            target = wanted_target(channel, agent_device(self._config))
            if isinstance(target, Keep) or channel is None:
                return
            self._record = msgspec.structs.replace(
                self._record, checked=refreshed.checked, clock=refreshed.clock or refreshed.frozen
            )
            release, _ = repository.release(target)
            plan = decide_agent(release, channel, repository.policy(), self._config, self._record)
            if isinstance(plan, Install):
                self._install(plan.release, plan.variant, channel, repository)
            elif isinstance(plan, Refuse):
                self._about(release, channel)
                self._enter("rolled back" if plan.rolled_back else "refused", plan.reason)

    def _about(self, release: Release, channel: Channel) -> None:
        self._record = msgspec.structs.replace(
            self._record,
            model=f"{release.model} {release.version}",
            identity=release.identity,
            digest=release.identity[:12],
            rollout=channel.rollout,
            channel=self._config.update.channel,
            group=self._config.update.group,
            key=agent_key(channel),
            attempts=self._record.attempts + 1 if self._record.identity == release.identity else 1,
            interrupted=self._record.interrupted if self._record.identity == release.identity else 0,
        )

    def _install(self, release: Release, variant: Variant, channel: Channel, repository: TrustedRepository) -> None:
        self._about(release, channel)
        self._enter("installing", interrupted=self._record.interrupted + 1, required=True)
        staging = Staging(self._state / UPDATES)
        wheels = staging.assemble(variant, repository.fetcher)
        previous, before = self._opt / "venv", self._linked()
        if not before:
            raise UpdateError(f"{previous}: not an environment of `eyas flash`, so it cannot be exchanged")
        name = self._build(wheels, [file.sha256 for file in variant.files], previous)
        staging.clean()
        if problem := self._proof(self._opt / name, previous):
            self._bar("refused", problem)
            return
        agent = read_agent(self._device_state)
        runs = agent.model if agent is not None else ""
        self._record = msgspec.structs.replace(self._record, environment=name, previous=before, runs=runs)
        self._enter("probation", interrupted=0, required=True)
        self._link(name)
        problem = self._system.restart()
        if problem:
            self._go_back(problem)
        else:
            self._judge()

    def _build(self, bundle: Path, digests: Sequence[str], previous: Path) -> str:
        """Build the environment, if it is not there, and return its name. Raises `UpdateError`."""
        settings = (previous / "pyvenv.cfg").read_text(encoding="utf-8")
        site = "--system-site-packages" if "include-system-site-packages = true" in settings else ""
        python = os.path.realpath(sys.executable)
        digest = hashlib.sha256("\n".join([*sorted(digests), python, platform.python_version(), site]).encode())
        name = f"venv-{digest.hexdigest()[:12]}"
        if (self._opt / name / "eyas.stamp").exists():
            return name
        files = bundle.parent / "environment"
        files.mkdir(exist_ok=True)
        (files / "wheels").unlink(missing_ok=True)
        (files / "wheels").symlink_to(bundle)
        (files / "unpack.py").write_bytes(Path(UNPACK).read_bytes())
        arguments = [str(self._opt / name), python, str(files), site, "", "unpack"]
        done = _run(["sh", "-euc", BUILD, "sh", *arguments], _BUILD_S)
        if done.code:
            raise UpdateError(f"the agent's environment cannot be built: {done.why}")
        return name

    def _proof(self, environment: Path, previous: Path) -> str:
        """Why the new agent is not good here, by its own golden check and doctor; empty if it is."""
        slot = self._device_state / "slots" / "current"  # whatever it leads to, root does not look at it
        config = ["--config", str(self._config_path)]
        if slot.is_symlink():
            words = [str(environment / "bin/eyas-device"), "check", str(slot), *config]
            done = self._system.as_user(words, _CHECK_S)
            if done.code:
                return f"the model fails its golden check on the new agent: {done.why}"
        doctors = [[str(one / "bin/eyas-device"), "doctor", "--json", *config] for one in (environment, previous)]
        worse: set[str] | None = None
        for _ in range(_DOCTORS):
            found, before = (_findings(self._system.as_user(words, _CHECK_S).out) for words in doctors)
            if found is None:
                return "the new agent's doctor says nothing that can be read"
            red = found - (before or set())
            worse = red if worse is None else worse & red
            if not worse:
                return ""
        return f"the new agent's doctor is red where the present one's is not: {', '.join(sorted(worse or ()))}"

    def _judge(self) -> None:
        """Commit the new agent if the service stays up on it with its model, else go back."""
        problem = self._system.problem() or self._wrong_model()
        if problem:
            self._go_back(problem)
            return
        self._enter("committed", installed=self._record.identity)
        self._remove_others()

    def _wrong_model(self) -> str:
        agent = read_agent(self._device_state)
        if agent is None or not self._record.runs or agent.model == self._record.runs:
            return ""
        return f"it runs {agent.model or 'no model'} in place of {self._record.runs}: {agent.refused_reason}"

    def _go_back(self, problem: str) -> None:
        if self._record.previous:
            self._link(self._record.previous)
            remaining = self._system.restart()
            problem += f"; back on the earlier agent, {remaining}" if remaining else ""
        self._bar("rolled back", problem)

    def _link(self, name: str) -> None:
        done = _run(["sh", "-euc", LINK, "sh", str(self._opt), name], _COMMAND_S)
        if done.code:
            raise UpdateError(f"{self._opt / 'venv'}: cannot be switched: {done.why}")
        os.sync()

    def _linked(self) -> str:
        """Name of the environment in use."""
        try:
            return (self._opt / "venv").readlink().name
        except OSError:
            return ""

    def _remove_others(self) -> None:
        kept = (self._record.environment, self._record.previous)
        others = [str(path) for path in self._opt.glob("venv-*") if path.name not in kept]
        if others:
            _run(["rm", "-rf", "--", *others], _BUILD_S)

    def _bar(self, state: State, reason: str) -> None:
        self._record = self._record.bar(state, reason)
        self._save()

    def _enter(self, state: State, reason: str = "", *, required: bool = False, **changes: Any) -> None:
        self._record = self._record.entered(state, reason, **changes)
        self._save(required=required)

    def _save(self, *, required: bool = False) -> None:
        try:
            write_progress(self._state, self._record)
        except OSError as error:
            if required:
                raise UpdateError(f"{self._state}: {error.strerror}; the agent stays as it is") from None


def agent_device(config: Config) -> Device:
    """What a decision about an agent's release needs to know of the device."""
    version = sys.version_info
    local = time.localtime()
    return Device(
        name=config.device.name,
        site=config.device.site,
        group=config.update.group,
        model=AGENT,
        board=board_kind(),
        agent=__version__,
        runtimes=(f"cp{version.major}{version.minor}-{platform.machine()}",),
        minute=60 * local.tm_hour + local.tm_min,
        hours=config.update.hours,
    )


def agent_key(channel: Channel) -> str:
    """What the refusal of an agent's release depends on."""
    return f"{__version__}:{channel.rollout}"


def decide_agent(
    release: Release, channel: Channel, policy: Policy, config: Config, record: UpdateRecord
) -> Keep | Refuse | Install:
    """Decide about an agent's release, as about a model's; what runs is known by its version."""
    identity = release.identity if release.version == __version__ else ""
    running = Held(slot="", name=AGENT, version=__version__, identity=identity, current=True)
    plan = decide(release, channel, policy, [running], agent_device(config), record, key=agent_key(channel))
    return plan if isinstance(plan, (Keep, Refuse, Install)) else Keep("it runs already", current=True)


class _Finding(msgspec.Struct, frozen=True):
    check: str = ""
    status: str = ""


class _Doctor(msgspec.Struct, frozen=True):
    findings: tuple[_Finding, ...]


def _findings(said: str) -> set[str] | None:
    """The checks that are red, by what `doctor --json` prints; None if that cannot be read."""
    try:
        findings = msgspec.json.decode(said, type=_Doctor).findings
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
    return {one.check for one in findings if one.status == "red"}


def _run(words: Sequence[str], timeout_s: float, *, user: pwd.struct_passwd | None = None) -> Done:
    """Run a command; code 1 if it cannot be run, or takes too long."""
    groups = None if user is None else os.getgrouplist(user.pw_name, user.pw_gid)
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            cwd="/",
            user=None if user is None else user.pw_uid,
            group=None if user is None else user.pw_gid,
            extra_groups=groups,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Done(1, err=str(getattr(error, "strerror", None) or error))
    return Done(done.returncode, done.stdout, done.stderr)
