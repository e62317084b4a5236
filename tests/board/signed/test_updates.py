"""Signed updates under a real systemd: over the air, from a stick, in a rollout, and of the agent itself.

The board's units are those of `eyas flash` and `eyas-device service install`, and what it updates from was published by
the workstation's own commands. The tests are steps of one board's life, in this order.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_device import __version__
from eyas_device.agent.service import AGENT_UNITS, PACKAGE, UPDATER
from tests.support.fleet_parts import open_folder  # noqa: F401 - fixture
from tests.support.paths import ROOT
from tests.support.tiny_updates import write_update
from tests.support.wheels import build

from ..flashing import DEVICE
from ..machine import Computer
from ..native import NativeBoard
from ..service import SERVICE, WAIT_S, answering, ask, shown, wait_for
from .publishing import (
    SLOW_S,
    UPDATE,
    Publisher,
    committed,
    look,
    manifest_of,
    next_number,
    stick_files,
    update_log,
    wrong_files,
)


def test_its_units_are_those_of_the_package_and_hardened(board: Computer, report: Callable[[str], None]) -> None:
    """`eyas flash` has brought them, root's for the agent too, as the configuration asks: `service install` agrees."""
    install = "/opt/eyas/venv/bin/eyas-device service install"
    assert "eyas-device is installed as it should be" in board.run(install, timeout=WAIT_S).stdout
    gone = " ".join(f"/etc/systemd/system/{unit.name}" for unit in AGENT_UNITS)
    board.run(f"systemctl disable --now --quiet {' '.join(unit.name for unit in AGENT_UNITS)}; rm {gone}")
    done = board.run(install, timeout=WAIT_S).stdout
    assert "write /etc/systemd/system/eyas-device-agent-update.path" in done, done
    assert "run systemctl enable --quiet eyas-device-agent-update.path" in done, done
    board.run("systemctl start eyas-device-agent-update.path")
    units = (UPDATER, *AGENT_UNITS, PACKAGE / "eyas-device.service")
    for unit in units:
        assert board.run(f"cat /etc/systemd/system/{unit.name}").stdout == unit.read_text(), unit.name
    names = " ".join(unit.name for unit in units)
    assert set(board.run(f"systemctl is-enabled {names}").stdout.split()) == {"enabled"}
    doubts = board.run(f"systemd-analyze verify {names} 2>&1; true", timeout=WAIT_S).stdout.splitlines()
    assert [line for line in doubts if "Unknown key 'Restart" not in line] == [], "keys of systemd 254"
    for unit in (UPDATER, AGENT_UNITS[0]):
        lines = board.run(f"systemd-analyze security --no-pager {unit.name}", timeout=WAIT_S).stdout.splitlines()
        report(lines[-1].strip())
        assert float(lines[-1].split("service:")[1].split()[0]) <= 4.0
    wait_for("the updater runs", lambda: board.run(f"systemctl is-active {UPDATE}", check=False).stdout == "active\n")


def test_a_second_camera_has_an_updater_of_its_own(board: Computer) -> None:
    """The template's paths: it starts, looks, and finds no model to follow."""
    config = board.run("sed 's/^name = .*/name = \"second\"/' /etc/eyas/device.toml").stdout
    board.run("mkdir -p /etc/eyas/devices && cat >/etc/eyas/devices/second.toml", stdin=config)
    board.run("chgrp eyas /etc/eyas/devices/second.toml && chmod 640 /etc/eyas/devices/second.toml")
    try:
        install = "/opt/eyas/venv/bin/eyas-device service install --name second"
        board.run(install, timeout=WAIT_S)
        unit = f"{UPDATE}@second"
        board.run(f"systemctl start {unit}")
        wait_for("its look", lambda: "no model is installed yet" in update_log(board, unit), SLOW_S)
        assert "Permission denied" not in update_log(board, unit)
        state = "/var/lib/eyas/devices/second"
        assert "metadata" in board.run(f"ls {state} {state}/*").stdout
    finally:
        board.run("/opt/eyas/venv/bin/eyas-device service uninstall --name second", timeout=WAIT_S)
        board.run("rm /etc/eyas/devices/second.toml")


def test_it_updates_over_the_air_and_commits_after_a_probation_on_its_camera(
    board: Computer, publisher: Publisher, versions: Callable[[str], Path], report: Callable[[str], None]
) -> None:
    before, version = answering(board), next_number(board)
    publisher.publish(versions(version), "--channel", "stable")
    since = time.monotonic()
    look(board)
    committed(board, version)
    report(f"over the air: {version} installed, proven on the camera and committed in {time.monotonic() - since:.0f} s")
    after = answering(board, before)
    assert after.model.name == f"tiny-shapes {version}"
    assert after.pid == before.pid and shown(board, "NRestarts") == "0", "the agent has only changed its model"
    assert wrong_files(board, publisher.repository) == ""
    log = update_log(board)
    assert f"installing tiny-shapes {version}" in log and "Traceback" not in log, log
    publisher.reported(DEVICE, version, "committed")
    said = board.run("/opt/eyas/venv/bin/eyas-device update --status", timeout=WAIT_S).stdout
    assert f"tiny-shapes {version}" in said and ": committed" in said, said
    assert board.run(f"systemctl show --property=NRestarts --value {UPDATE}").stdout == "0\n"


