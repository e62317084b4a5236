"""What tells one machine from another: a hash of its board, and the device's default name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from eyas_device.board.reading import ROOT, text
from eyas_device.support.names import host_name

FACTORY_NAMES = {
    *("raspberrypi", "debian", "ubuntu", "localhost", "jetson", "nvidia", "nvidia-desktop", "tegra-ubuntu", "orangepi"),
    *("rockpi", "beaglebone", "armbian", "dietpi", "fedora", "alpine", "buildroot"),
}
"""Host names that an operating system's image brings along: many machines have them."""
_LENGTH = 12
_SUFFIX = 6
_NO_SERIALS = ("", "0", "none", "unknown", "default string", "to be filled by o.e.m.")


@lru_cache(maxsize=1)
def machine() -> str:
    """Hash of this machine's identity, 12 hexadecimal digits; empty if it has none."""
    return machine_hash(ROOT)


def machine_hash(root: Path) -> str:
    """Hash of the board's serial number, else of the machine id and the first built-in network interface.

    A card that was copied into another board has that board's hash, and a board with a new card keeps its own. What
    only root can read is not used: service and shell must agree.
    """
    serial = _serial(root)
    parts = [serial] if serial else [text(root / "etc/machine-id") or "", min(_permanent_addresses(root), default="")]
    if not any(parts):
        return ""
    return hashlib.sha256("\0".join(["eyas machine", *parts]).encode()).hexdigest()[:_LENGTH]


def default_name(host: str | None = None, identity: str | None = None) -> str:
    """The device's default name: the host's, with six digits of the machine's hash if that is a factory default."""
    name = host_name() if host is None else host
    if name.split(".")[0].lower() not in FACTORY_NAMES:
        return name
    identity = machine() if identity is None else identity
    return f"{name[: 63 - _SUFFIX]}-{identity[:_SUFFIX]}" if identity else name


def _serial(root: Path) -> str:
    for path in ("sys/firmware/devicetree/base/serial-number", "proc/device-tree/serial-number"):
        serial = (text(root / path) or "").lower()
        if serial.strip("0") and serial not in _NO_SERIALS:
            return serial
    return ""


def _permanent_addresses(root: Path) -> Iterator[str]:
    """Hardware addresses of built-in interfaces: one on USB may be in another machine tomorrow."""
    interfaces = root / "sys/class/net"
    try:
        names = sorted(interfaces.iterdir())
    except OSError:
        return
    for interface in names:
        device = interface / "device"
        address = text(interface / "address") or ""
        if not device.exists() or "/usb" in str(device.resolve()) or address.strip("0:") == "":
            continue
        if text(interface / "addr_assign_type") in (None, "0"):  # 0: permanent, not random
            yield address
