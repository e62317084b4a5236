"""Issue a device's credentials: certificate and key in a tar archive, and a section for its device.toml."""

from __future__ import annotations

import tarfile
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import check_name
from eyas_host.fleet.broker.kit import HOST_IDENTITY
from eyas_host.fleet.broker.pki import CLIENT_DAYS, Authority, Credentials

DEVICE_FOLDER = "/etc/eyas/credentials"
"""Folder of the credentials on the device."""


class Enrolled(msgspec.Struct, frozen=True):
    """Credentials issued to a device."""

    credentials: Credentials
    archive: Path
    section: str
    """Section for its device.toml."""


def enroll(
    folder: Path, name: str, *, site: str = "default", broker: str = "BROKER:8883", days: float = CLIENT_DAYS
) -> Enrolled:
    """Issue credentials for a device, valid for `days`; earlier ones stay valid until they expire.

    Raises `LinkError` for an invalid name, `CredentialError` if the files cannot be written.
    """
    for kind, value in (("device", name), ("site", site)):
        try:
            check_name(value)
        except ValueError as error:
            raise LinkError(f"{kind} {error}") from None
        if value in (".", ".."):
            raise LinkError(f"{kind} {value!r}: not a name; choose another one")
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: reserved for the host; choose another name")
    own = folder / "devices" / name
    credentials = Authority(folder / "ca").issue(own, name, days=days)
    section = _section(name, site, broker)
    (own / "device.toml").write_text(section, encoding="utf-8")
    archive = own.with_name(f"{name}.tar")
    archive.unlink(missing_ok=True)
    archive.touch(mode=0o600)
    with tarfile.open(archive, "w") as tar:
        for file in (credentials.ca, credentials.cert, credentials.key):
            tar.add(file, arcname=f"credentials/{file.name}")
        tar.add(own / "device.toml", arcname="credentials/device.toml")
    return Enrolled(credentials, archive, section)


def _section(name: str, site: str, broker: str) -> str:
    return f"""\
[device]
site = "{site}"
name = "{name}"

[telemetry]
broker = "{broker}"
ca = "{DEVICE_FOLDER}/ca.crt"
certificate = "{DEVICE_FOLDER}/client.crt"
key = "{DEVICE_FOLDER}/client.key"
"""
