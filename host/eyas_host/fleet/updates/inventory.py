"""A list of the keys of a repository, for people and programs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from eyas_host.fleet.updates.metadata import ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from eyas_host.fleet.updates.repository import Repository


class KeyRow(msgspec.Struct, frozen=True):
    """A key that signs now."""

    name: str
    id: str
    role: str
    needed: str
    """`2 of 3`: how many of the role's keys have to sign."""
    place: str
    """Path or URI; empty if it is not here."""
    expires_days: float | None
    """Days until what the role signed expires."""


def list_keys(repository: Repository) -> list[KeyRow]:
    """The keys that sign now, by role. Raises `CredentialError` if the repository or the index is damaged."""
    return list(_rows(repository))


def _rows(repository: Repository) -> Iterator[KeyRow]:
    metadata, entries, now = repository.metadata(), repository.keys.entries(), repository.now()
    below = [role for role in metadata.roles if role != TARGETS]
    for role in (ROOT, TARGETS, *below, SNAPSHOT, TIMESTAMP):
        ids = metadata.key_ids(role)
        needed = f"{metadata.threshold(role)} of {len(ids)}"
        for key_id in ids:
            name = entries[key_id].name if key_id in entries else role
            place = repository.keys.place(key_id)
            yield KeyRow(name, key_id, role, needed, place, round(metadata.days_left(role, now), 1))
