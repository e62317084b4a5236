"""Remove what no metadata name any more, once no device can be in the middle of reading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from eyas_device.updates.release import blob_path
from eyas_host.fleet.updates.repository import Repository

GRACE_S = 2 * 86400.0
"""A device that began before the last change has ended by then."""


def prune(repository: Repository) -> int:
    """Remove old metadata, targets and blobs; returns how many files went. Roots stay, for devices that were off."""
    removed = 0
    with repository.changing() as metadata:
        kept = {"metadata/timestamp.json", f"metadata/{metadata.snapshot.signed.version}.snapshot.json"}
        for role, one in metadata.roles.items():
            kept.add(f"metadata/{one.signed.version}.{role}.json")
            for name, info in one.signed.targets.items():
                folder, slash, file = name.rpartition("/")
                kept.add(f"targets/{folder}{slash}{info.hashes['sha256']}.{file}")
        for release in repository.releases():
            kept |= {blob_path(file.sha256) for variant in release.variants for file in variant.files}
        for path in _files(repository.folder):
            name = path.relative_to(repository.folder).as_posix()
            if name in kept or name.endswith(".root.json"):
                continue
            with suppress(OSError):
                if repository.now() - path.stat().st_mtime > GRACE_S:
                    path.unlink()
                    removed += 1
    return removed


def _files(folder: Path) -> Iterator[Path]:
    for name in ("metadata", "targets", "blobs"):
        yield from (path for path in (folder / name).rglob("*") if path.is_file())
