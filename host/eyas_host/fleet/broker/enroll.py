"""A device's credentials: a folder and a tar archive to bring there, and what goes into its device.toml."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import NAME
from eyas_host.fleet.broker.kit import HOST_IDENTITY
from eyas_host.fleet.broker.pki import CLIENT_DAYS, Authority, Credentials

THERE = "/etc/eyas/credentials"
"""Where they lie on the device."""


class Enrolled(msgspec.Struct, frozen=True):
    """What was made for a device."""

    credentials: Credentials
    archive: Path
    section: str
    """Of its device.toml."""


def enroll(
    folder: Path, name: str, *, site: str = "default", broker: str = "BROKER:8883", days: float = CLIENT_DAYS
) -> Enrolled:
    """Make credentials for a device, valid for `days`; those it had stay valid until they expire.

    Raises `LinkError` for a name that no device may have, `CredentialError` if they cannot be written.
    """
    for what, given in (("device", name), ("site", site)):
        if not re.fullmatch(NAME, given, re.ASCII) or given in (".", ".."):
            raise LinkError(f"{what} {given!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed")
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: this name is the host's; give another one")
    place = folder / "devices" / name
    made = Authority(folder / "ca").issue(place, name, days=days)
    section = _section(name, site, broker)
    (place / "device.toml").write_text(section, encoding="utf-8")
    archive = place.with_name(f"{name}.tar")
    archive.unlink(missing_ok=True)
    archive.touch(mode=0o600)
    with tarfile.open(archive, "w") as tar:
        for file in (made.ca, made.cert, made.key):
            tar.add(file, arcname=f"credentials/{file.name}")
        tar.add(place / "device.toml", arcname="credentials/device.toml")
    return Enrolled(made, archive, section)


def _section(name: str, site: str, broker: str) -> str:
    return f"""\
[device]
site = "{site}"
name = "{name}"

[telemetry]
broker = "{broker}"
ca = "{THERE}/ca.crt"
certificate = "{THERE}/client.crt"
key = "{THERE}/client.key"
"""
