"""Install the agent as a service of systemd from the files of this package, on the machine itself.

`eyas flash` does the same from the workstation, with a roll-back. Here each step is idempotent and says what it did; a
configuration that is there is never written to.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eyas_device.config import CONFIG, EXAMPLE, INSTANCES, STATE, read_config
from eyas_device.errors import ConfigError, EyasError
from eyas_device.support.files import atomic_write
from eyas_device.support.names import check_name
from eyas_device.support.packages import program_path
from eyas_device.support.toml import parse

PACKAGE = EXAMPLE.parent
RULES = PACKAGE / "70-eyas-camera.rules"
"""udev rules: devices beside /dev/video* that a camera may need."""
UPDATER = PACKAGE / "eyas-device-update.service"
"""Unit of the process that looks for signed releases."""
AGENT_UNITS = tuple(PACKAGE / f"eyas-device-agent-update.{kind}" for kind in ("service", "path"))
"""Root's units that exchange the agent by a signed release."""
_UNITS = Path("etc/systemd/system")
_RULES = Path("etc/udev/rules.d")
_PROGRAM = "/opt/eyas/venv/bin/eyas-device"
"""What the unit files run."""
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""Folders that the hardened service does not see."""
_COMMAND_S = 120.0

Run = Callable[[Sequence[str]], None]
"""Runs a command of the system; raises `EyasError` if it fails."""


class ServiceError(EyasError, RuntimeError):
    """The service cannot be installed here, or not like this."""


class Service:
    """The service of this machine's camera, or of the one called `name` among several.

    Args:
        name: Name of a camera among several; empty for the only one.
        say: Receives a line for each change.
        dry_run: Whether to say the changes only.
        agent_updates: Whether signed releases may exchange the agent itself, also where the configuration does not say
            so: root's units for that are installed, too.
        root: The machine's root folder.
        run: Runs commands of the system.

    """

    def __init__(
        self,
        name: str = "",
        *,
        say: Callable[[str], None],
        dry_run: bool = False,
        agent_updates: bool = False,
        root: Path = Path("/"),
        run: Run | None = None,
    ) -> None:
        if name:
            try:
                check_name(name)
            except ValueError as error:
                raise ServiceError(f"--name {error}") from None
        self._say, self._dry_run, self._root = say, dry_run, root
        self._run = run or run_command
        suffix = f"@{name}" if name else ""
        self.unit = f"eyas-device{suffix}"
        """Name for systemctl."""
        self.updater = f"eyas-device-update{suffix}"
        """Name of the unit that looks for signed releases; without [update] url it ends at once."""
        self.config = INSTANCES / f"{name}.toml" if name else CONFIG
        self.state = Path(STATE) / "devices" / name if name else Path(STATE)
        at = "@" if name else ""
        self._sources = {
            self.unit: PACKAGE / f"eyas-device{at}.service",
            self.updater: UPDATER.with_name(f"eyas-device-update{at}.service"),
        }
        self._user = _user_of(self._sources[self.unit])
        if agent_updates and name:
            raise ServiceError("--agent-updates is about the environment that all cameras share: without --name")
        self._agent_updates = agent_updates

    def install(self, config: Path | None = None) -> bool:
        """Install user, folders, configuration, udev rules and units, and enable them; whether anything changed.

        Raises `ServiceError` before the first change if this cannot work, `ConfigError` if a configuration has errors.
        """
        self._check_machine()
        program = program_for_service()
        text = self._configuration(config)
        agent_updates = self._agent_updates or self._allows_agent_updates(text)
        if agent_updates and program != _PROGRAM:
            raise ServiceError(
                f"updates of the agent: {program} is not an environment of `eyas flash`, which alone can be exchanged"
            )
        changed = self._add_user()
        changed |= self._make_folder(self.config.parent, 0o755, "root")
        changed |= self._make_folder(self.state, 0o750, self._user)
        changed |= self._own(self.state)
        if text is not None:
            changed |= self._write(self.config, text, 0o640, group=self._user)
        if self._write(Path("/") / _RULES / RULES.name, RULES.read_bytes(), 0o644):
            changed = True
            self._use_rules()
        sources = [*self._sources.values(), *(AGENT_UNITS if agent_updates else ())]
        units = {source.name: source.read_text(encoding="utf-8").replace(_PROGRAM, program) for source in sources}
        written = [self._write(Path("/") / _UNITS / name, unit.encode(), 0o644) for name, unit in units.items()]
        if any(written):
            changed = True
            self._command("systemctl", "daemon-reload")
        for unit in (*self._sources, *(source.name for source in AGENT_UNITS if agent_updates)):
            if not self._is_enabled(unit):
                changed = True
                self._command("systemctl", "enable", "--quiet", unit)
        return changed

    def uninstall(self) -> bool:
        """Stop and disable the units, and remove their files; whether they were there.

        User, configuration and state stay, and the templates of several cameras and the udev rules as long as another
        camera is enabled.
        """
        self._check_machine()
        sources = [*self._sources.values(), *(() if "@" in self.unit else AGENT_UNITS)]
        installed = [self._root / _UNITS / source.name for source in sources]
        units = [*self._sources, *(source.name for source in sources if source in AGENT_UNITS)]
        enabled = [unit for unit in units if self._is_enabled(unit)]
        if not enabled and not any(path.exists() for path in installed):
            return False
        for unit in reversed(enabled):
            self._command("systemctl", "disable", "--now", "--quiet", unit)
        wanted = self._root / _UNITS / "multi-user.target.wants"
        own = [_file_name(unit) for unit in units]
        others = sorted(other.name for other in wanted.glob("eyas-device*") if other.name not in own)
        used = [other for other in others if ("@" in other) == ("@" in self.unit)]
        for file, needed in (*((path, used) for path in installed), (self._root / _RULES / RULES.name, others)):
            if file.exists() and not needed:
                self._change(f"remove {file}", file.unlink)
        self._command("systemctl", "daemon-reload")
        return True

    @property
    def can_start(self) -> bool:
        """Whether the installed configuration names a camera."""
        path = self._root / self.config.relative_to("/")
        return path.is_file() and bool(read_config(path).camera.source)

    def _check_machine(self) -> None:
        if not (self._root / "run/systemd/system").is_dir():
            raise ServiceError("systemd does not run here, so there is no service: start `eyas-device run` another way")
        if os.geteuid() != 0 and not self._dry_run:
            raise ServiceError(f"root is needed: sudo {program_path()} service ...; --dry-run shows what it would do")

    def _configuration(self, config: Path | None) -> bytes | None:
        """What to write to the configuration's path; None if the one that is there stays."""
        there = self._root / self.config.relative_to("/")
        if config is None:
            if there.exists():
                read_config(there)
                return None
            return EXAMPLE.read_bytes()
        read_config(config)
        text = config.read_bytes()
        if there.exists() and there.read_bytes() != text:
            raise ServiceError(f"{there} is there and differs from {config}: it stays; edit it, or move it away first")
        return text

    def _allows_agent_updates(self, text: bytes | None) -> bool:
        """Whether the configuration, `text` or else the one that is there, lets releases exchange the agent."""
        if "@" in self.unit:
            return False
        if text is None:
            return read_config(self._root / self.config.relative_to("/")).update.agent
        return bool(parse(text.decode("utf-8-sig")).get("update", {}).get("agent", False))

    def _add_user(self) -> bool:
        try:
            pwd.getpwnam(self._user)
        except KeyError:
            home = ("--no-create-home", "--home-dir", STATE, "--shell", "/usr/sbin/nologin")
            self._command("useradd", "--system", "--user-group", *home, self._user)
            return True
        return False

    def _make_folder(self, folder: Path, mode: int, owner: str) -> bool:
        path = self._root / folder.relative_to("/")
        if path.is_dir():
            return False

        def make() -> None:
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)  # whatever the umask
            shutil.chown(path, owner, owner)

        self._change(f"make {folder} ({mode:o}, {owner})", make)
        return True

    def _own(self, folder: Path) -> bool:
        """Give the service's user what root has put there, such as a model of `eyas-device install`."""
        top = self._root / folder.relative_to("/")
        try:
            user = pwd.getpwnam(self._user)
        except KeyError:  # a dry run
            return False
        foreign = [path for path in (top, *top.rglob("*")) if path.exists() and path.lstat().st_uid != user.pw_uid]
        if not foreign:
            return False

        def own() -> None:
            for path in foreign:
                os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)

        self._change(f"give {folder} to {self._user}", own)
        return True

    def _write(self, target: Path, content: bytes, mode: int, *, group: str = "") -> bool:
        path = self._root / target.relative_to("/")
        if path.is_file() and path.read_bytes() == content:
            return False

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content, mode=mode)
            if group:
                os.chown(path, 0, grp.getgrnam(group).gr_gid)

        self._change(f"write {target}", write)
        return True

    def _is_enabled(self, unit: str) -> bool:
        return (self._root / _UNITS / "multi-user.target.wants" / _file_name(unit)).is_symlink()

    def _use_rules(self) -> None:
        """Let udev apply its new rules; where there is none, or none answers, the service is installed all the same."""
        try:
            self._command("udevadm", "control", "--reload")
            for match in (("--subsystem-match=dma_heap",), ("--sysname-match=vchiq", "--sysname-match=vcio")):
                self._command("udevadm", "trigger", "--action=change", *match)
        except EyasError as error:
            self._say(f"{error}: the rules for cameras hold from the next start on")

    def _command(self, *words: str) -> None:
        self._change(f"run {' '.join(words)}", lambda: self._run(words))

    def _change(self, what: str, do: Callable[[], object]) -> None:
        self._say(f"would {what}" if self._dry_run else what)
        if self._dry_run:
            return
        try:
            do()
        except EyasError:
            raise
        except (OSError, LookupError) as error:
            raise ServiceError(f"cannot {what}: {getattr(error, 'strerror', None) or error}") from None


