"""What needs the root's keys: creating a repository, replacing keys, collecting the signatures of a new root.

A new root is signed by enough of the old root's keys and of its own. Where they are not all at hand, it waits in
`KIT/keys/pending/`, which can be carried from key to key; devices see it once its last signature is there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Role, Root

from eyas_device.updates.release import CHANNELS_ROLE
from eyas_host.fleet.broker.pki import CredentialError, exists
from eyas_host.fleet.updates.keys import Ask, KeyStore, SigningError
from eyas_host.fleet.updates.metadata import (
    ONLINE,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    RepositoryMetadata,
    append_signature,
    expiry,
    new_targets,
    read_metadata,
    serialize,
)
from eyas_host.fleet.updates.repository import CHANNEL_PATHS, KEYS, REPOSITORY, Repository
from eyas_host.fleet.updates.variants import PublishError
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes

PENDING = "pending"
ROOT_KEYS, THRESHOLD = 3, 2
ALL_ONLINE = "online"
"""Name for all keys that lie on the server."""


class Signed(msgspec.Struct, frozen=True):
    """What came of replacing keys or signing a root."""

    version: int
    """Of the root; 0 if the root did not change."""
    pending: Path | None = None
    """The root that waits for signatures; None: devices see it."""
    missing: int = 0
    """How many signatures it still needs."""
    candidates: tuple[str, ...] = ()
    """Names of the keys that could give them."""


def create(
    kit: Path,
    ask: Ask,
    *,
    root_keys: int = ROOT_KEYS,
    threshold: int = THRESHOLD,
    now: Callable[[], float] = time.time,
) -> Repository:
    """Create the keys and the empty repository of a kit.

    Raises:
        PublishError: There is one already, or the numbers of keys are impossible.
        SigningError: A passphrase is too short.
        CredentialError: The files cannot be written.

    """
    folder = kit / REPOSITORY
    if exists(folder / "metadata" / "1.root.json"):
        raise PublishError(
            f"{folder}: there is a repository already, which devices trust; `eyas keys show` lists its keys"
        )
    if not 1 <= threshold <= root_keys <= 9:
        raise PublishError(f"{threshold} of {root_keys} root keys: 1 to 9 keys, and at most all of them, can be needed")
    keys, at = KeyStore(kit / KEYS, ask=ask), now()
    roots = [keys.create(f"root-{number}", at, encrypted=True) for number in range(1, root_keys + 1)]
    targets = keys.create(TARGETS, at, encrypted=True)
    online = {role: keys.create(role, at, encrypted=False) for role in ONLINE}
    signed = Root(version=1, expires=expiry(ROOT, at), consistent_snapshot=True)
    for role, own in ((ROOT, roots), (TARGETS, [targets]), *((role, [online[role]]) for role in (SNAPSHOT, TIMESTAMP))):
        signed.roles[role] = Role([], threshold if role == ROOT else 1)
        for key in own:
            signed.add_key(key, role)
    root = Metadata(signed)
    for key in roots:
        _append(root, keys, key.keyid)
    metadata = RepositoryMetadata.new(folder, keys, root, new_targets(online[CHANNELS_ROLE], CHANNEL_PATHS))
    metadata.write_root(root)
    repository = Repository(kit, ask=ask, now=now)
    repository.keys = keys
    repository.begin(metadata)
    return repository


def rotate(repository: Repository, names: Iterable[str], *, uri: str = "", public: Path | None = None) -> Signed:
    """Replace keys by new ones, and sign again what the old ones had signed.

    Args:
        repository: The repository.
        names: Of keys: `root-1`, `targets`, `snapshot`, `timestamp`, `channels`, `site-SITE`; `online` for the three
            that lie on the server; `root` for none, which only renews the root's expiry.
        uri: The new key's place, if it is not created here but lies in a device (one name only).
        public: PEM file of that key's public part.

    Raises:
        PublishError: There is no such key.
        SigningError: A key that has to sign is not here; keys of the root may sign later.

    """
    wanted = [name for one in names for name in (ONLINE if one == ALL_ONLINE else (one,))]
    if uri and (len(wanted) != 1 or public is None):
        raise PublishError("--uri: for one key, and with --public FILE, its public part in PEM")
    with repository.changing() as metadata:
        keys, now = repository.keys, repository.now()
        root = Metadata(copy.deepcopy(metadata.root.signed))
        old = {name: _current_key(metadata, name) for name in wanted if name != ROOT}
        below = {name for name in old if name == CHANNELS_ROLE or name.startswith("site-")}
        if below and not set(old) - below and (missing := metadata.missing_keys(TARGETS)):
            raise SigningError(f"targets names these keys, and its own is not here: {', '.join(missing)}; --keys DIR")
        for name, key_id in old.items():
            encrypted = name not in ONLINE and name not in below
            new = keys.adopt(name, uri, public, now) if uri and public else keys.create(name, now, encrypted=encrypted)
            if name in below:
                metadata.add_role(name, new, [], terminating=True)
            else:
                role = ROOT if name.startswith("root-") else name
                root.signed.revoke_key(key_id, role)
                root.signed.add_key(new, role)
        keys.retire(old.values(), now)
        if set(wanted) == below:
            metadata.commit({TARGETS, *below}, now)
            return Signed(0)
        root.signed.version += 1
        root.signed.expires = expiry(ROOT, now)
        return _finish(repository, metadata, root, {TARGETS, *below} if below else set())


def sign(repository: Repository) -> Signed:
    """Add the signatures of the keys that are here to the root that waits for some.

    Raises `PublishError` if none waits.
    """
    with repository.changing() as metadata:
        path = _pending(repository, metadata.root.signed.version + 1)
        if not exists(path):
            raise PublishError(f"{path.parent}: no root waits for a signature")
        return _finish(repository, metadata, read_metadata(path, Root), set())


def sign_file(path: Path, private: Sequence[Path], ask: Ask | None) -> list[str]:
    """Sign a waiting root on another machine, where there is no kit; returns the ids of the keys that signed.

    Raises `SigningError` if a key is none of those that may sign it.
    """
    root = read_metadata(path, Root)
    signed = []
    for pem in private:
        signer = KeyStore(pem.parent, ask=ask).load_file(pem)
        if signer.public_key.keyid not in root.signed.keys:
            raise SigningError(f"{pem}: no key of {path.name}; a key that leaves the root signs where the kit is")
        append_signature(root, signer, str(pem))
        signed.append(signer.public_key.keyid)
    _write(path, root)
    return signed


def _finish(repository: Repository, metadata: RepositoryMetadata, root: Metadata[Root], changed: set[str]) -> Signed:
    """Sign a new root with the keys that are here; publish it if they are enough, else let it wait."""
    keys, before = repository.keys, metadata.root.signed
    own = root.signed.roles[ROOT].keyids
    shared = [key_id for key_id in before.roles[ROOT].keyids if key_id in own]
    candidates = dict.fromkeys([*shared, *own, *before.roles[ROOT].keyids])
    path = _pending(repository, root.signed.version)
    for key_id in candidates:
        if not _missing(before, root) and not _missing(root.signed, root):
            break
        if key_id not in root.signatures:
            _append(root, keys, key_id)
    missing = max(_missing(before, root), _missing(root.signed, root))
    if missing:
        if changed:
            raise SigningError(
                f"{missing} more of the root's keys are needed together with that of targets: --keys DIR"
            )
        _write(path, root)
        names = tuple(keys.name(key_id) for key_id in candidates if key_id not in root.signatures)
        return Signed(root.signed.version, path, missing, names)
    previous = metadata.root
    metadata.root = root
    changed |= {role for role in metadata.roles if not metadata.is_signed(role)}
    for role in (*changed, SNAPSHOT, TIMESTAMP):  # before devices follow the new root
        if absent := metadata.missing_keys(role):
            metadata.root = previous
            raise SigningError(f"{role}: {', '.join(absent)} has to sign with the new root; give --keys DIR")
    metadata.write_root(root)
    old, new = (one.roles[TIMESTAMP].keyids for one in (before, root.signed))
    metadata.commit(changed, repository.now(), new_keys=not set(old) & set(new))
    path.unlink(missing_ok=True)
    return Signed(root.signed.version)


def _missing(delegator: Root, root: Metadata[Root]) -> int:
    """How many signatures a root lacks in the eyes of `delegator`."""
    result = delegator.get_verification_result(ROOT, root.signed_bytes, root.signatures)
    return max(0, result.threshold - len(result.signed))


def _current_key(metadata: RepositoryMetadata, name: str) -> str:
    """Id of the key with this name that signs now."""
    role = ROOT if name.startswith("root-") else name
    try:
        for key_id in metadata.key_ids(role):
            if role != ROOT or metadata.keys.entries()[key_id].name == name:
                return key_id
    except (ValueError, KeyError):
        pass
    raise PublishError(f"{name}: no key of this repository; `eyas keys show` lists them")


def _append(root: Metadata[Root], keys: KeyStore, key_id: str) -> None:
    signer = keys.signer(key_id)
    if signer is not None:
        append_signature(root, signer, keys.name(key_id))


def _pending(repository: Repository, version: int) -> Path:
    return repository.keys.folder / PENDING / f"{version}.root.json"


def _write(path: Path, root: Metadata[Root]) -> None:
    try:
        write_bytes(path, serialize(root))
    except (StageError, OSError) as error:
        raise CredentialError(str(error)) from None
