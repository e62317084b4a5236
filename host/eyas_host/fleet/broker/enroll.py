"""Issue a device's credentials: certificate and key in a tar archive, and a section for its device.toml."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import check_name, parse_broker
from eyas_host.fleet.broker.kit import DEVICES, HOST_IDENTITY, open_authority
from eyas_host.fleet.broker.pki import CLIENT_DAYS, CredentialError, Credentials, write_file

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
    """Issue credentials for a device, valid for `days`; earlier ones stay valid until they expire or it is expelled.

    Raises `LinkError` for an invalid name or address, `CredentialError` if the files cannot be written or signed.
    """
    for kind, value in (("device", name), ("site", site)):
        try:
            check_name(value)
        except ValueError as error:
            raise LinkError(f"{kind} {error}") from None
        if value in (".", ".."):
            raise LinkError(f"{kind} {value!r}: not a name; choose another one")
    try:
        parse_broker(broker)
    except ValueError as error:
        raise LinkError(f"--broker {error}") from None
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: reserved for the host; choose another name")
    own = folder / DEVICES / name
    credentials = open_authority(folder).issue(own, name, days=days)
    section, archive = _section(name, site, broker), own.with_name(f"{name}.tar")
    write_file(own / "device.toml", section.encode())
    packed = io.BytesIO()
    try:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in (credentials.ca, credentials.cert, credentials.key, own / "device.toml"):
                tar.add(file, arcname=f"credentials/{file.name}")
    except OSError as error:
        raise CredentialError(f"{own}: cannot be read ({error.strerror})") from None
    write_file(archive, packed.getvalue(), private=True)
    return Enrolled(credentials, archive, section)


def _section(name: str, site: str, broker: str) -> str:
    telemetry = {
        "broker": broker,
        "ca": f"{DEVICE_FOLDER}/ca.crt",
        "certificate": f"{DEVICE_FOLDER}/client.crt",
        "key": f"{DEVICE_FOLDER}/client.key",
    }
    return msgspec.toml.encode({"device": {"site": site, "name": name}, "telemetry": telemetry}).decode()
