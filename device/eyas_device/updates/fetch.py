"""The blobs of a release: those that the device does not have are downloaded into staging, the bundle is put together.

    STATE/updates/blobs/SHA256        verified when it was written, and verified again when it is used
    STATE/updates/blobs/SHA256.part   what has arrived so far; a later attempt goes on from there
    STATE/updates/bundle/             the bundle, put together from blobs and from files of the slots

Nothing that arrives is trusted: a blob may have exactly the signed size and hash, and takes no more room on the way.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from eyas_device.bundle import MANIFEST, sha256
from eyas_device.errors import BundleError
from eyas_device.support.files import sync_folder, write_new
from eyas_device.updates.copying import read_chunks
from eyas_device.updates.refusals import EndlessDataError, TamperedError, UnreachableError
from eyas_device.updates.release import MAX_BLOB_BYTES, MAX_FILES, ReleaseFile, UpdateError, Variant, blob_path
from eyas_device.updates.space import shortage

BLOBS, BUNDLE = "blobs", "bundle"
_PART = ".part"
_CHUNK_BYTES = 1 << 20
_MAX_PARTS = 4
_MAX_PATH = 200

Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived so far and those that are downloaded in all."""


class SpaceError(UpdateError):
    """The release does not fit on the disk; nothing was written."""


class Source(Protocol):
    """Where blobs come from; a `eyas_device.updates.fetcher.Fetcher` is one."""

    def open(self, path: str, *, offset: int = 0, max_bytes: int) -> Iterator[bytes]:
        """Yield a file of the repository from `offset` on. Raises `UpdateError`."""
        ...


