"""TUF metadata of a repository folder: the current state, and how the next one is signed and written.

What counts is what `timestamp.json` names; files with a higher number are left-overs of a command that was killed, and
the next one replaces them. A new state is written from the bottom up, each file by rename, `timestamp.json` last: a
device finds the old state or the new one, never a mixture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from eyas_device.support.clock import is_plausible
from eyas_device.updates.clock import day
from eyas_device.updates.release import CHANNELS_ROLE, site_role
from eyas_device.updates.trust import ISSUED, METADATA
from eyas_host.fleet.broker.pki import CredentialError, exists, read_file
from eyas_host.fleet.updates.keys import KeyStore, SigningError
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
ONLINE = (CHANNELS_ROLE, SNAPSHOT, TIMESTAMP)
"""Roles whose keys lie on the server, unencrypted, because they sign by themselves."""
LIFETIME_DAYS: Mapping[str, int] = {ROOT: 730, TARGETS: 365}
"""Days until metadata expire; of the roles not named here, `ONLINE_DAYS`."""
ONLINE_DAYS = 14
_CLOCK_SKEW_S = 86400.0
_ROOT_FILE = re.compile(r"(\d{1,9})\.root\.json")
_Signed = TypeVar("_Signed", Root, Snapshot, Targets, Timestamp)
_SERIALIZER = JSONSerializer(compact=True)


class DamagedRepository(CredentialError):  # noqa: N818 - reads as the state it reports
    """The repository's own files are missing or damaged."""


