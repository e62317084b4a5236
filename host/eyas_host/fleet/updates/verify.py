"""Verify a repository as a device would, and everything in it besides."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from eyas_device.config import UpdateSection
from eyas_device.updates.refusals import TrustError
from eyas_device.updates.release import POLICY, Channel, Policy, Release, UpdateError, blob_path
from eyas_device.updates.trust import TrustedRepository
from eyas_host.fleet.broker.pki import read_file
from eyas_host.fleet.updates.repository import Repository, file_digest

_HASH_DIGITS = 8


def verify(repository: Repository, folder: Path | None = None) -> list[str]:
    """What is wrong with a repository: signatures, expiry, targets, blobs, channels. Nothing is changed.

    Args:
        repository: The kit's repository, whose first root is trusted.
        folder: A copy of it, e.g. on a stick; by default the kit's own.

    """
    folder = folder or repository.folder
    with tempfile.TemporaryDirectory(prefix="eyas-verify-") as scratch:
        root = Path(scratch) / "root.json"
        root.write_bytes(read_file(repository.folder / "metadata" / "1.root.json"))
        update = UpdateSection(url=str(folder.resolve()), root=str(root))
        try:
            with TrustedRepository(update, "", Path(scratch)) as trusted:
                found = trusted.refresh()
                return [*filter(None, (found.frozen,)), *_content(repository, trusted, folder)]
        except UpdateError as error:
            return [str(error)]


def _content(repository: Repository, trusted: TrustedRepository, folder: Path) -> Iterator[str]:
    metadata = repository.metadata()
    names = sorted(name for role in metadata.roles.values() for name in role.signed.targets)
    releases = [name for name in names if name.endswith("/release.json")]
    sound: dict[str, str] = {}
    for name in names:
        try:
            if name in releases:
                release = trusted.document(name, Release)[0]
                yield from _blobs(folder, name, release, sound)
            elif name == POLICY:
                trusted.document(name, Policy)
            else:
                channel = trusted.document(name, Channel)[0]
                yield from _dangling(name, channel, releases)
        except TrustError as error:
            yield str(error)


def _blobs(folder: Path, name: str, release: Release, sound: dict[str, str]) -> Iterator[str]:
    """Problems of a release's files; `sound` holds the verdict on those that were read before."""
    for variant in release.variants:
        for file in variant.files:
            if file.sha256 not in sound:
                sound[file.sha256] = _blob_problem(folder / blob_path(file.sha256), file.sha256, file.size_bytes)
            if sound[file.sha256]:
                yield f"{name}: {file.path}: {sound[file.sha256]}"


def _blob_problem(path: Path, digest: str, size_bytes: int) -> str:
    try:
        if path.stat().st_size == size_bytes and file_digest(path) == digest:
            return ""
    except OSError as error:
        return f"blob {digest[:_HASH_DIGITS]} cannot be read ({error.strerror}); publish the bundle again"
    return f"blob {digest[:_HASH_DIGITS]} is damaged; publish the bundle again"


def _dangling(name: str, channel: Channel, releases: Sequence[str]) -> Iterable[str]:
    return [
        f"{name}: wants {target}, which is not published"
        for target in (channel.target, channel.previous)
        if target and target not in releases
    ]
