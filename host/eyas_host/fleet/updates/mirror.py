"""Copy a repository to another folder, a stick or what a web server serves, so that it is whole at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from eyas_device.updates.release import Release, blob_path
from eyas_host.fleet.broker.pki import CredentialError
from eyas_host.fleet.updates.metadata import RepositoryMetadata
from eyas_host.fleet.updates.repository import Repository
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write


class Copied(msgspec.Struct, frozen=True):
    """What a copy came to."""

    files: int
    """Files that were not there."""
    size_bytes: int


def mirror(repository: Repository, to: Path, *, model: str = "") -> Copied:
    """Copy what is new to `to`: blobs, targets, metadata, `timestamp.json` last.

    Args:
        repository: The kit's repository.
        to: The folder; created if its parent exists.
        model: Copy the blobs of this model alone; a device that wants another one finds its files missing.

    Raises:
        CredentialError: `to` cannot be written to.

    """
    if not to.parent.is_dir():
        raise CredentialError(f"{to.parent}: there is no such folder; is the stick mounted?")
    with repository.changing() as metadata:
        files = size = 0
        for path in (*_blobs(repository, model), *_targets(metadata), *_metadata(metadata)):
            source, there = repository.folder / path, to / path
            same_name = there.is_file() and there.stat().st_size == source.stat().st_size
            if same_name and (path.startswith("blobs/") or there.read_bytes() == source.read_bytes()):
                continue
            try:
                with atomic_write(there) as temporary:
                    shutil.copyfile(source, temporary)
            except (OSError, StageError) as error:
                raise CredentialError(f"{there}: cannot be written ({error})") from None
            files, size = files + 1, size + source.stat().st_size
    return Copied(files, size)


def _blobs(repository: Repository, model: str) -> Iterator[str]:
    releases: list[Release] = repository.releases(model)
    digests = {file.sha256 for one in releases for variant in one.variants for file in variant.files}
    yield from (blob_path(digest) for digest in sorted(digests))


def _targets(metadata: RepositoryMetadata) -> Iterator[str]:
    for role in metadata.roles.values():
        for name, info in role.signed.targets.items():
            folder, slash, file = name.rpartition("/")
            yield f"targets/{folder}{slash}{info.hashes['sha256']}.{file}"


def _metadata(metadata: RepositoryMetadata) -> Iterator[str]:
    yield from (f"metadata/{version}.root.json" for version in range(1, metadata.root.signed.version + 1))
    yield from (f"metadata/{role.signed.version}.{name}.json" for name, role in metadata.roles.items())
    yield f"metadata/{metadata.snapshot.signed.version}.snapshot.json"
    yield "metadata/timestamp.json"