class RepositoryMetadata:
    """The metadata of a repository, which are changed in memory and then committed."""

    def __init__(
        self,
        folder: Path,
        keys: KeyStore,
        root: Metadata[Root],
        timestamp: Metadata[Timestamp],
        snapshot: Metadata[Snapshot],
        roles: dict[str, Metadata[Targets]],
    ) -> None:
        self.folder, self.keys = folder / METADATA, keys
        self.root, self.timestamp, self.snapshot = root, timestamp, snapshot
        self.roles = roles
        """Top-level targets and the roles below it."""

    @classmethod
    def load(cls, folder: Path, keys: KeyStore) -> RepositoryMetadata:
        """The current state. Raises `DamagedRepository` if it cannot be read."""
        at = folder / METADATA
        root = read_metadata(at / f"{newest_root(folder)}.root.json", Root)
        timestamp = read_metadata(at / "timestamp.json", Timestamp)
        snapshot = read_metadata(at / f"{timestamp.signed.snapshot_meta.version}.snapshot.json", Snapshot)
        versions = {name: meta.version for name, meta in snapshot.signed.meta.items()}
        roles = {
            name.removesuffix(".json"): read_metadata(at / f"{version}.{name}", Targets)
            for name, version in versions.items()
        }
        return cls(folder, keys, root, timestamp, snapshot, roles)

    @classmethod
    def new(cls, folder: Path, keys: KeyStore, root: Metadata[Root], targets: Targets) -> RepositoryMetadata:
        """The state before the first commit: an empty role for each that `targets` delegates to."""
        assert targets.delegations is not None and targets.delegations.roles is not None
        roles = {TARGETS: targets} | {role: Targets(expires=_EPOCH) for role in targets.delegations.roles}
        timestamp, snapshot = Metadata(Timestamp(expires=_EPOCH)), Metadata(Snapshot(expires=_EPOCH))
        for signed in (timestamp.signed, snapshot.signed, *roles.values()):
            signed.version = 0
        return cls(folder, keys, root, timestamp, snapshot, {role: Metadata(one) for role, one in roles.items()})

    @property
    def targets(self) -> Targets:
        """The top-level targets."""
        return self.roles[TARGETS].signed

    def role_of(self, target: str) -> str:
        """The role that signs for a target."""
        parts = target.split("/")
        if parts[0] == "sites":
            return site_role(parts[1])
        return CHANNELS_ROLE if parts[0] == "channels" else TARGETS

    def add_role(self, role: str, key: Key, paths: list[str], *, terminating: bool) -> None:
        """Delegate `paths` to a role with this key; one that is there already gets the key instead of its own."""
        delegations = self.targets.delegations
        assert delegations is not None and delegations.roles is not None
        if role in delegations.roles:
            for key_id in tuple(delegations.roles[role].keyids):
                self.targets.revoke_key(key_id, role)
        else:
            delegations.roles[role] = DelegatedRole(role, [], 1, terminating, paths=paths)
            self.roles[role] = Metadata(Targets(expires=_EPOCH))
            self.roles[role].signed.version = 0
        self.targets.add_key(key, role)

    def key_ids(self, role: str) -> list[str]:
        """Ids of the keys that sign for a role."""
        return list(self._delegator(role).get_delegated_role(role).keyids)

    def threshold(self, role: str) -> int:
        """How many of its keys a role needs."""
        return int(self._delegator(role).get_delegated_role(role).threshold)

    def metadata_of(self, role: str) -> Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]:
        """A role's metadata."""
        if role == ROOT:
            return self.root
        if role == TIMESTAMP:
            return self.timestamp
        return self.snapshot if role == SNAPSHOT else self.roles[role]

    def is_signed(self, role: str) -> bool:
        """Whether a role's metadata are signed by the keys that it has now."""
        metadata = self.metadata_of(role)
        try:
            self._delegator(role).verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError:
            return False
        return True

    def missing_keys(self, role: str) -> list[str]:
        """Names of a role's keys that are not here, if too few are to sign for it; else none."""
        missing = [key_id for key_id in self.key_ids(role) if not self.keys.place(key_id)]
        here = len(self.key_ids(role)) - len(missing)
        return [self.keys.name(key_id) for key_id in missing] if here < self.threshold(role) else []

    def commit(self, changed: Iterable[str], now: float, *, new_keys: bool = False) -> None:
        """Sign and write the next state.

        Args:
            changed: Roles below snapshot whose metadata were changed. Snapshot follows if there are any, and where it
                is no longer signed by its keys; timestamp is always signed.
            now: Seconds since 1970.
            new_keys: The key of `timestamp` is new, so that it does not matter what the old one has signed.

        Raises:
            SigningError: A key is missing, or the clock is wrong; nothing was written.
            CredentialError: The files cannot be written.

        """
        self._check_clock(now, new_keys=new_keys)
        roles = [role for role in self.roles if role in set(changed)]
        renewed = bool(roles) or SNAPSHOT in changed or not self.is_signed(SNAPSHOT)
        for role in (*roles, *((SNAPSHOT,) if renewed else ()), TIMESTAMP):
            if missing := self.missing_keys(role):
                raise SigningError(
                    f"{role} cannot be signed: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in "
                    f"{self.keys.folder}; give the folder with --keys DIR"
                )
        files: list[tuple[str, bytes]] = []
        for role in roles:
            data = self._sign(role, self.roles[role], now)
            version = self.roles[role].signed.version
            files.append((f"{version}.{role}.json", data))
            self.snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(version, data, ["sha256"])
        if renewed:
            data = self._sign(SNAPSHOT, self.snapshot, now)
            version = self.snapshot.signed.version
            files.append((f"{version}.snapshot.json", data))
            self.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
        self.timestamp.signed.unrecognized_fields[ISSUED] = int(now)
        files.append(("timestamp.json", self._sign(TIMESTAMP, self.timestamp, now)))
        for name, data in files:
            _write(self.folder / name, data)

    def write_root(self, root: Metadata[Root]) -> None:
        """Write the next root, which has all its signatures: devices follow it from now on."""
        _write(self.folder / f"{root.signed.version}.root.json", serialize(root))
        self.root = root

    def days_left(self, role: str, now: float) -> float:
        """Days until a role's metadata expire."""
        return (self.metadata_of(role).signed.expires.timestamp() - now) / 86400

    def _check_clock(self, now: float, *, new_keys: bool) -> None:
        """Raise `SigningError` for a clock that cannot be right: devices would take what it signs for expired."""
        issued = self.timestamp.signed.unrecognized_fields.get(ISSUED, 0)
        if not is_plausible(now):
            raise SigningError(
                f"this machine's clock reads {day(now)}; set it, because what is signed carries the time"
            )
        if now < issued - _CLOCK_SKEW_S and not new_keys:
            raise SigningError(
                f"this machine's clock reads {day(now)}, but the repository was signed on {day(issued)}; set it, or, "
                "if it was wrong then, `eyas keys rotate online`: devices forget the wrong time with the old keys"
            )

    def _delegator(self, role: str) -> Root | Targets:
        return self.root.signed if role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP) else self.targets

    def _sign(self, role: str, metadata: Metadata[_Signed], now: float) -> bytes:
        signed = metadata.signed
        signed.version += 1
        signed.expires = expiry(role, now)
        metadata.signatures.clear()
        for key_id in self.key_ids(role):
            signer = self.keys.signer(key_id) if len(metadata.signatures) < self.threshold(role) else None
            if signer is not None:
                append_signature(metadata, signer, self.keys.name(key_id))
        return serialize(metadata)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_metadata(path: Path, kind: type[_Signed]) -> Metadata[_Signed]:
    """Read a file of metadata. Raises `DamagedRepository` if it is missing, damaged or of another role."""
    if not exists(path):
        raise DamagedRepository(f"{path}: missing; restore the repository from a copy")
    try:
        metadata = Metadata.from_bytes(read_file(path))
    except RepositoryError as error:
        raise DamagedRepository(f"{path}: damaged ({error}); restore the repository from a copy") from None
    if not isinstance(metadata.signed, kind):
        raise DamagedRepository(f"{path}: not of this role; restore the repository from a copy")
    return metadata


