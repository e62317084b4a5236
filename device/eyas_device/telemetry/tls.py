"""Authentication between a client and a broker: TLS with certificates, user and password."""

from __future__ import annotations

import codecs
import grp
import os
import pwd
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.config import SERVICE_USER, TelemetrySection
from eyas_device.errors import LinkError
from eyas_device.telemetry.certificates import Certificate, read_certificates

_FORBIDDEN_MODE = 0o027
"""Mode bits that a password file must not have: writable by its group, or accessible to others."""
_MAX_PASSWORD = 4096
_HEAD = 4096
"""Bytes of a file that are looked at to say what it is."""


class ClosedFileError(LinkError):
    """A file of credentials is closed to this user."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}; {fix}")
        self.problem, self.fix = problem, fix


class Security(msgspec.Struct, frozen=True, kw_only=True):
    """TLS and login settings of a connection; an empty string means unset."""

    tls: bool = False
    """Encrypt and trust the system's certificate authorities, if `ca` names no other."""
    ca: str = ""
    """File of the certificate authority that signed the broker's certificate."""
    certificate: str = ""
    """File of the client's own certificate."""
    key: str = ""
    """File of its private key."""
    user: str = ""
    password_file: str = ""
    """A file whose first line is the password."""

    @classmethod
    def from_config(cls, section: TelemetrySection) -> Security:
        """Read the settings from the `[telemetry]` section."""
        values = {field.name: getattr(section, field.name) for field in msgspec.structs.fields(cls)}
        return cls(**{**values, "tls": section.address.tls if section.broker else section.tls})

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or bool(self.ca or self.certificate)

    def context(self) -> ssl.SSLContext | None:
        """Create the TLS context (1.2 or newer, certificates verified); None without TLS.

        Raises `LinkError` that names the file which is unreadable, no PEM file, or does not belong to the others.
        """
        if not self.uses_tls:
            return None
        if bool(self.certificate) != bool(self.key):
            raise LinkError("telemetry: set both certificate and key, or none of them")
        for path in filter(None, (self.ca, self.certificate, self.key)):
            _require_readable(Path(path))
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ValueError) as error:
            problem = f"no certificates of an authority: {_unfit(self.ca, error)}"
            raise LinkError(f"{self.ca or 'TLS'}: {problem}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate:
            self._load_pair(context)
        return context

    def certificates(self) -> Iterator[Certificate]:
        """The own certificate, and the authority's that lasts longest; unreadable ones are left out."""
        if self.certificate:
            yield from read_certificates(Path(self.certificate), "the certificate")[:1]
        if self.ca:
            found = read_certificates(Path(self.ca), "the authority's certificate")
            yield from sorted(found, key=lambda one: one.not_after)[-1:]

    def certificate_days(self, now: float) -> float | None:
        """Days until the client's own certificate expires; None without a readable one."""
        found = read_certificates(Path(self.certificate), "")[:1] if self.certificate else []
        return round(found[0].days_left(now), 2) if found else None

    def password(self) -> str | None:
        """Read the password, None without one. Raises `LinkError` for a file that is unreadable or open to others."""
        return read_password(Path(self.password_file)) if self.password_file else None

    def apply(self, client: Any) -> None:
        """Set TLS and login of a paho client that has not connected yet. Raises `LinkError` like the methods above."""
        context = self.context()
        if context is not None:
            client.tls_set_context(context)
        if self.user:
            client.username_pw_set(self.user, self.password())

    def _load_pair(self, context: ssl.SSLContext) -> None:
        try:
            # With an empty password OpenSSL does not ask on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            if "KEY_VALUES_MISMATCH" in str(error):
                raise LinkError(f"{self.key}: not the private key of {self.certificate}") from None
            path = self.certificate if not _is_certificate(self.certificate) else self.key
            what = "no certificate" if path == self.certificate else "no private key without a passphrase"
            raise LinkError(f"{path}: {what}: {_unfit(path, error)}") from None


def read_password(path: Path, *, private: bool = True) -> str:
    """Read the first line of a file, with or without a byte order mark.

    Raises `LinkError` for one that is unreadable, not a line of text or, if it has to be `private`, open to others.
    """
    try:
        mode = path.stat().st_mode
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.readline(_MAX_PASSWORD + 1).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else _NOT_UTF8
        if isinstance(error, PermissionError):
            raise _closed(path) from None
        raise LinkError(f"{path}: the password cannot be read ({reason})") from None
    if private and mode & _FORBIDDEN_MODE:
        raise LinkError(f"{path}: others can read or change the password; run chmod 600 {path}")
    if not text:
        raise LinkError(f"{path}: the first line is empty; the password belongs there")
    if len(text) > _MAX_PASSWORD or not text.isprintable():
        reason = _NOT_UTF8 if "\0" in text else f"one line of at most {_MAX_PASSWORD} characters is needed"
        raise LinkError(f"{path}: the first line is not a password ({reason})")
    return text


_PEM = "PEM files are needed"
_NOT_UTF8 = "not UTF-8 text; save it as UTF-8"


def _require_readable(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except PermissionError:
        raise _closed(path) from None
    except (OSError, ValueError) as error:
        raise LinkError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {_PEM}") from None


def _closed(path: Path) -> ClosedFileError:
    """Who owns a file that this process may not read, and how the service may be allowed to."""
    user = _named(lambda: pwd.getpwuid(os.geteuid()).pw_name, os.geteuid())
    group = _named(lambda: grp.getgrgid(os.getegid()).gr_name, os.getegid())
    with suppress(KeyError):
        group = grp.getgrnam(SERVICE_USER).gr_name
    try:
        owner = _named(lambda: pwd.getpwuid(path.stat().st_uid).pw_name, path.stat().st_uid)
    except OSError:
        folder = path.parent
        fix = f"chgrp {group} {folder} && chmod g+rx {folder}"
        return ClosedFileError(f"{path}: the user {user} may not enter its folder", fix)
    problem = f"{path}: the user {user} may not read it, it belongs to {owner}"
    return ClosedFileError(problem, f"chgrp {group} {path} && chmod g+r {path}")


def _named(look_up: Callable[[], str], number: int) -> str:
    try:
        return look_up()
    except KeyError:
        return str(number)


def _is_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ValueError):
        return False
    return True


def _unfit(path: str, error: Exception) -> str:
    """What a file holds instead of PEM that can be used, and the fix; else the library's words."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(_HEAD)
    except (OSError, ValueError):
        head = b"?"
    if not head.strip():
        return f"the file is empty; {_PEM}"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0-\0-" in head:
        return "UTF-16 text; save it as ASCII or UTF-8"
    if b"ENCRYPTED" in head:
        return f"it has a passphrase, which nobody can type here; without: openssl pkey -in {path} -out NEW"
    if head[:1] == b"\x30" and b"-----BEGIN" not in head:
        return f"DER, the binary form; convert it: openssl x509 (or pkey) -inform der -in {path} -out NEW"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return f"{reason}; {_PEM}"
