"""The steps of a flash on one device. Each is idempotent and returns whether it changed anything."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from eyas_device.agent.service import AGENT_UNITS, RULES, UPDATER
from eyas_device.bundle import sha256
from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.updates.environment import BUILD, LINK, UNPACK
from eyas_device.updates.slots import SlotState
from eyas_host.fleet.broker.enroll import CREDENTIALS, ROOT
from eyas_host.fleet.connect.preflight import DeviceFacts, sudo_prefix
from eyas_host.fleet.connect.ssh import CommandResult, FleetError, Remote
from eyas_host.fleet.connect.wheels import constraints, fetch
from eyas_host.fleet.deploy.environment import build_arguments
from eyas_host.fleet.deploy.health import SERVICE, START_S, Health
from eyas_host.fleet.deploy.journal import Journal
from eyas_host.fleet.deploy.plan import InstallPlan
from eyas_host.fleet.deploy.report import Report
from eyas_host.fleet.deploy.unchanged import see_unchanged

_PIP_S = 1800
_CHECK_S = 2400
"""Time limit of the golden check: a runtime may build an engine for this device first."""

_USE_RULES = """
command -v udevadm >/dev/null || exit 0
udevadm control --reload || true
udevadm trigger --action=change --subsystem-match=dma_heap || true
udevadm trigger --action=change --sysname-match=vchiq --sysname-match=vcio || true
"""
_UPDATER = "eyas-device-update"
_FORGET = 'rm -f "$1"; rm -rf "$2"'
_CLEAN_UP = 'cd "$1"; for d in venv-*; do case "$d" in "$2"|"$3") ;; *) rm -rf "$d" ;; esac; done'


class _Installed(msgspec.Struct, frozen=True):
    """What `eyas-device install --json` prints beside the slot."""

    notices: tuple[str, ...] = ()


class Installer:
    """Installs a plan on one device, step by step."""

    def __init__(self, remote: Remote, facts: DeviceFacts, plan: InstallPlan, say: Callable[[str], None]) -> None:
        self.remote, self.facts, self.plan, self._say = remote, facts, plan, say
        self.serves = plan.serves(facts)
        self.sent_bytes, self.dependency_bytes = 0, 0
        self._become = sudo_prefix(facts, plan.layout, service=self.serves)
        self._user = plan.unit_user() if self.serves else ""
        self._incoming = f"{plan.layout.opt}/incoming"
        self._unfinished = f"{plan.layout.opt}/.flashing"
        self._environment = plan.environment(facts)
        self._before = Journal(self._script, f"{plan.layout.opt}/.before")
        self._rolls_back_slot = False
        self._health = Health(plan, facts, agent=self._agent, script=self._script, slots=self._states)
        self.slot: SlotState | None = None
        """Current slot, None if unknown."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Report a step and how long it took."""
        started = time.monotonic()
        yield
        self._say(f"{self.remote.target}: {name} ({time.monotonic() - started:.1f} s)")

    def see_unchanged(self) -> Report | None:
        """What the agent says, if the device has and runs all that is planned; None if there is something to do."""
        if self.facts.unfinished or self.changes_environment or self._environment not in ("", *self.facts.environments):
            return None
        if self._new_config or self._new_credentials or self._new_unit or self._new_updater or self._new_rules:
            return None
        if self._new_agent_units:
            return None
        return see_unchanged(self.plan, self.facts, self._script)

    def prepare(self, folder: Path) -> None:
        """Create the remote folders, collect everything but the bundle in the local `folder`, and send it."""
        plan = self.plan
        if plan.config is not None and self._new_config:
            shutil.copy(plan.config, folder / "device.toml")
        if plan.credentials is not None and self._new_credentials:
            (folder / "credentials").mkdir()
            for file in _credential_modes(plan.credentials):
                shutil.copy(plan.credentials / file, folder / "credentials")
        if plan.unit is not None and self._new_unit:
            shutil.copy(plan.unit, folder / "unit")
        if self._new_updater:
            shutil.copy(UPDATER, folder / "updater")
        for unit in self._new_agent_units:
            shutil.copy(unit, folder)
        if self._new_rules:
            shutil.copy(RULES, folder / "rules")
        if plan.wheel is not None and self._environment not in self.facts.environments:
            wheels = folder / "wheels"
            wheels.mkdir()
            shutil.copy(constraints(self.facts), folder / "constraints.txt")
            if plan.offline:
                shutil.copy(UNPACK, folder / "unpack.py")
                with self.step(f"wheels {'downloaded here' if plan.wheel_dir is None else f'from {plan.wheel_dir}'}"):
                    fetch(wheels, plan.wheel, self.facts, plan.extras, plan.wheel_dir)
            elif plan.wheel_dir is not None:
                for wheel in plan.wheel_dir.glob("*.whl"):
                    shutil.copy(wheel, wheels)
            shutil.copy(plan.wheel, wheels)
            others = (path for path in wheels.iterdir() if path.name != plan.wheel.name)
            self.dependency_bytes = sum(path.stat().st_size for path in others)
        quoted = shlex.join([f"{self._incoming}/bundle", plan.layout.state])
        script = f"umask 022; mkdir -p {quoted}; mkdir -p -m 700 {shlex.quote(f'{self._incoming}/files')}"
        script += f"; : > {shlex.quote(self._unfinished)}"
        if self.serves:
            user, state = shlex.quote(self._user), shlex.quote(plan.layout.state)
            script += f"""
            id -u {user} >/dev/null 2>&1 ||
              useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}
            [ "$(stat -c %U {state})" = {user} ] || chown -R {user}: {state}
            """
        self.remote.sh(script, become=self._become)
        self._check(self._before.begin(resumed=self.facts.unfinished == "yes"), "the device's state cannot be noted")
        if any(folder.iterdir()):
            with self.step("files sent"):
                self.sent_bytes += self.remote.send(
                    folder, f"{self._incoming}/files", become=self._become, private=True
                )

    def make_environment(self) -> None:
        """Build the virtual environment if it is missing; it is not used before `use_environment`."""
        if not self._environment or self._environment in self.facts.environments:
            return
        arguments = build_arguments(self.plan, self.facts, self._incoming)
        self._say(f"{self.remote.target}: building the environment; this takes a minute or more on a small board")
        with self.step(f"environment {self._environment} built"):
            result = self._script(BUILD, *arguments, timeout_s=_PIP_S)
            fix = "" if self.plan.offline else "; for a device without a network use --offline"
            self._check(result, f"the environment cannot be built{fix}")

    def install(self, *, verify: bool) -> bool:
        """Install the bundle into the inactive slot, verify it there and switch to it.

        With `verify`, a bundle that is already current is verified again. Raises `FleetError` if the device refuses
        the bundle; the current slot stays.
        """
        current = None if self._is_bare else self._current()
        before = self._before.value("slot")
        if current is not None and before not in ("", current.manifest_sha256) and not self._is_planned(current):
            self._agent("slots", "--state", self.plan.layout.state, "--roll-back")  # keep the slot known to work
            current = self._current()
        self.slot, same = current, self._is_planned(current)
        self._rolls_back_slot = same and before not in ("", *self.plan.accepted)
        if same and not verify:
            return False
        source = current.path if current is not None else None
        if current is not None and not same:
            self._check(self._before.note("slot", current.manifest_sha256), "the slot in use cannot be noted")
        if not same:
            with self.step("bundle sent"):
                self.sent_bytes += self.remote.send(
                    self.plan.bundle, f"{self._incoming}/bundle", copy_dest=source, become=self._become
                )
            source = f"{self._incoming}/bundle"
        with self.step("verified and golden check passed"):
            arguments = ["install", str(source), "--state", self.plan.layout.state, *self._settings(), "--json"]
            result = self._agent(*arguments, timeout_s=_CHECK_S)
            if result.code and not self.facts.unfinished:
                self._script(_FORGET, self._unfinished, self._before.folder)
            failure = "the golden check failed" if result.code == EXIT_CHECK_FAILED else "the bundle was refused"
            self._check(result, f"{failure} on the device; its current bundle stays")
        for notice in self._notices(result.out):
            self._say(f"{self.remote.target}: notice: {notice}")
        self.slot = self._slots(result.out)[0]
        self._rolls_back_slot = self._rolls_back_slot or (not same and current is not None)
        return not same

    @property
    def _is_bare(self) -> bool:
        """Whether nothing of eyas was ever installed: there is no program yet to ask for the slots but the new one."""
        return self.plan.wheel is not None and not (self.facts.slot or self.facts.venv_link or self.facts.unfinished)

    def _is_planned(self, slot: SlotState | None) -> bool:
        return slot is not None and slot.manifest_sha256 in self.plan.accepted

    @property
    def changes_environment(self) -> bool:
        """Whether the environment in use differs from the planned one."""
        return bool(self._environment) and self.facts.venv_link != self._environment

    def use_environment(self) -> bool:
        """Switch to the built environment."""
        if not self.changes_environment:
            return False
        if self.facts.venv_link:
            self._check(self._before.note("venv", self.facts.venv_link), "the environment in use cannot be noted")
        self._check(self._script(LINK, self.plan.layout.opt, self._environment), "the environment cannot be switched")
        return True

    def put_config(self) -> bool:
        """Install the configuration, if the plan has another one."""
        if not self._new_config:
            return False
        return self._put("device.toml", self.plan.layout.config, mode="640", group=self._user)

    def put_credentials(self) -> bool:
        """Install certificate, key and the authority's certificate, all at once, if the plan has other ones."""
        if not self._new_credentials:
            return False
        path = self.plan.layout.credentials
        result = self._before.put_folder(
            f"{self._incoming}/files/credentials",
            path,
            private=[CREDENTIALS["key"]],
            group=self._user,
            python=self.facts.python,
        )
        self._check(result, f"{path} cannot be written")
        self._say(f"{self.remote.target}: {path} written")
        return True

    def put_unit(self) -> bool:
        """Install and enable the units of the service and of its updater, where the service is installed."""
        if not self.serves:
            return False
        changed = self._new_unit and self._put("unit", self.plan.layout.unit, mode="644")
        if self._new_updater:
            changed |= self._put("updater", self.plan.layout.updater, mode="644")
        for unit, path in self._new_agent_units.items():
            changed |= self._put(unit.name, path, mode="644")
        if self._new_rules:
            self._put("rules", self.plan.layout.rules, mode="644")
            self._script(_USE_RULES)
        reload = "systemctl daemon-reload" if changed else "true"  # `enable` reloads by itself
        units = (SERVICE, _UPDATER, *(unit.name for unit in AGENT_UNITS if self._exchanges_agent))
        enabled = " && ".join(f"systemctl is-enabled --quiet {unit}" for unit in units)
        script = f"if {enabled}; then {reload}; else systemctl enable --quiet {' '.join(units)}; fi"
        self._check(self._script(script), "the service cannot be enabled")
        return changed

    def restart_updater(self) -> None:
        """Let the updaters use what was flashed; without [update] url in the configuration that of models ends."""
        if self.serves:
            self._script(f"systemctl restart --no-block {_UPDATER} || true")
        if self._exchanges_agent:
            waits = next(unit.name for unit in AGENT_UNITS if unit.suffix == ".path")
            self._script(f"systemctl start {waits} || true")

    def restart_instances(self) -> None:
        """Restart the device's further cameras: they share the environment, and none may run a mixture of versions."""
        if self.serves:
            self._script(f"systemctl try-restart '{SERVICE}@*.service' || true", timeout_s=START_S + 60)

    def health_problem(self, *, restart: bool) -> str:
        """Describe what is wrong with the device, as `Health.problem`; empty if it is healthy."""
        return self._health.problem(self.slot, restart=restart)

    def report(self) -> Report:
        """Whether camera and broker work, as `Health.report`."""
        return self._health.report(self.slot)

    @property
    def _earlier_environment(self) -> str:
        """The environment before this flash, or before the interrupted one that it completes; empty if none."""
        return self._before.value("venv") or self.facts.venv_link

    @property
    def can_roll_back(self) -> bool:
        """Whether there is an earlier state to restore."""
        layout = self.plan.layout
        had_environment = self._earlier_environment not in ("", self._environment or self.facts.venv_link)
        had_config = self.facts.config == "yes" and not self._before.was_absent(layout.config)
        files = (layout.config, layout.credentials, layout.unit, layout.updater, *layout.agent_units)
        replaced = any(self._before.holds(path) or self._before.was_absent(path) for path in files)
        return self._rolls_back_slot or had_environment or (had_config and replaced)

    def roll_back(self) -> str:
        """Restore the earlier state as far as there is one, and return what is wrong then; empty if healthy.

        Each part is restored, whatever becomes of the others. Raises `FleetError` if one could not be: it says where
        the device keeps the earlier files.
        """
        layout, failed = self.plan.layout, []
        for what, undo in self._undo():
            if (result := undo()).code:
                failed.append(f"{what} ({result.last_line})")
        if failed:
            files = (layout.config, layout.credentials, layout.unit)
            kept = [path for path in files if self._before.holds(path)]
            where = f"; the earlier {' and '.join(kept)} are in {self._before.folder} on the device" if kept else ""
            with suppress(FleetError):
                self.health_problem(restart=True)  # what could be restored should run
            raise FleetError(f"could not be rolled back: {', '.join(failed)}{where}", self.remote.target)
        self.slot = self._current() if self._rolls_back_slot else self.slot
        if self.serves:
            self._check(self._script("systemctl daemon-reload"), "systemctl daemon-reload failed")
        return self.health_problem(restart=True)

    def _undo(self) -> Iterator[tuple[str, Callable[[], CommandResult]]]:
        """The parts of a roll-back and what restores each."""
        layout = self.plan.layout
        files = {
            "the configuration": layout.config,
            "the service's unit": layout.unit,
            "the updater's unit": layout.updater,
            "the udev rules": layout.rules,
            **{f"the unit {Path(path).name}": path for path in layout.agent_units},
        }
        for what, path in files.items():
            yield what, partial(self._before.restore, path)
        yield "the credentials", partial(self._before.restore_folder, layout.credentials, python=self.facts.python)
        if self._environment and self._earlier_environment:
            yield "the environment", partial(self._script, LINK, layout.opt, self._earlier_environment)
        if self._rolls_back_slot:
            yield "the model", partial(self._agent, "slots", "--state", layout.state, "--roll-back")

    def clean_up(self, *, finished: bool) -> None:
        """Remove temporary files, and when `finished` also environments older than the previous one.

        A lost connection is ignored here, so that it does not hide an earlier error.
        """
        with suppress(FleetError):
            self._script('rm -rf "$1"', self._incoming)
            if finished:
                self._script(_FORGET, self._unfinished, self._before.folder)
            if finished and self._environment:
                kept = (self._environment, self._earlier_environment or self._environment)
                self._script(_CLEAN_UP, self.plan.layout.opt, *kept)

    def _settings(self) -> list[str]:
        """The option that names the configuration with which a bundle is checked: the new one, else the present one."""
        if self._new_config:
            sent, readable = f"{self._incoming}/files/device.toml", f"{self._incoming}/device.toml"
            script = 'rm -f "$2"; install -m 640 "$1" "$2"; [ -z "$3" ] || chgrp "$3" "$2"'
            self._check(self._script(script, sent, readable, self._user), f"{readable} cannot be written")
            return ["--config", readable]
        return ["--config", self.plan.layout.config] if self.facts.config == "yes" else []

    @property
    def _new_config(self) -> bool:
        """Whether the plan has another configuration than the device."""
        return self.plan.config is not None and not self._has(
            self.plan.config, self.plan.layout.config, "640", self._user
        )

    @property
    def _new_unit(self) -> bool:
        return (
            self.serves and self.plan.unit is not None and not self._has(self.plan.unit, self.plan.layout.unit, "644")
        )

    @property
    def _new_updater(self) -> bool:
        unit = self.plan.unit is not None
        return self.serves and unit and not self._has(UPDATER, self.plan.layout.updater, "644")

    @property
    def _exchanges_agent(self) -> bool:
        """Whether the device has, or gets, the units that exchange its agent by a signed release."""
        return self.plan.exchanges_agent(self.facts)

    @property
    def _new_agent_units(self) -> dict[Path, str]:
        """Those that the device lacks, or has otherwise -> their paths there."""
        units = zip(AGENT_UNITS, self.plan.layout.agent_units, strict=True)
        return {unit: path for unit, path in units if self._exchanges_agent and not self._has(unit, path, "644")}

    @property
    def _new_rules(self) -> bool:
        return self.serves and not self._has(RULES, self.plan.layout.rules, "644")

    @property
    def _new_credentials(self) -> bool:
        folder, there = self.plan.credentials, self.plan.layout.credentials
        return folder is not None and not all(
            self._has(folder / file, f"{there}/{file}", mode, self._user if mode == "640" else "")
            for file, mode in _credential_modes(folder).items()
        )

    def _has(self, local: Path, path: str, mode: str, group: str = "") -> bool:
        """Whether the device has this file, with this mode and group."""
        found = [fact for fact in self.facts.file_facts if fact[3] == path]
        return any(fact[:2] == (sha256(local), mode) and group in ("", fact[2]) for fact in found)

    def _current(self) -> SlotState | None:
        return next((slot for slot in self._states() if slot.current), None)

    def _states(self) -> list[SlotState]:
        result = self._agent("slots", "--state", self.plan.layout.state, "--json")
        self._check(result, "the slots cannot be read")
        return self._slots(result.out)

    def _slots(self, text: str) -> list[SlotState]:
        try:
            slots = [msgspec.json.decode(line, type=SlotState) for line in text.splitlines()]
        except msgspec.DecodeError:
            slots = []
        if not slots:
            raise FleetError("the agent's list of slots cannot be parsed; flash the agent again", self.remote.target)
        return slots

    def _notices(self, text: str) -> tuple[str, ...]:
        """What `install` noticed about a bundle that is good; an older agent notices nothing."""
        try:
            return msgspec.json.decode(text, type=_Installed).notices
        except msgspec.DecodeError:
            return ()

    def _agent(self, *arguments: str, timeout_s: float = 120) -> CommandResult:
        """Run `eyas-device` on the device, as the service's user."""
        if self._environment:
            agent = [f"{self.plan.layout.opt}/{self._environment}/bin/eyas-device"]
        else:
            agent = [self.facts.python, "-m", "eyas_device"]
        become = list(self._become)
        if self._user and self._user != (self.facts.user if not become else "root"):
            become += ["runuser", "-u", self._user, "--"]
        command = ["sh", "-c", 'cd / && exec "$@"', "sh", *agent, *arguments]
        return self.remote.run(*command, timeout_s=timeout_s, become=become)

    def _put(self, name: str, path: str, *, mode: str, group: str = "") -> bool:
        """Replace the remote file `path` by the sent file `name`, after a backup; whether it differed."""
        result = self._before.put(f"{self._incoming}/files/{name}", path, mode=mode, group=group)
        self._check(result, f"{path} cannot be written")
        if result.out.strip() == "same":
            return False
        self._say(f"{self.remote.target}: {path} written")
        return True

    def _script(self, script: str, *arguments: str, timeout_s: float = 120) -> CommandResult:
        return self.remote.run("sh", "-euc", script, "sh", *arguments, timeout_s=timeout_s, become=self._become)

    def _check(self, result: CommandResult, failure: str) -> None:
        if result.code:
            raise FleetError(f"{failure} ({result.last_line})", self.remote.target)


def _credential_modes(folder: Path) -> dict[str, str]:
    """Files of an enrolled device that are brought -> mode there; the root of trust where there is one."""
    modes = {file: "640" if key == "key" else "644" for key, file in CREDENTIALS.items()}
    return modes | ({ROOT: "644"} if (folder / ROOT).exists() else {})