@pytest.mark.parametrize("kind", ["native"], indirect=True)
def test_a_stick_is_installed_by_the_documented_unit(
    board: NativeBoard, publisher: Publisher, versions: Callable[[str], Path], tmp_path: Path
) -> None:
    """Here udev does not start it: `test_cuts.py` plugs one in."""
    version = next_number(board)
    board.run(f"systemctl stop {UPDATE}")
    (stick := tmp_path / "stick").mkdir()
    publisher.publish(versions(version), "--channel", "stable", "--to", str(stick / "eyas"))
    unit = next(path for path in stick_files() if path.endswith(".service"))
    board.run(f"cat >{unit}", stdin=stick_files()[unit])
    board.run("systemctl daemon-reload")
    with board.disk(stick, tmp_path / "stick.img") as name:
        board.run(f"systemctl start eyas-stick@{name}", timeout=WAIT_S)
    assert manifest_of(board)["version"] == version
    wait_for("it runs", lambda: (s := ask(board)) and s.model.name.endswith(version))
    assert wrong_files(board, publisher.repository) == ""
    assert f"installing tiny-shapes {version}" in update_log(board, "eyas-stick@*")
    publisher.reported(DEVICE, version, "committed")
    assert "eyas-stick" not in board.run("cat /proc/mounts").stdout, "nobody else sees the stick"
    look(board)


@pytest.mark.timeout(3600)
def test_it_takes_part_in_rollouts_beside_simulated_devices(
    board: Computer,
    publisher: Publisher,
    versions: Callable[[str], Path],
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    """A version that is wrong on real frames stops with the board, which alone had it; the next one reaches all."""
    earlier = manifest_of(board)["version"]
    wrong, right = next_number(board), next_number(board, 2)
    names = ("cam-1", "cam-2", "cam-3")
    devices = publisher.start_devices(versions(earlier), names)
    for name in names:
        publisher.reported(name, earlier, "idle")
    publisher.publish(write_update(tmp_path / "wrong", wrong, "wrong"))
    publisher.publish(versions(right))
    publisher.run_rollouts()
    waves = ("--waves", "canary=100%,100%", "--wait", "1")
    for version, until in ((wrong, "aborted"), (right, "finished")):
        publisher.type("rollout", "start", version, *waves, kit=True, signs=True, store=True)
        since = time.monotonic()
        publisher.rolled_out(until)
        report(f"\n$ eyas rollout status  # {time.monotonic() - since:.0f} s after its start")
        report(publisher.type("rollout", "status", store=True))
        if version == wrong:
            assert not any(wrong in device.versions for device in devices), "none but the board's group had it"
            publisher.reported(DEVICE, earlier, "committed")
            assert wrong in publisher.statuses()[DEVICE].refused_model
    for name in (DEVICE, *names):
        publisher.reported(name, right, "committed")
    assert [device.version for device in devices] == [right] * 3
    assert manifest_of(board)["version"] == right and shown(board, "NRestarts") == "0"
    report("\n$ eyas fleet")
    report(publisher.type("fleet", store=True))


@pytest.mark.timeout(3600)
def test_the_agent_itself_is_exchanged_by_a_signed_release(
    board: Computer, publisher: Publisher, kind_wheels: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Root's unit has no network, and starts because the updater, another user, has collected the wheels."""
    new, machine = newer_wheels(kind_wheels, tmp_path, "90.1.0"), board.run("uname -m").stdout.strip()
    publisher.type("publish-agent", f"cp311-{machine}={new}", "--channel", "stable", kit=True, signs=True)
    since = time.monotonic()
    look(board)

    def runs() -> bool:
        status = publisher.statuses()[DEVICE]
        return status.agent == "90.1.0" and status.state == "online"

    wait_for("the store says that the new agent runs", runs, 1800)
    wait_for(
        "it is committed", lambda: '"committed"' in board.run("cat /var/lib/eyas-agent/updates/update.json").stdout
    )
    report(
        f"the agent itself, {__version__} -> 90.1.0: built, proven and committed in {time.monotonic() - since:.0f} s"
    )
    assert answering(board).model.name == f"tiny-shapes {manifest_of(board)['version']}"
    unit = AGENT_UNITS[0].name
    assert board.run(f"systemctl show --property=Result --value {unit}").stdout == "success\n"
    assert "Traceback" not in update_log(board, unit)
    assert SERVICE in board.run("systemctl list-units --state=active --plain 'eyas*'").stdout
    report(publisher.type("fleet", store=True))


def newer_wheels(wheels: Path, folder: Path, version: str) -> Path:
    """The same wheels with an agent of another version."""
    source = folder / "source/device"
    shutil.copytree(ROOT / "device", source, ignore=shutil.ignore_patterns("__pycache__"))
    own = source / "eyas_device/__init__.py"
    own.write_text(own.read_text().replace(f'"{__version__}"', f'"{version}"'))
    new = folder / "wheels"
    shutil.copytree(wheels, new, ignore=shutil.ignore_patterns("eyas_device-*"))
    build(source, folder / "built")
    shutil.copy(next((folder / "built").glob("*.whl")), new)
    return new
