"""A fleet's own certificate authority: ECDSA P-256 keys, certificates for the broker, the host and each device.

Private keys are readable by their owner only. The authority's key is needed for signing alone, so it may be kept away
from an exposed broker. An authority of which a file is missing is never replaced: every device trusts the old one.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from eyas_device.errors import EyasError
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write, exclusive_lock

CA_DAYS, SERVER_DAYS, CLIENT_DAYS = 3650, 825, 825
"""Lifetimes. Nobody is on site to renew a certificate: doctor warns early, `eyas enroll` issues new ones."""
_BACKDATED = timedelta(days=1)
"""A device whose clock is slightly behind must accept a new certificate."""
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
_ISSUED = "issued.jsonl"
_CLOSED = "cannot be read ({}); see to its permissions"
_Parsed = TypeVar("_Parsed")


class CredentialError(EyasError, OSError):
    """Credentials cannot be created, read or written."""


class Credentials(msgspec.Struct, frozen=True):
    """Paths of a client's or server's three files."""

    ca: Path
    cert: Path
    key: Path


class Issued(msgspec.Struct, frozen=True):
    """A line of the authority's record of certificates."""

    name: str
    serial: str
    """Hexadecimal."""
    until: float
    """End of its lifetime, seconds since 1970."""


class Authority:
    """Certificate authority in `folder`, which signs certificates; `create` makes one where there is none.

    Raises `CredentialError` if it cannot be read or written, if it is damaged, and if its certificate is missing. Where
    its key is missing, `can_sign` is false, and whatever has to be signed raises `CredentialError`.
    """

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self.folder = folder
        self.cert, self._key_file = folder / "ca.crt", folder / "ca.key"
        there = [path for path in (self.cert, self._key_file) if exists(path)]
        if not there:
            if not create:
                raise CredentialError(f"{folder}: there is no certificate authority; `eyas broker` creates one")
            with self.locked():
                if not exists(self.cert):
                    self._create()
        elif there == [self._key_file]:
            raise CredentialError(
                f"{self.cert} is missing beside ca.key: copy it back, e.g. from host/ca.crt or devices/NAME/ca.crt"
            )
        self.certificate = _load(self.cert, x509.load_pem_x509_certificate)
        self._private = self._load_key() if exists(self._key_file) else None

    @property
    def can_sign(self) -> bool:
        """Whether the authority's key is here."""
        return self._private is not None

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """The key that signs. Raises `CredentialError` if it is not here."""
        if self._private is None:
            raise CredentialError(
                f"{self._key_file} is missing beside ca.crt, and something has to be signed now: put it back for this "
                "command; a new authority would lock every device out"
            )
        return self._private

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the authority's files. Raises `CredentialError` if that is impossible."""
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(self.folder / ".lock"))
            except OSError as error:
                raise CredentialError(f"{self.folder}: {_CLOSED.format(error.strerror)}") from None
            yield

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
            CredentialError: the files cannot be written, or the authority's key is not here.

        """
        hosts = tuple(hosts)
        signing, key = self.key, ec.generate_private_key(ec.SECP256R1())
        lifetime = timedelta(days=days if days is not None else (SERVER_DAYS if hosts else CLIENT_DAYS))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(name, self.certificate.subject, lifetime)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        cert = builder.sign(signing, hashes.SHA256())
        if not hosts:
            self._record(cert, name)
        files = Credentials(folder / "ca.crt", folder / f"{stem}.crt", folder / f"{stem}.key")
        # All of them are on the disk before the first replaces an older one.
        with (
            _replacing(files.key, _pem(key), private=True),
            _replacing(files.cert, cert.public_bytes(serialization.Encoding.PEM)),
            _replacing(files.ca, read_file(self.cert)),
        ):
            pass
        return files

    def issued(self) -> list[Issued]:
        """Every client's certificate that was issued, oldest first. Raises `CredentialError` for a damaged record."""
        path = self.folder / _ISSUED
        lines = read_file(path).splitlines() if exists(path) else []
        try:
            return [msgspec.json.decode(line, type=Issued) for line in lines if line]
        except msgspec.MsgspecError as error:
            raise CredentialError(f"{path}: damaged ({error}); restore it from a backup") from None

    def _record(self, cert: x509.Certificate, name: str) -> None:
        """Record a certificate before anybody has it: what is not recorded could not be revoked."""
        one = Issued(name, f"{cert.serial_number:x}", cert.not_valid_after_utc.timestamp())
        with self.locked():
            lines = [msgspec.json.encode(issued) for issued in (*self.issued(), one)]
            write_file(self.folder / _ISSUED, b"\n".join(lines) + b"\n")

    def _create(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"Eyas fleet {os.urandom(4).hex()}"
        builder = (
            _builder(name, _name(name), timedelta(days=CA_DAYS))
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        cert = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        with _replacing(self.cert, cert), _replacing(self._key_file, _pem(key), private=True):
            pass

    def _load_key(self) -> ec.EllipticCurvePrivateKey:
        key = _load(self._key_file, lambda data: serialization.load_pem_private_key(data, password=None))
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.certificate.public_key():
            raise CredentialError(f"{self._key_file} does not belong to {self.cert}: restore the pair from a backup")
        return key


def days_left(cert: Path) -> float:
    """Days until a certificate expires. Raises `CredentialError` if it cannot be read."""
    end = _load(cert, x509.load_pem_x509_certificate).not_valid_after_utc
    return (end - datetime.now(UTC)).total_seconds() / 86400


def serial_number(cert: Path) -> int:
    """Serial number of a certificate. Raises `CredentialError` if it cannot be read."""
    return _load(cert, x509.load_pem_x509_certificate).serial_number


def belong_together(cert: Path, key: Path, ca: x509.Certificate) -> bool:
    """Whether both files are there, and are a certificate of `ca` and its key.

    Raises `CredentialError` if one cannot be read.
    """
    if not (exists(cert) and exists(key)):
        return False
    loaded = _load(cert, x509.load_pem_x509_certificate)
    private = _load(key, lambda data: serialization.load_pem_private_key(data, password=None))
    return private.public_key() == loaded.public_key() and loaded.issuer == ca.subject


def read_file(path: Path) -> bytes:
    """Content of a file. Raises `CredentialError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialError(f"{path}: {_CLOSED.format(error.strerror)}") from None


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file atomically and durably; a private one is readable by its owner only, from its first byte on.

    Raises `CredentialError` if it cannot be written.
    """
    with _replacing(path, data, private=private):
        pass


@contextmanager
def _replacing(path: Path, data: bytes, *, private: bool = False) -> Iterator[None]:
    """Write `data` beside `path` at once, and let it replace `path` at the end."""
    try:
        with atomic_write(path) as temporary:
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600 if private else 0o644, exist_ok=False)
            temporary.write_bytes(data)
            yield
    except StageError as error:
        raise CredentialError(str(error)) from None
    except CredentialError:
        raise
    except OSError as error:
        raise CredentialError(f"{path}: cannot be written ({error.strerror})") from None


def exists(path: Path) -> bool:
    """Whether there is a file or folder. Raises `CredentialError` if that cannot be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise CredentialError(f"{path}: {_CLOSED.format(error.strerror)}") from None


def _load(path: Path, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    data = read_file(path)
    try:
        return parse(data)
    except _UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CredentialError(f"{path}: damaged ({why}); restore it from a backup") from None


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
