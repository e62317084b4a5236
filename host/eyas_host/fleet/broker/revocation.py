"""The list of revoked certificates: signed by the authority, read by the broker.

A broker rejects everybody while its list is expired or of the future. So a list ends with the authority, and begins
with it, a second later for each list: OpenSSL takes the latest, and no clock is asked. Each entry names its device, so
that a broker without the authority's record knows whom to disconnect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from eyas_host.fleet.broker.pki import Authority, CredentialError, read_file, write_file

LIST = "ca.crl"
"""Name of the list, in the authority's folder and in the broker's."""
_DEVICE = x509.ObjectIdentifier("2.25.211287926534219466518293547152964270893")
"""Extension of an entry with the device's name, an identifier from a random UUID; other programs ignore it."""


def load_list(path: Path, ca: x509.Certificate) -> x509.CertificateRevocationList | None:
    """Read a list, None if there is none. Raises `CredentialError` if it is damaged or of another authority."""
    try:
        loaded = x509.load_pem_x509_crl(path.read_bytes())
        valid = loaded.is_signature_valid(ca.public_key())  # type: ignore[arg-type]  # an authority signs
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CredentialError(f"{path}: cannot be read ({error.strerror}); see to its permissions") from None
    except (ValueError, TypeError) as error:
        raise CredentialError(f"{path}: damaged ({error}); copy it again from the authority's {LIST}") from None
    if not valid:
        raise CredentialError(f"{path}: not signed by this fleet's authority; copy it again from there")
    return loaded


def revoked(crl: x509.CertificateRevocationList | None) -> dict[int, str]:
    """Serial number -> name of the device, of all entries."""
    return {entry.serial_number: _device(entry) for entry in crl or ()}


def revoke(authority: Authority, serials: Mapping[int, str]) -> list[int]:
    """Add certificates (serial number -> device) to the authority's list, creating it, and return the new ones.

    Raises `CredentialError` if the authority's key is not here, or the list cannot be read or written.
    """
    path = authority.folder / LIST
    with authority.locked():
        current = load_list(path, authority.certificate)
        before = revoked(current)
        new = [serial for serial in serials if serial not in before]
        if current is None or new:
            write_file(path, _sign(authority, {**before, **serials}, 1 + number(current)))
    return new


def number(crl: x509.CertificateRevocationList | None) -> int:
    """The list's own number, which grows with each one; 0 for none."""
    return 0 if crl is None else crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def hand_to_broker(authority: Authority, broker: Path) -> Path | None:
    """Copy the authority's list into the broker's folder unless a newer one is there; None if there is none at all.

    Raises `CredentialError` if a list cannot be read or written.
    """
    own, copy = authority.folder / LIST, broker / LIST
    ours, theirs = (load_list(path, authority.certificate) for path in (own, copy))
    if ours is not None and number(ours) > number(theirs):
        write_file(copy, read_file(own))
    return copy if ours is not None or theirs is not None else None


def _sign(authority: Authority, entries: Mapping[int, str], number: int) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder(revoked_certificates=list(_entries(entries)))
        .issuer_name(authority.certificate.subject)
        .last_update(authority.certificate.not_valid_before_utc + timedelta(seconds=number))
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _entries(entries: Mapping[int, str]) -> Iterable[x509.RevokedCertificate]:
    now = datetime.now(UTC)
    for serial, device in entries.items():
        name = x509.UnrecognizedExtension(_DEVICE, b"\x0c" + bytes([len(device)]) + device.encode())  # a UTF8String
        builder = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        yield builder.add_extension(name, critical=False).build()


def _device(entry: x509.RevokedCertificate) -> str:
    try:
        extension = entry.extensions.get_extension_for_oid(_DEVICE).value
    except x509.ExtensionNotFound:
        return ""
    return extension.value[2:].decode() if isinstance(extension, x509.UnrecognizedExtension) else ""
