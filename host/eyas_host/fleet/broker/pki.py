"""A fleet's own certificate authority: ECDSA P-256 keys, certificates for the broker, the host and each device.

Private keys are readable by their owner only. The CA key never leaves its folder: keep it on the administrator's
machine, not on an exposed broker.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from eyas_device.errors import EyasError

CA_DAYS, SERVER_DAYS, CLIENT_DAYS = 3650, 825, 825
"""Lifetimes. Nobody is on site to renew a certificate: doctor warns early, `eyas enroll` issues new ones."""
_BACKDATED = timedelta(days=1)
"""A device whose clock is slightly behind must accept a new certificate."""


class CredentialError(EyasError, OSError):
    """Credentials cannot be created, read or written."""


class Credentials(msgspec.Struct, frozen=True):
    """Paths of a client's or server's three files."""

    ca: Path
    cert: Path
    key: Path


class Authority:
    """Certificate authority in `folder`, which signs certificates; created at the first use.

    Raises `CredentialError` if they cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.cert = folder / "ca.crt"
        key = folder / "ca.key"
        try:
            if not key.exists():
                folder.mkdir(parents=True, exist_ok=True)
                self._create(key)
            loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
            if not isinstance(loaded, ec.EllipticCurvePrivateKey):
                raise ValueError("not an elliptic-curve key")
            self._key, self._self = loaded, x509.load_pem_x509_certificate(self.cert.read_bytes())
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CredentialError(
                f"{folder}: no certificate authority ({error}); remove the folder to create a new one"
            ) from None

    def issue(
        self, folder: Path, name: str, *, hosts: Iterable[str] = (), days: float | None = None, stem: str = "client"
    ) -> Credentials:
        """Issue `stem`.key, `stem`.crt and ca.crt in `folder`, for a server (with `hosts`) or a client.

        Args:
            folder: Folder of the files.
            name: Common name.
            hosts: Names and addresses of a server.
            days: Lifetime; by default that of a server or client.
            stem: Name of the files without suffix.

        Raises:
            CredentialError: the files cannot be written.

        """
        hosts = tuple(hosts)
        key = ec.generate_private_key(ec.SECP256R1())
        lifetime = timedelta(days=days if days is not None else (SERVER_DAYS if hosts else CLIENT_DAYS))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(name, self._self.subject, lifetime)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        issued = Credentials(folder / "ca.crt", folder / f"{stem}.crt", folder / f"{stem}.key")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_private(issued.key, _pem(key))
            issued.cert.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
            issued.ca.write_bytes(self.cert.read_bytes())
        except OSError as error:
            raise CredentialError(f"{folder}: cannot be written ({error.strerror})") from None
        return issued

    def _create(self, path: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"Eyas fleet {os.urandom(4).hex()}"
        builder = (
            _builder(name, _name(name), timedelta(days=CA_DAYS))
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        signed = builder.sign(key, hashes.SHA256())
        self.cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        write_private(path, _pem(key))


def days_left(cert: Path) -> float:
    """Days until a certificate expires. Raises `CredentialError` if it cannot be read."""
    try:
        loaded = x509.load_pem_x509_certificate(cert.read_bytes())
    except (OSError, ValueError) as error:
        raise CredentialError(f"{cert}: not a certificate ({error})") from None
    return (loaded.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def write_private(path: Path, data: bytes) -> None:
    """Write a file that is readable by its owner only, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)


def _builder(name: str, issuer: x509.Name, lifetime: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + lifetime
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _BACKDATED)
        .not_valid_after(end)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
