"""Authentication between device and broker: TLS with certificates, user and password."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.config import TelemetrySection
from eyas_device.errors import LinkError

_FORBIDDEN_MODE = 0o027
"""Mode bits that a password file must not have: writable by its group, or accessible to others."""
_MAX_PASSWORD = 4096


class Security(msgspec.Struct, frozen=True, kw_only=True):
    """TLS and login settings of a connection; an empty string means unset."""

    tls: bool = False
    """Encrypt and trust the system's certificate authorities, if `ca` names no other."""
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
    def from_config(cls, section: TelemetrySection) -> Security:
        """Read the settings from the `[telemetry]` section."""
        values = {field.name: getattr(section, field.name) for field in msgspec.structs.fields(cls)}
        return cls(**{**values, "tls": section.address.tls if section.broker else section.tls})

    def context(self) -> ssl.SSLContext | None:
        """Create the TLS context (1.2 or newer, certificates verified); None without TLS.

        Raises `LinkError` for files that are unreadable or do not belong together.
        """
        if not (self.tls or self.ca or self.certificate):
            return None
        if bool(self.certificate) != bool(self.key):
            raise LinkError("telemetry: set both certificate and key, or none of them")
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate:
                # With an empty password OpenSSL does not ask on the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            files = ", ".join(name for name in (self.ca, self.certificate, self.key) if name)
            raise LinkError(
                f"telemetry: {files or 'TLS'}: {error}; PEM files that belong together are needed"
            ) from None
        return context

    def password(self) -> str | None:
        """Read the password, None without one. Raises `LinkError` for a file that is unreadable or open to others."""
        if not self.password_file:
            return None
        path = Path(self.password_file)
        try:
            mode = path.stat().st_mode
            with path.open(encoding="utf-8") as stream:
                text = stream.readline(_MAX_PASSWORD)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise LinkError(f"{path}: the password cannot be read ({reason})") from None
        if mode & _FORBIDDEN_MODE:
            raise LinkError(f"{path}: others can read or change the password; run chmod 600 {path}")
        return text.rstrip("\r\n")

    def apply(self, client: Any) -> None:
        """Set TLS and login of a paho client that has not connected yet. Raises `LinkError` like the methods above."""
        context = self.context()
        if context is not None:
            client.tls_set_context(context)
        if self.user:
            client.username_pw_set(self.user, self.password())
