"""Issue a device's credentials: certificate and key in a tar archive, and a section for its device.toml."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_device.support.names import BrokerAddress, check_name, check_site, parse_broker
from eyas_host.fleet.broker.kit import DEVICES, HOST_IDENTITY, device_address, open_authority
from eyas_host.fleet.broker.pki import CLIENT_DAYS, CredentialError, Credentials, write_file

DEVICE_FOLDER = "/etc/eyas/credentials"
"""Folder of the credentials on the device."""
SERVICE_GROUP = "eyas"
"""Group of the device's service, which has to read the private key."""
_CAMERA = """\
# The service needs a camera; device.example.toml explains each key.
#[camera]
#source = "v4l2:0"
"""


class Enrolled(msgspec.Struct, frozen=True):
    """Credentials issued to a device."""

    credentials: Credentials
    archive: Path
    section: str
    """Sections for its device.toml."""
    broker: BrokerAddress | None
    """Address in them: as given, else of the kit in the folder; None if neither is known."""


def enroll(
    folder: Path, name: str, *, site: str = "default", broker: str | None = None, days: float = CLIENT_DAYS
) -> Enrolled:
    """Issue credentials for a device, valid for `days`; earlier ones stay valid until they expire or it is expelled.

    The device's broker is that of the kit in `folder`, unless `broker` names another one. Raises `LinkError` for an
    invalid name or address, `CredentialError` if the files cannot be written or signed.
    """
    for kind, check, value in (("device", check_name, name), ("site", check_site, site)):
        try:
            check(value)
        except ValueError as error:
            raise LinkError(f"{kind} {error}") from None
    address = device_address(folder)
    if broker is not None:
        try:
            address = parse_broker(broker, tls=True)
        except ValueError as error:
            raise LinkError(f"--broker {error}") from None
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: reserved for the host; choose another name")
    own = folder / DEVICES / name
    credentials = open_authority(folder).issue(own, name, days=days)
    section, archive = _section(name, site, str(address or "")), own.with_name(f"{name}.tar")
    write_file(own / "device.toml", section.encode())
    packed = io.BytesIO()
    try:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in (credentials.ca, credentials.cert, credentials.key, own / "device.toml"):
                info = tar.gettarinfo(file, arcname=f"credentials/{file.name}")
                with file.open("rb") as stream:
                    tar.addfile(_for_service(info, 0o640 if file == credentials.key else 0o644), stream)
    except OSError as error:
        raise CredentialError(f"{own}: cannot be read ({error.strerror})") from None
    write_file(archive, packed.getvalue(), private=True)
    return Enrolled(credentials, archive, section, address)


def _for_service(info: tarfile.TarInfo, mode: int) -> tarfile.TarInfo:
    """A member of the archive that the service may read: `tar`, run by root, goes by the group's name."""
    info.mode = mode
    info.uid = info.gid = 0
    info.uname, info.gname = "root", SERVICE_GROUP
    return info


def _section(name: str, site: str, broker: str) -> str:
    telemetry = {
        **({"broker": broker} if broker else {}),
        "ca": f"{DEVICE_FOLDER}/ca.crt",
        "certificate": f"{DEVICE_FOLDER}/client.crt",
        "key": f"{DEVICE_FOLDER}/client.key",
    }
    section = msgspec.toml.encode({"device": {"site": site, "name": name}, "telemetry": telemetry}).decode()
    return f"{section.rstrip()}\n\n{_CAMERA}"
