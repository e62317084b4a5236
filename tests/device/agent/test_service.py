"""`eyas-device service`: what it installs, that it does so once, and what it refuses before the first change."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from eyas_device.agent import service as services
from eyas_device.agent.service import RULES, Service, ServiceError, program_for_service
from eyas_device.cli import main
from eyas_device.config import EXAMPLE
from eyas_device.errors import ConfigError

PROGRAM = "/opt/eyas-device/bin/eyas-device"


class Machine:
    """A root folder with a systemd that only notes what it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []
        self.commands: list[str] = []
        (root / "run/systemd/system").mkdir(parents=True)

    def run(self, words: Sequence[str]) -> None:
        self.commands.append(" ".join(words))
        wants = self.root / "etc/systemd/system/multi-user.target.wants"
        link = wants / (words[-1] if words[-1].endswith((".path", ".service")) else f"{words[-1]}.service")
        if words[:2] == ("systemctl", "enable"):
            wants.mkdir(parents=True, exist_ok=True)
            link.symlink_to("anywhere")
        if words[:2] == ("systemctl", "disable"):
            link.unlink()

    def service(self, name: str = "", *, dry_run: bool = False, agent_updates: bool = False) -> Service:
        self.lines, self.commands = [], []
        options = {"dry_run": dry_run, "agent_updates": agent_updates}
        return Service(name, say=self.lines.append, root=self.root, run=self.run, **options)

    def files(self) -> dict[str, str]:
        found = [path for path in self.root.rglob("*") if path.is_file() or path.is_symlink()]
        return {str(path.relative_to(self.root)): oct(path.lstat().st_mode & 0o777) for path in found}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The test's user is the service's, and root for as much as the program can see."""
    monkeypatch.setattr(services, "_user_of", lambda unit: getpass.getuser())
    monkeypatch.setattr(services, "program_for_service", lambda: PROGRAM)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, user, group, **options: None)
    monkeypatch.setattr(shutil, "chown", lambda path, user, group: None)
    monkeypatch.setattr(services.grp, "getgrnam", lambda name: services.grp.getgrall()[0])
    return Machine(tmp_path / "root")


def test_without_udev_the_service_is_installed_all_the_same(machine: Machine, tmp_path: Path) -> None:
    (config := tmp_path / "own.toml").write_text('[camera]\nsource = "v4l2:0"\n')
    run = machine.run

    def without_udev(words: Sequence[str]) -> None:
        if words[0] == "udevadm":
            raise ServiceError(f"{' '.join(words)}: No such file or directory")
        run(words)

    machine.run = without_udev  # type: ignore[method-assign]
    service = machine.service()
    assert service.install(config) and service.can_start
    assert any("the rules for cameras hold from the next start on" in line for line in machine.lines)
    assert not machine.service().install(None), "nothing is left to do"


def test_everything_is_installed_once(machine: Machine, tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text('[camera]\nsource = "v4l2:0"\n')
    service = machine.service()
    assert service.install(config) and service.can_start
    assert machine.files() == {
        "etc/eyas/device.toml": "0o640",
        "etc/udev/rules.d/70-eyas-camera.rules": "0o644",
        "etc/systemd/system/eyas-device.service": "0o644",
        "etc/systemd/system/eyas-device-update.service": "0o644",
        "etc/systemd/system/multi-user.target.wants/eyas-device.service": "0o777",
        "etc/systemd/system/multi-user.target.wants/eyas-device-update.service": "0o777",
    }
    assert oct((machine.root / "var/lib/eyas").stat().st_mode & 0o777) == "0o750"
    unit = (machine.root / "etc/systemd/system/eyas-device.service").read_text()
    assert f"ExecStart={PROGRAM} run --config /etc/eyas/device.toml" in unit and "/opt/eyas/venv" not in unit
    updater = (machine.root / "etc/systemd/system/eyas-device-update.service").read_text()
    assert f"ExecStart={PROGRAM} update --watch --config /etc/eyas/device.toml" in updater
    assert machine.commands[-3:] == [
        "systemctl daemon-reload",
        "systemctl enable --quiet eyas-device",
        "systemctl enable --quiet eyas-device-update",
    ]
    again = machine.service()
    assert not again.install(config) and not again.install()
    assert (machine.lines, machine.commands) == ([], [])


def test_a_configuration_is_made_from_the_example_and_never_overwritten(machine: Machine, tmp_path: Path) -> None:
    service = machine.service()
    service.install()
    installed = machine.root / "etc/eyas/device.toml"
    assert installed.read_bytes() == EXAMPLE.read_bytes() and not service.can_start
    installed.write_text('[camera]\nsource = "v4l2:1"\n')
    machine.service().install()
    other = tmp_path / "other.toml"
    other.write_text('[camera]\nsource = "v4l2:0"\n')
    with pytest.raises(ServiceError, match=r"is there and differs from .*other\.toml: it stays"):
        machine.service().install(other)
    assert installed.read_text() == '[camera]\nsource = "v4l2:1"\n'


def test_a_configuration_with_errors_changes_nothing(machine: Machine, tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text("[camera]\nsauce = 1\n")
    with pytest.raises(ConfigError, match="sauce") as raised:
        machine.service().install(config)
    assert raised.value.exit_code == 78 and machine.files() == {} and machine.commands == []
    (machine.root / "etc/eyas").mkdir(parents=True)
    (machine.root / "etc/eyas/device.toml").write_text("[camera]\nsauce = 1\n")
    with pytest.raises(ConfigError, match="sauce"):
        machine.service().install()
    assert list(machine.files()) == ["etc/eyas/device.toml"]


def test_a_dry_run_changes_nothing(machine: Machine) -> None:
    assert machine.service(dry_run=True).install()
    assert machine.files() == {} and machine.commands == []
    assert "would write /etc/systemd/system/eyas-device.service" in machine.lines
    assert "would run systemctl enable --quiet eyas-device" in machine.lines


def test_an_installation_of_before_there_was_an_updater_gets_it(machine: Machine) -> None:
    machine.service().install()
    (machine.root / "etc/systemd/system/eyas-device-update.service").unlink()
    (machine.root / "etc/systemd/system/multi-user.target.wants/eyas-device-update.service").unlink()
    before = machine.service()
    assert before.install()
    assert machine.commands == ["systemctl daemon-reload", "systemctl enable --quiet eyas-device-update"]
    assert machine.service().uninstall() and list(machine.files()) == ["etc/eyas/device.toml"]


def test_the_agent_is_exchanged_by_releases_only_where_that_is_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServiceError, match="not an environment of `eyas flash`"):
        machine.service(agent_updates=True).install()
    with pytest.raises(ServiceError, match="without --name"):
        machine.service("press", agent_updates=True)
    monkeypatch.setattr(services, "program_for_service", lambda: "/opt/eyas/venv/bin/eyas-device")
    machine.service().install()
    assert not any("agent-update" in name for name in machine.files())
    assert machine.service(agent_updates=True).install() and not machine.service(agent_updates=True).install()
    for kind in ("path", "service"):
        unit = f"etc/systemd/system/eyas-device-agent-update.{kind}"
        wanted = f"etc/systemd/system/multi-user.target.wants/eyas-device-agent-update.{kind}"
        assert {unit, wanted} <= set(machine.files())
    machine.service().uninstall()
    config = machine.root / "etc/eyas/device.toml"
    config.write_text("[update]\nagent = true\n")
    assert machine.service().install() and not machine.service(agent_updates=True).install(), "the configuration asks"
    machine.service("press").install()
    assert machine.service().uninstall() and machine.service("press").uninstall()
    assert sorted(machine.files()) == ["etc/eyas/device.toml", "etc/eyas/devices/press.toml"]
    config.unlink()
    (new := machine.root / "new.toml").write_text("[update]\nagent = true\n")
    machine.service().install(new)
    new.unlink()
    assert any("agent-update.path" in name for name in machine.files()), "as that which is brought"
    (machine.root / "etc/eyas/devices/press.toml").unlink()
    assert machine.service().uninstall() and list(machine.files()) == ["etc/eyas/device.toml"]


def test_several_cameras(machine: Machine) -> None:
    for name in ("press", "line-7"):
        machine.service(name).install()
    files = machine.files()
    assert "etc/eyas/devices/press.toml" in files and "etc/systemd/system/eyas-device@.service" in files
    assert (machine.root / "var/lib/eyas/devices/line-7").is_dir()
    assert "etc/systemd/system/eyas-device-update@.service" in files
    assert machine.service("press").uninstall()
    for unit in ("eyas-device@", "eyas-device-update@"):
        assert f"etc/systemd/system/{unit}.service" in machine.files(), "line-7 needs it"
    assert machine.service("line-7").uninstall()
    assert machine.commands[:2] == [
        "systemctl disable --now --quiet eyas-device-update@line-7",
        "systemctl disable --now --quiet eyas-device@line-7",
    ]
    assert set(machine.files()) == {"etc/eyas/devices/press.toml", "etc/eyas/devices/line-7.toml"}
    assert not machine.service("press").uninstall()


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 65, "%n", "\x1b[2J"])
def test_names_that_are_none(name: str, machine: Machine) -> None:
    if name:
        with pytest.raises(ServiceError, match="--name"):
            machine.service(name)


def test_without_systemd_and_without_root(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ServiceError, match=r"root is needed: sudo .* service"):
        machine.service().install()
    shutil.rmtree(machine.root / "run")
    with pytest.raises(ServiceError, match="systemd does not run here"):
        machine.service(dry_run=True).install()


@pytest.mark.parametrize("prefix", ["/home/pi/eyas", "/root/eyas", "/tmp/eyas"])
def test_an_environment_that_the_service_cannot_see(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    with pytest.raises(ServiceError, match=f"{prefix}: the hardened service does not see /home, /root"):
        program_for_service()


def test_the_link_to_an_environment_that_was_flashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "venv-1").mkdir()
    (tmp_path / "venv").symlink_to("venv-1")
    monkeypatch.setattr(services, "_PROGRAM", str(tmp_path / "venv/bin/eyas-device"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv-1"))
    assert program_for_service() == str(tmp_path / "venv/bin/eyas-device")


def test_what_root_has_put_there_becomes_the_service_s(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.root / "var/lib/eyas/slots").mkdir(parents=True)
    owned: list[str] = []
    monkeypatch.setattr(os, "chown", lambda path, user, group, **options: owned.append(str(path)))
    monkeypatch.setattr(
        services.pwd, "getpwnam", lambda name: services.pwd.struct_passwd(["e", "x", "4242", "4242", "e", "/", "sh"])
    )
    machine.service().install()
    assert "give /var/lib/eyas to " + getpass.getuser() in machine.lines
    assert str(machine.root / "var/lib/eyas/slots") in owned


def test_the_verb_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["service", "remove"]) == 2
    assert "invalid choice: 'remove'" in capsys.readouterr().err
    assert main(["service", "uninstall", "--now"]) == 2
    assert "--config, --agent-updates and --now are for `service install`" in capsys.readouterr().err


def test_the_rules_are_plain() -> None:
    lines = [line for line in RULES.read_text().splitlines() if line and not line.startswith("#")]
    rule = re.compile(r'(SUBSYSTEM|KERNEL)=="\w+", GROUP="video", MODE="0660"')
    assert len(lines) == 3 and all(rule.fullmatch(line) for line in lines)
