"""How a device proves who it is, and how it knows its broker: TLS with certificates, or user and password."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.config import TelemetrySection
from eyas_device.errors import LinkError

_OTHERS = 0o027
"""Mode bits that a password file must not have: written by the group, or touched by others."""
_LONGEST_PASSWORD = 4096


class Security(msgspec.Struct, frozen=True, kw_only=True):
    """Empty texts: without it."""

    tls: bool = False
    """Encrypt, and believe the system's certificate authorities; `ca` does so with one's own."""
    ca: str = ""
    """File of the certificate authority that signed the broker's certificate."""
    certificate: str = ""
    """File of the device's own certificate."""
    key: str = ""
    """File of its private key."""
    user: str = ""
    password_file: str = ""
    """A file whose first line is the password."""

    @classmethod
    def configured(cls, section: TelemetrySection) -> Security:
        """As the device's configuration says."""
        return cls(**{field.name: getattr(section, field.name) for field in msgspec.structs.fields(cls)})

    def context(self) -> ssl.SSLContext | None:
        """TLS 1.2 or newer with the names and dates of certificates checked; None without TLS.

        Raises `LinkError` for files that cannot be read or do not fit together.
        """
        if not (self.tls or self.ca or self.certificate):
            return None
        if bool(self.certificate) != bool(self.key):
            raise LinkError("telemetry: certificate and key are needed both, or none of them")
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate:
                # An empty password keeps OpenSSL from asking on the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            files = ", ".join(name for name in (self.ca, self.certificate, self.key) if name)
            raise LinkError(f"telemetry: {files or 'TLS'}: {error}; PEM files are needed that fit together") from None
        return context

    def password(self) -> str | None:
        """The password, None without one. Raises `LinkError` for a file that cannot be read or that others may read."""
        if not self.password_file:
            return None
        path = Path(self.password_file)
        try:
            mode = path.stat().st_mode
            with path.open(encoding="utf-8") as stream:
                text = stream.readline(_LONGEST_PASSWORD)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise LinkError(f"{path}: the password cannot be read ({reason})") from None
        if mode & _OTHERS:
            raise LinkError(f"{path}: others may read or change the password; chmod 600 {path}")
        return text.rstrip("\r\n")

    def apply(self, client: Any) -> None:
        """Set up a paho client that has not connected yet. Raises `LinkError` as the methods above."""
        context = self.context()
        if context is not None:
            client.tls_set_context(context)
        if self.user:
            client.username_pw_set(self.user, self.password())
