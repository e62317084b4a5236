"""The steps of a flash on one device. Each may be repeated, and each says whether it changed anything."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.updates.slots import SlotState
from eyas_host.fleet.connect.preflight import Facts, Layout, become
from eyas_host.fleet.connect.ssh import Answer, FleetError, Remote
from eyas_host.fleet.connect.wheels import constraints, environment_name, fetch

SERVICE = "eyas-device"
_PIP_S = 1800
_START_S = 180
"""Longest time to the first answered frame after a restart; the unit allows more, for a slow boot."""
_TIMED_OUT = 124
"""What `timeout` ends with."""

_MAKE = """
umask 022; cd /
env=$1; python=$2; files=$3; site=$4; shift 4
rm -rf "$env"
"$python" -m venv $site "$env"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
  --constraint "$files/constraints.txt" --find-links "$files/wheels" "$@" "$files"/wheels/eyas_device-*.whl
"$env/bin/eyas-device" --version >/dev/null
: > "$env/eyas.stamp"
"""
_LINK = 'cd "$1"; ln -sfn "$2" .venv.new; mv -T .venv.new venv'
_TIDY = 'cd "$1"; for d in venv-*; do case "$d" in "$2"|"$3") ;; *) rm -rf "$d" ;; esac; done'
_PUT = """
umask 022
new=$1; place=$2; before=$3; mode=$4; group=$5
cmp -s "$new" "$place" && { echo same; exit 0; }
mkdir -p "$(dirname "$place")"
if [ -f "$place" ]; then cp -p "$place" "$before"; else rm -f "$before"; fi
cp "$new" "$place.new"; chmod "$mode" "$place.new"
[ -z "$group" ] || chgrp "$group" "$place.new"
sync; mv "$place.new" "$place"
echo changed
"""
_BACK = 'if [ -f "$2" ]; then mv "$2" "$1"; else rm -f "$1"; fi'


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What every device is going to get."""

    bundle: Path
    model: str
    """`name version` of the bundle."""
    manifest_sha256: str
    bundle_bytes: int
    layout: Layout = Layout()
    config: Path | None = None
    wheel: Path | None = None
    """Of eyas itself; None: the environment is there already."""
    wheel_dir: Path | None = None
    offline: bool = False
    python: str | None = None
    """An interpreter on the device that has eyas; no environment is made then."""
    unit: Path | None = None
    service: bool | None = None
    """Whether to install and start the service; None: where systemd runs and the root is `/`."""
    settle_s: float = 5.0
    """How long a started service has to stay up."""

    def serves(self, facts: Facts) -> bool:
        """Whether this device gets the service."""
        return facts.has_systemd and self.layout.root == "/" if self.service is None else self.service

    def environment(self, facts: Facts) -> str:
        """The name of the environment that this device needs; empty with `python`."""
        return "" if self.wheel is None else environment_name(self.wheel, facts, self.wheel_dir)

    def unit_user(self) -> str:
        """Whom the service runs as."""
        text = self.unit.read_text(encoding="utf-8") if self.unit is not None else ""
        match = re.search(r"^User=([A-Za-z_][A-Za-z0-9_-]*)$", text, re.MULTILINE)
        if match is None:
            raise FleetError(f"{self.unit}: names no user; the service must not run as root by accident")
        return match[1]