def append_signature(metadata: Metadata[_Signed], signer: object, name: str) -> None:
    """Sign metadata with one more key, which `name` names. Raises `SigningError` if the key fails."""
    try:
        metadata.sign(signer, append=True)  # type: ignore[arg-type]
    except Exception as error:  # each kind of signer raises its own, not all with a text
        reason = error.__cause__ or error
        text = " ".join(str(reason).split())[:200] or type(reason).__name__
        raise SigningError(f"{name}: could not sign ({text})") from None


def serialize(metadata: Metadata[_Signed]) -> bytes:
    """The bytes of a file of metadata."""
    return metadata.to_bytes(_SERIALIZER)


def newest_root(folder: Path) -> int:
    """Version of the newest root of a repository. Raises `DamagedRepository` if there is none."""
    try:
        names = [path.name for path in (folder / METADATA).iterdir()]
    except OSError:
        names = []
    versions = [int(found[1]) for name in names if (found := _ROOT_FILE.fullmatch(name))]
    if not versions:
        raise DamagedRepository(f"{folder}: there is no repository; `eyas keys init` creates one")
    return max(versions)


def expiry(role: str, now: float) -> datetime:
    """When metadata of a role that are signed now expire."""
    end = datetime.fromtimestamp(int(now), UTC) + timedelta(days=LIFETIME_DAYS.get(role, ONLINE_DAYS))
    return end.replace(microsecond=0)


def new_targets(channels: Key, paths: list[str]) -> Targets:
    """Top-level targets that delegate the channels."""
    role = DelegatedRole(CHANNELS_ROLE, [channels.keyid], 1, False, paths=paths)
    return Targets(expires=_EPOCH, delegations=Delegations({channels.keyid: channels}, {CHANNELS_ROLE: role}))


def _write(path: Path, data: bytes) -> None:
    try:
        write_bytes(path, data)
    except (StageError, OSError) as error:
        raise CredentialError(str(error)) from None
