"""What tells machines apart: cards that were copied, boards without a serial number, hosts with a factory's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eyas_device.board.identity import default_name, machine_hash
from eyas_device.support.names import check_name


def board(root: Path, *, serial: str = "", machine_id: str = "", **interfaces: tuple[str, str]) -> Path:
    """A machine's files; interfaces are name=(hardware address, bus)."""

    def write(path: str, text: str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    root.mkdir()
    if serial:
        write("sys/firmware/devicetree/base/serial-number", f"{serial}\0")
    if machine_id:
        write("etc/machine-id", f"{machine_id}\n")
    for name, (address, bus) in interfaces.items():
        write(f"sys/class/net/{name}/address", f"{address}\n")
        write(f"sys/class/net/{name}/addr_assign_type", "0\n")
        (root / f"sys/devices/{bus}/{name}").mkdir(parents=True)
        (root / f"sys/class/net/{name}/device").symlink_to(root / f"sys/devices/{bus}/{name}")
    return root


def test_a_copied_card_in_two_boards(tmp_path: Path) -> None:
    one = board(tmp_path / "a", serial="10000000aaaa0001", machine_id="same")
    two = board(tmp_path / "b", serial="10000000aaaa0002", machine_id="same")
    assert machine_hash(one) != machine_hash(two)
    assert re.fullmatch(r"[0-9a-f]{12}", machine_hash(one))


def test_a_new_card_in_the_same_board(tmp_path: Path) -> None:
    one = board(tmp_path / "a", serial="10000000aaaa0001", machine_id="old")
    assert machine_hash(one) == machine_hash(board(tmp_path / "b", serial="10000000AAAA0001", machine_id="new"))


def test_without_a_serial_number_a_copied_disk_is_told_by_the_network_interface(tmp_path: Path) -> None:
    one = board(tmp_path / "a", machine_id="same", eth0=("aa:00:00:00:00:01", "pci"))
    two = board(tmp_path / "b", machine_id="same", eth0=("aa:00:00:00:00:02", "pci"))
    dongle = board(
        tmp_path / "c", machine_id="same", eth0=("aa:00:00:00:00:01", "pci"), wlan1=("00:00:00:00:00:03", "usb1")
    )
    assert machine_hash(one) != machine_hash(two)
    assert machine_hash(one) == machine_hash(dongle), "what is plugged in changes nothing"


@pytest.mark.parametrize("serial", ["0000000000000000", "None", "To Be Filled By O.E.M."])
def test_a_serial_number_that_is_none(tmp_path: Path, serial: str) -> None:
    one = board(tmp_path / "a", serial=serial, machine_id="one")
    two = board(tmp_path / "b", serial=serial, machine_id="two")
    assert machine_hash(one) != machine_hash(two)


def test_a_machine_without_anything(tmp_path: Path) -> None:
    assert machine_hash(board(tmp_path / "a")) == ""


@pytest.mark.parametrize("host", ["raspberrypi", "Ubuntu", "localhost.localdomain", "tegra-ubuntu"])
def test_a_factory_name_gets_six_digits(host: str) -> None:
    assert default_name(host, "0123456789ab") == f"{host}-012345"
    assert default_name(host, "") == host


@pytest.mark.parametrize("host", ["hall-2-cam", "raspberrypi-7", "myraspberrypi"])
def test_a_name_that_somebody_gave_stays(host: str) -> None:
    assert default_name(host, "0123456789ab") == host


def test_a_long_name_stays_one() -> None:
    check_name(default_name("localhost." + "x" * 54, "0123456789ab"))
