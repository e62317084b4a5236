"""Lifetimes and names of certificates, read from their DER encoding: the device has no library for X.509 of its own."""

from __future__ import annotations

import calendar
import re
import ssl
import time
from pathlib import Path

import msgspec

WARN_DAYS = 30.0
"""A certificate that expires sooner is reported: somebody has to bring a new one."""
_DAY_S = 86400.0
_MAX_BYTES = 4 << 20
_PEM = re.compile(r"-----BEGIN (?:TRUSTED )?CERTIFICATE-----.*?-----END (?:TRUSTED )?CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _VERSION, _BMP_STRING = 0x17, 0x18, 0xA0, 0x1E
_COMMON_NAME = bytes.fromhex("0603550403")
"""The object identifier 2.5.4.3."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate's name and lifetime, seconds since 1970."""

    name: str
    """What it is and where, for people."""
    not_before: float
    not_after: float
    common_name: str = ""
    """Whose it is: for a broker of the kit, the user; empty if it says nothing."""

    def days_left(self, now: float) -> float:
        """Days until it expires."""
        return (self.not_after - now) / _DAY_S

    def problem(self, now: float) -> str:
        """Why it is not valid now; empty if it is."""
        if now > self.not_after:
            return f"{self.name} expired on {date(self.not_after)} (the clock says {date(now)}); it has to be renewed"
        if now < self.not_before:
            return (
                f"{self.name} is valid from {date(self.not_before)}, but the clock says {date(now)}: the clock is "
                "probably wrong"
            )
        return ""

    def warning(self, now: float) -> str:
        """When it expires, if that is soon or past; empty otherwise."""
        if self.problem(now) or self.days_left(now) >= WARN_DAYS:
            return self.problem(now)
        return f"{self.name} expires in {self.days_left(now):.0f} days, on {date(self.not_after)}"


def read_certificates(path: Path, kind: str) -> list[Certificate]:
    """Read the lifetimes of all certificates in a PEM file; empty if it cannot be read or holds none."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode("utf-8", "replace")
        return [
            parse_certificate(ssl.PEM_cert_to_DER_cert(block.replace("TRUSTED ", "")), f"{kind} {path}")
            for block in _PEM.findall(text)
        ]
    except (OSError, ValueError):
        return []


def parse_certificate(der: bytes, name: str) -> Certificate:
    """Read the lifetime and common name of a certificate (RFC 5280, 4.1). Raises `ValueError` for anything else."""
    _, start, _ = _header(der, 0)
    _, position, _ = _header(der, start)  # TBSCertificate
    tag, _, end = _header(der, position)
    if tag == _VERSION:
        position = end
    for _ in ("serial number", "signature", "issuer"):
        _, _, position = _header(der, position)
    _, position, end = _header(der, position)
    not_before, position = _time(der, position)
    not_after, _ = _time(der, position)
    _, start, end = _header(der, end)  # subject
    common_name = _common_name(der[start:end])
    return Certificate(name=name, not_before=not_before, not_after=not_after, common_name=common_name)


def date(seconds: float) -> str:
    """A point in time as a date, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(0.0, seconds)))


def _header(der: bytes, position: int) -> tuple[int, int, int]:
    """Tag of the value at `position`, and where its content starts and ends."""
    if position + 2 > len(der):
        raise ValueError("not a certificate: cut short")
    tag, length, start = der[position], der[position + 1], position + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(der[start : start + count], "big")
        start += count
    if start + length > len(der):
        raise ValueError("not a certificate: cut short")
    return tag, start, start + length


def _common_name(subject: bytes) -> str:
    """The first common name of a subject; empty if it has none."""
    _, found, value = subject.partition(_COMMON_NAME)
    if not found:
        return ""
    tag, start, end = _header(value, 0)
    return value[start:end].decode("utf-16-be" if tag == _BMP_STRING else "utf-8", "replace")


def _time(der: bytes, position: int) -> tuple[float, int]:
    """Seconds since 1970 of the time at `position`, and where it ends."""
    tag, start, end = _header(der, position)
    text = der[start:end].decode("ascii", "replace")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("not a certificate: no lifetime")
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ"))), end
