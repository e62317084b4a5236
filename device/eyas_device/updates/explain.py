"""Explains a refusal: which of the errors in `refusals` is behind an error of TUF's client, in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec
from tuf.api import exceptions as tuf
from tuf.api.serialization import DeserializationError

from eyas_device.support.clock import is_synchronised
from eyas_device.updates.clock import Reading, day
from eyas_device.updates.refusals import (
    ClockAheadError,
    EndlessDataError,
    ExpiredError,
    ForeignError,
    MissingError,
    MixedError,
    RolledBackError,
    RootError,
    SlowDataError,
    TamperedError,
    TrustError,
    UnreachableError,
    UnsignedError,
)
from eyas_device.updates.release import UpdateError

_AHEAD_S = 30 * 86400.0
"""A clock that is not synchronised, and this far ahead of what was signed last, is taken to be wrong."""


class Trusted(Protocol):
    """What is trusted so far."""

    @property
    def issued(self) -> float:
        """When the timestamp was signed."""

    @property
    def root_version(self) -> int:
        """Version of the root."""

    def role_keys(self, role: str) -> tuple[frozenset[str], int]:
        """Ids of the keys that sign for a role, and how many of them have to."""

    def expected_version(self, role: str) -> int:
        """The version of a role's metadata that those above it name."""


class Download:
    """The file that was fetched last, as far as it came."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.data = bytearray()

    @property
    def name(self) -> str:
        """The file's name."""
        return unquote(self.path.rpartition("/")[2])

    @property
    def role(self) -> str:
        """The role whose metadata it has: the name without version and suffix."""
        stem = self.name.removesuffix(".json")
        version, dot, role = stem.partition(".")
        return role if dot and version.isdigit() else stem

    @property
    def content(self) -> Mapping[str, Any]:
        """The file as JSON; empty if it is none."""
        try:
            content = msgspec.json.decode(self.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def explain(error: Exception, trusted: Trusted | None, last: Download, reading: Reading) -> UpdateError:
    """The error to raise instead of TUF's.

    Args:
        error: What TUF's client, or the fetcher below it, raised.
        trusted: What it trusts; None if the pinned root itself was refused.
        last: The file that was fetched last.
        reading: The time that expiry was judged against.

    """
    if isinstance(error, UpdateError):
        return error
    if trusted is None:
        if isinstance(error, OSError):
            return UpdateError(f"the metadata cannot be kept: {error.strerror or error}")
        return RootError(f"the pinned root is refused ({error}); `eyas flash --name` brings another one")
    if isinstance(error, tuf.ExpiredMetadataError):
        return _expired(error, trusted, reading)
    if isinstance(error, tuf.UnsignedMetadataError):
        return _unsigned(trusted, last)
    if isinstance(error, (tuf.BadVersionNumberError, tuf.LengthOrHashMismatchError)):
        return _other_version(error, trusted, last)
    if isinstance(error, DeserializationError):
        return TamperedError(f"{last.name}: not metadata of TUF; is the address that of a repository?")
    if isinstance(error, tuf.DownloadLengthMismatchError):
        return EndlessDataError(f"{last.name}: longer than it may be; the repository is not the one that was signed")
    if isinstance(error, tuf.SlowRetrievalError):
        return SlowDataError(f"{last.name}: {error}")
    if isinstance(error, tuf.DownloadHTTPError):
        return MissingError(str(error))
    if isinstance(error, tuf.RepositoryError):
        return MixedError(f"{last.name}: {error}: metadata of different states of the repository")
    if isinstance(error, tuf.DownloadError):
        return UnreachableError(f"{last.path}: {error}")
    reason = getattr(error, "strerror", None) or error
    return UpdateError(f"the metadata cannot be kept: {reason}")


def _expired(error: Exception, trusted: Trusted, reading: Reading) -> TrustError:
    newest = max(trusted.issued, reading.floor)
    if reading.system - newest > _AHEAD_S and not is_synchronised():
        return ClockAheadError(
            f"the clock reads {day(reading.system)} and is not synchronised, while the newest signed time is "
            f"{day(newest)}: nothing is installed until the clock is right"
        )
    signed = f", the repository was last signed on {day(trusted.issued)}" if trusted.issued else ""
    return ExpiredError(
        f"{str(error).rstrip('.')} ({day(reading.now)} now{signed}): nothing is installed until `eyas repo renew` has "
        "run; if it has, an old state is served"
    )


def _unsigned(trusted: Trusted, last: Download) -> TrustError:
    keys, threshold = trusted.role_keys(last.role)
    signatures = last.content.get("signatures")
    entries = [one for one in signatures if isinstance(one, dict)] if isinstance(signatures, list) else []
    known = {str(one.get("keyid")) for one in entries if one.get("sig")} & keys
    if not [one for one in entries if one.get("sig")]:
        return UnsignedError(f"{last.name}: not signed")
    if not known:
        return ForeignError(
            f"{last.name}: signed by keys that root version {trusted.root_version} does not trust: another repository, "
            "or keys that were replaced without the root's keys"
        )
    if len(known) < threshold:
        return UnsignedError(f"{last.name}: signed by {len(known)} of the {threshold} keys that it needs")
    return TamperedError(
        f"{last.name}: its signature is wrong: changed after it was signed, or not signed for its role"
    )


def _other_version(error: Exception, trusted: Trusted, last: Download) -> TrustError:
    signed = last.content.get("signed")
    version = signed.get("version") if isinstance(signed, dict) else None
    expected = trusted.expected_version(last.role)
    if last.role in ("root", "timestamp") or (expected and version == expected and last.role == "snapshot"):
        if isinstance(error, tuf.BadVersionNumberError):
            return RolledBackError(f"{last.name}: older than what this device has seen ({error})")
    elif expected and version != expected:
        return MixedError(
            f"{last.name}: version {version}, but the repository's state names {expected}: metadata of different states"
        )
    return TamperedError(f"{last.name}: not what was signed ({error}): damaged or altered")