class Device:
    """One device that is being flashed."""

    def __init__(self, remote: Remote, facts: Facts, plan: Plan, say: Callable[[str], None]) -> None:
        self.remote, self.facts, self.plan, self._say = remote, facts, plan, say
        self.serves = plan.serves(facts)
        self.sent_bytes = 0
        self._become = become(facts, plan.layout, service=self.serves)
        self._user = plan.unit_user() if self.serves else ""
        self._incoming = f"{plan.layout.opt}/incoming"
        self._unfinished = f"{plan.layout.opt}/.flashing"
        self._environment = plan.environment(facts)
        self._put_back: list[str] = []
        self._rolls_back = False
        self.slot: SlotState | None = None
        """The current one, as far as it is known."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say what was done and how long it took."""
        started = time.monotonic()
        yield
        self._say(f"{self.remote.target}: {name} ({time.monotonic() - started:.1f} s)")

    def prepare(self, folder: Path) -> None:
        """Make the remote folders, gather in the local `folder` what has to be there beside the bundle, and send it."""
        plan = self.plan
        if plan.config is not None:
            shutil.copy(plan.config, folder / "device.toml")
        if self.serves and plan.unit is not None:
            shutil.copy(plan.unit, folder / "unit")
        if plan.wheel is not None and self._environment not in self.facts.environments:
            wheels = folder / "wheels"
            wheels.mkdir()
            shutil.copy(constraints(self.facts), folder / "constraints.txt")
            for wheel in plan.wheel_dir.glob("*.whl") if plan.wheel_dir is not None else ():
                shutil.copy(wheel, wheels)
            shutil.copy(plan.wheel, wheels)
            if plan.offline and plan.wheel_dir is None:
                with self.step("wheels fetched here"):
                    fetch(wheels, plan.wheel, self.facts)
        quoted = shlex.join([f"{self._incoming}/files", f"{self._incoming}/bundle", plan.layout.state])
        script = f"umask 022; mkdir -p {quoted}; : > {shlex.quote(self._unfinished)}"
        if self.serves:
            user, state = shlex.quote(self._user), shlex.quote(plan.layout.state)
            script += f"""
            id -u {user} >/dev/null 2>&1 ||
              useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}
            [ "$(stat -c %U {state})" = {user} ] || chown -R {user}: {state}
            """
        self.remote.sh(script, become=self._become)
        if any(folder.iterdir()):
            with self.step("files sent"):
                self.sent_bytes += self.remote.send(
                    folder, f"{self._incoming}/files", become=self._become, private=True
                )

    def make_environment(self) -> None:
        """Make the virtual environment, if it is not there; it is not used before `use_environment`."""
        if not self._environment or self._environment in self.facts.environments:
            return
        place = f"{self.plan.layout.opt}/{self._environment}"
        site = "--system-site-packages" if self.facts.picamera2 == "yes" else ""
        words = [
            place,
            self.facts.python,
            f"{self._incoming}/files",
            site,
            *(["--no-index"] if self.plan.offline else []),
        ]
        self._say(f"{self.remote.target}: making the environment; this takes minutes on a small board")
        with self.step(f"environment {self._environment} made"):
            answer = self._script(_MAKE, *words, timeout_s=_PIP_S)
            if answer.code:
                fix = "" if self.plan.offline else "; --offline fetches the wheels here, for a device without a network"
                raise FleetError(f"{self.remote.target}: the environment cannot be made ({answer.last}){fix}")

    def install(self, *, prove: bool) -> bool:
        """Put the bundle into the inactive slot, prove it there and switch to it; with `prove` also one that is there.

        Raises `FleetError` if the device refuses it; it keeps the slot that it has.
        """
        current = self.slot = self._current()
        same = current is not None and current.manifest_sha256 == self.plan.manifest_sha256
        if same and not prove:
            return False
        source = current.path if current is not None else None
        if not same:
            with self.step("bundle sent"):
                self.sent_bytes += self.remote.send(
                    self.plan.bundle, f"{self._incoming}/bundle", copy_dest=source, become=self._become
                )
            source = f"{self._incoming}/bundle"
        with self.step("verified and golden check passed"):
            answer = self._agent("install", str(source), "--state", self.plan.layout.state, "--json", timeout_s=600)
            if answer.code:
                if not self.facts.unfinished:
                    self._script('rm -f "$1"', self._unfinished)
                what = "the bundle does not answer there as here" if answer.code == EXIT_CHECK_FAILED else "refused"
                raise FleetError(f"{self.remote.target}: {what}; it keeps what it has ({answer.last})")
        self.slot = self._told(answer.out)[0]
        self._rolls_back = not same and current is not None
        return not same

    @property
    def changes_environment(self) -> bool:
        """Whether the environment that the device uses is not the one that it is going to use."""
        return bool(self._environment) and self.facts.venv_link != self._environment

    def use_environment(self) -> bool:
        """Let the environment that the device uses be the one that was made."""
        if not self.changes_environment:
            return False
        self._done(self._script(_LINK, self.plan.layout.opt, self._environment), "the environment cannot be switched")
        return True

    def put_config(self) -> bool:
        """Install the configuration that was given; without one, what is there stays."""
        if self.plan.config is None:
            return False
        return self._put("device.toml", self.plan.layout.config, mode="640", group=self._user)

    def put_unit(self) -> bool:
        """Install the service's unit, where this device gets one."""
        if not self.serves:
            return False
        changed = self._put("unit", self.plan.layout.unit, mode="644")
        if changed:
            self._done(self._script("systemctl daemon-reload"), "systemd")
        enabled = self._script(f"systemctl is-enabled --quiet {SERVICE} || systemctl enable --quiet {SERVICE}")
        self._done(enabled, "the service cannot be enabled")
        return changed

    def health(self, *, restart: bool) -> str:
        """What is wrong now; empty if all is well.

        With a service: it answers its first frame after a restart and stays up. Without: three drawn frames are
        answered by what is in the current slot.
        """
        if not self.serves:
            if self.slot is None:
                return "there is no good slot"
            words = ("run", "--bundle", self.slot.path, "--camera", "fake:?frames=3", "--frames", "3")
            answer = self._agent(*words, timeout_s=120)
            return f"three frames are not answered: {answer.last}" if answer.code else ""
        active = f"systemctl is-active --quiet {SERVICE}"
        if restart or self._script(active).code:
            command = f"timeout {_START_S} systemctl restart {SERVICE}"
            started = self._script(command, timeout_s=_START_S + 60)
            if started.code == _TIMED_OUT:
                return f"no frame was answered within {_START_S} s; see eyas-device doctor there, is the camera well?"
            if started.code:
                return f"the service does not start: {started.last}"
        count = f"systemctl show --property=NRestarts --value {SERVICE}"
        before = self._script(count).out
        time.sleep(self.plan.settle_s)
        if self._script(active).code or self._script(count).out != before:
            return f"the service does not stay up; see journalctl -u {SERVICE}"
        return ""

    @property
    def can_roll_back(self) -> bool:
        """Whether there was something before."""
        had_environment = self.changes_environment and bool(self.facts.venv_link)
        return self._rolls_back or had_environment or (self.facts.config == "yes" and bool(self._put_back))

    def roll_back(self) -> str:
        """Put everything back as it was, as far as there was something; what is wrong then, empty if all is well."""
        if self._rolls_back:
            self._done(self._agent("slots", "--state", self.plan.layout.state, "--roll-back"), "the roll-back failed")
            self.slot = self._current()
        if self.facts.venv_link and self._environment:
            self._done(self._script(_LINK, self.plan.layout.opt, self.facts.venv_link), "the roll-back failed")
        for place in self._put_back:
            self._done(self._script(_BACK, place, self._before(place)), "the roll-back failed")
        if self.serves:
            self._done(self._script("systemctl daemon-reload"), "systemd")
        return self.health(restart=True)

    def tidy(self, *, done: bool) -> None:
        """Remove what was only on its way, and when `done` also environments older than the last one.

        A connection that is gone by now is no reason to hide what came before.
        """
        with suppress(FleetError):
            self._tidy(done=done)

    def _tidy(self, *, done: bool) -> None:
        self._script('rm -rf "$1"', self._incoming)
        if done:
            self._script('rm -f "$1"', self._unfinished)
        if done and self._environment:
            kept = (self._environment, self.facts.venv_link or self._environment)
            self._script(_TIDY, self.plan.layout.opt, *kept)

    def _current(self) -> SlotState | None:
        answer = self._agent("slots", "--state", self.plan.layout.state, "--json")
        self._done(answer, "the slots cannot be read")
        return next((slot for slot in self._told(answer.out) if slot.current), None)

    def _told(self, text: str) -> list[SlotState]:
        try:
            slots = [msgspec.json.decode(line, type=SlotState) for line in text.splitlines()]
        except msgspec.DecodeError:
            slots = []
        if not slots:
            raise FleetError(f"{self.remote.target}: its slots are not told as expected; flash the agent again")
        return slots

    def _agent(self, *words: str, timeout_s: float = 120) -> Answer:
        """`eyas-device` there, as the user that the service runs as."""
        if self._environment:
            agent = [f"{self.plan.layout.opt}/{self._environment}/bin/eyas-device"]
        else:
            agent = [self.facts.python, "-m", "eyas_device"]
        front = list(self._become)
        if self._user and self._user != (self.facts.user if not front else "root"):
            front += ["runuser", "-u", self._user, "--"]
        command = ["sh", "-c", 'cd / && exec "$@"', "sh", *agent, *words]
        return self.remote.run(*command, timeout_s=timeout_s, become=front)

    def _put(self, name: str, place: str, *, mode: str, group: str = "") -> bool:
        new = f"{self._incoming}/files/{name}"
        answer = self._script(_PUT, new, place, self._before(place), mode, group)
        self._done(answer, f"{place} cannot be written")
        if answer.out.strip() == "same":
            return False
        self._put_back.append(place)
        self._say(f"{self.remote.target}: {place} written")
        return True

    def _before(self, place: str) -> str:
        return f"{self._incoming}/before-{Path(place).name}"

    def _script(self, script: str, *words: str, timeout_s: float = 120) -> Answer:
        return self.remote.run("sh", "-euc", script, "sh", *words, timeout_s=timeout_s, become=self._become)

    def _done(self, answer: Answer, what: str) -> None:
        if answer.code:
            raise FleetError(f"{self.remote.target}: {what} ({answer.last})")