class Staging:
    """The folder in which a release is put together.

    Args:
        folder: `STATE/updates`.
        rate_kb: Maximum download rate, kB per second (0: no limit).
        clock, sleep: For the rate.

    """

    def __init__(
        self,
        folder: Path,
        *,
        rate_kb: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._blobs, self._bundle = folder / BLOBS, folder / BUNDLE
        self._rate, self._clock, self._sleep = 1000 * rate_kb, clock, sleep

    def assemble(
        self,
        variant: Variant,
        source: Source,
        have: Iterable[Path] = (),
        *,
        extra_bytes: int = 0,
        progress: Progress = lambda done, total: None,
    ) -> Path:
        """Put a bundle together and return its folder, which the next call clears.

        Args:
            variant: The files of the bundle, as they were signed.
            source: Where missing blobs come from.
            have: Files of the slots, which may have the same content.
            extra_bytes: Room that has to stay free for the installation, beside that for the blobs.
            progress: Called while blobs arrive.

        Raises:
            SpaceError: It does not fit; nothing was written.
            TamperedError, EndlessDataError: A blob is not what was signed.
            UpdateError: The variant's list of files is impossible, or blobs cannot be read or written.

        """
        files = check_files(variant)
        try:
            self._blobs.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._clear(keep={file.sha256 for file in files})
            found = self._find(files, have)
            missing = {file.sha256: file.size_bytes for file in files if file.sha256 not in found}
            needed = sum(size - min(size, self._arrived(digest)) for digest, size in missing.items())
            if problem := shortage(self._blobs, needed + extra_bytes):
                raise SpaceError(problem)
            done, total = 0, sum(missing.values())

            def report(arrived: int) -> None:
                progress(done + arrived, total)

            for digest, size in missing.items():
                found[digest] = self._fetch(digest, size, source, report)
                done += size
            self._put_together(files, found)
        except UpdateError:
            raise
        except BundleError as error:  # a slot was written to meanwhile
            raise UpdateError(str(error)) from None
        except OSError as error:
            fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
            raise UpdateError(f"{error.filename or self._blobs}: {error.strerror}; {fix}") from None
        return self._bundle

    def clean(self) -> None:
        """Remove everything. A disk that fails is ignored: the next update cleans again."""
        with suppress(OSError):
            self._clear(keep=())

    def _find(self, files: Iterable[ReleaseFile], have: Iterable[Path]) -> dict[str, Path]:
        """Blobs that are here already, by digest: complete ones of an earlier attempt, and files of the slots."""
        sizes: dict[int, set[str]] = {}
        for file in files:
            sizes.setdefault(file.size_bytes, set()).add(file.sha256)
        found: dict[str, Path] = {}
        staged = (path for path in sorted(self._blobs.iterdir()) if path.suffix != _PART)
        for path in (*staged, *have):
            with suppress(OSError):
                wanted = sizes.get(path.lstat().st_size, set()) - found.keys()
                if wanted and path.is_file() and not path.is_symlink() and (digest := sha256(path)) in wanted:
                    found[digest] = path
        return found

    def _arrived(self, digest: str) -> int:
        try:
            return (self._blobs / f"{digest}{_PART}").lstat().st_size
        except FileNotFoundError:
            return 0

    def _fetch(self, digest: str, size: int, source: Source, progress: Callable[[int], None]) -> Path:
        """Download a blob, from where an earlier attempt ended; if that was damaged, once more from the start."""
        part = self._blobs / f"{digest}{_PART}"
        resumed = 0 < self._arrived(digest) <= size
        if not resumed:
            part.unlink(missing_ok=True)
        if self._download(part, digest, size, source, progress) != digest:
            part.unlink()
            if not resumed or self._download(part, digest, size, source, progress) != digest:
                part.unlink(missing_ok=True)
                raise TamperedError(f"{blob_path(digest)}: its content is not what was signed: damaged or altered")
        path = part.with_suffix("")
        part.replace(path)
        sync_folder(self._blobs)
        return path

    def _download(self, part: Path, digest: str, size: int, source: Source, progress: Callable[[int], None]) -> str:
        """Append what is missing to `part`, sync it, and return the sha256 of all of it."""
        hashed = hashlib.sha256()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o644), "r+b") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hashed.update(chunk)
            arrived, began, paced = stream.tell(), self._clock(), 0
            if arrived < size:
                for chunk in source.open(blob_path(digest), offset=arrived, max_bytes=size - arrived):
                    arrived += len(chunk)
                    if arrived > size:
                        raise EndlessDataError(f"{blob_path(digest)}: more than the {size} bytes that were signed")
                    stream.write(chunk)
                    hashed.update(chunk)
                    progress(arrived)
                    paced += len(chunk)
                    if self._rate and (early := paced / self._rate - (self._clock() - began)) > 0:
                        self._sleep(early)
            if arrived < size:
                raise UnreachableError(f"{blob_path(digest)}: ended after {arrived} of {size} bytes; it is tried again")
            stream.flush()
            os.fsync(stream.fileno())
        return hashed.hexdigest()

    def _put_together(self, files: Iterable[ReleaseFile], found: Mapping[str, Path]) -> None:
        self._bundle.mkdir(mode=0o755)
        for file in files:
            path = self._bundle / file.path
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            try:
                path.hardlink_to(found[file.sha256])
            except OSError:  # another file system, or a file of another user
                write_new(path, read_chunks(found[file.sha256], file.size_bytes))

    def _clear(self, keep: Iterable[str]) -> None:
        if self._bundle.is_symlink():
            self._bundle.unlink()
        elif self._bundle.exists():
            shutil.rmtree(self._bundle)
        if not self._blobs.is_dir():
            return
        for path in self._blobs.iterdir():
            if path.name.removesuffix(_PART) in keep and path.is_file() and not path.is_symlink():
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_files(variant: Variant) -> tuple[ReleaseFile, ...]:
    """The files of a bundle's variant. Raises `UpdateError` for paths and sizes that no bundle has."""
    files, paths = variant.files, {file.path for file in variant.files}
    total = sum(file.size_bytes for file in files)
    if not 0 < len(files) <= MAX_FILES or total > MAX_BLOB_BYTES or len(paths) != len(files):
        raise UpdateError(
            f"the release lists {len(files)} files of {total} bytes, some of them twice or too many: publish it again"
        )
    for path in paths:
        pure = PurePosixPath(path)
        usual = path.isprintable() and "\\" not in path and len(path) <= _MAX_PATH and 0 < len(pure.parts) <= _MAX_PARTS
        inside = not pure.is_absolute() and ".." not in pure.parts and str(pure) == path
        if not (usual and inside) or any(str(parent) in paths for parent in pure.parents):
            raise UpdateError(f"the release lists the file {path!r}, which no bundle has: publish it again")
    if variant.platform and not all(path.endswith(".whl") and "/" not in path for path in paths):
        raise UpdateError("the release lists files that are not wheels: publish it again")
    manifest = next((file.sha256 for file in files if file.path == MANIFEST), "")
    if manifest != variant.manifest_sha256:
        raise UpdateError(f"the release's {MANIFEST} is not the one that it names: publish it again")
    return files