def _file_name(unit: str) -> str:
    """Name of a unit's file."""
    return unit if unit.endswith((".service", ".path")) else f"{unit}.service"


def program_for_service() -> str:
    """The command for `ExecStart`. Raises `ServiceError` if the service could not see or run it.

    In the environment of `eyas flash` it is the link to it, which stays when a flash changes the environment.
    """
    if Path(_PROGRAM).parents[1].resolve() == Path(sys.prefix).resolve():
        return _PROGRAM
    for folder in (sys.prefix, sys.base_prefix, str(PACKAGE)):
        if any(Path(folder).is_relative_to(hidden) for hidden in _HIDDEN):
            raise ServiceError(
                f"{folder}: the hardened service does not see {', '.join(_HIDDEN)}; install eyas-device into an "
                "environment elsewhere, such as /opt/eyas-device (docs/boards.md)"
            )
    program = program_path()
    if re.search(r"[\s\"'\\$%;]", program.replace(" -m eyas_device", "")):
        raise ServiceError(f"{program}: a path without blanks, quotes, `$`, `%`, `;` and backslashes is needed")
    first = Path(program.partition(" ")[0])
    for path in (first, *first.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            raise ServiceError(f"{path}: the service's user may not enter or run it; chmod o+rx it")
    return program


def run_command(words: Sequence[str]) -> None:
    """Run a command of the system. Raises `ServiceError` with its last line if it fails."""
    try:
        done = subprocess.run(
            list(words), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{' '.join(words)}: {getattr(error, 'strerror', None) or error}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ServiceError(f"{' '.join(words)}: {lines[-1].strip()}")


def _user_of(unit: Path) -> str:
    match = re.search(r"^User=(\S+)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ConfigError(f"{unit}: no User= line")
    return match[1]
