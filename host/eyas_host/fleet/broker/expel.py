"""Lock a device out of the fleet: revoke all certificates that it was ever issued."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eyas_device.errors import LinkError
from eyas_host.fleet.broker.kit import AUTHORITY, BROKER, DEVICES, HOST_IDENTITY
from eyas_host.fleet.broker.pki import Authority, CredentialError, exists, serial_number
from eyas_host.fleet.broker.revocation import LIST, hand_to_broker, revoke


class Expelled(msgspec.Struct, frozen=True):
    """What `expel` did."""

    certificates: int
    """Revoked now; 0 if all of them were revoked before."""
    crl: Path
    """The signed list, for a broker on another machine."""
    broker_crl: Path | None
    """Its copy for this machine's broker, None if the folder has none."""


def expel(folder: Path, name: str) -> Expelled:
    """Revoke every certificate of a device; `eyas enroll` may issue it a new one.

    Raises `LinkError` for a device that was never enrolled here, `CredentialError` without the authority's key.
    """
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: reserved for the host; collectors would be locked out")
    authority = Authority(folder / AUTHORITY, create=False)
    serials = {int(issued.serial, 16): name for issued in authority.issued() if issued.name == name}
    certificate = folder / DEVICES / name / "client.crt"
    if name in _enrolled(folder) and exists(certificate):
        serials[serial_number(certificate)] = name
    if not serials:
        known = ", ".join(_enrolled(folder)[:20]) or "none"
        raise LinkError(f"device {name!r}: it was never enrolled in {folder}; enrolled devices: {known}")
    new = revoke(authority, serials)
    broker = folder / BROKER
    copy = hand_to_broker(authority, broker) if exists(broker) else None
    return Expelled(len(new), authority.folder / LIST, copy)


def _enrolled(folder: Path) -> list[str]:
    devices = folder / DEVICES
    try:
        return sorted(path.name for path in devices.iterdir() if path.is_dir()) if exists(devices) else []
    except OSError as error:
        raise CredentialError(f"{devices}: cannot be read ({error.strerror}); see to its permissions") from None
