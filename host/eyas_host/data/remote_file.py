"""A file at an address: what is known of it before it is read."""

from __future__ import annotations

import msgspec

from eyas_host.support.errors import DataError


class RemoteFile(msgspec.Struct, frozen=True):
    """A file at an address."""

    url: str
    size: int = -1
    """Bytes; -1 if the server does not say."""
    version: str = ""
    """Changes when the file does; empty if the server has none."""


class UnreachableError(DataError):
    """A server does not answer, or its answer ends early; a later attempt may succeed."""
