"""The files of a bundle that is about to be installed: which they are, and reading them with distrust."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from eyas_device.bundle import MANIFEST, read_manifest
from eyas_device.errors import BundleError

EXTRAS = ("CARD.md", "README.md", "NOTICE")
"""Files that a bundle may contain besides those in its manifest."""
MAX_BYTES = 2 << 30
"""Maximum size of a bundle."""
MAX_FILES = 64
MAX_TEXT_BYTES = 4 << 20
"""Maximum size of the manifest, the card, the README and the notice, each."""
_CHUNK_BYTES = 1 << 20


def list_files(source: Path) -> dict[str, int]:
    """The files to copy (path below `source` -> size in bytes), checked before anything is read in full.

    Raises `BundleError` for links, pipes, unusual paths and absurd sizes.
    """
    _check_file(source, MANIFEST, MAX_TEXT_BYTES)
    try:
        manifest = read_manifest(source)
    except RecursionError:
        raise BundleError(f"{source / MANIFEST}: nested too deeply; not a manifest") from None
    files = {MANIFEST: MAX_TEXT_BYTES}
    for file in manifest.files():
        pure = PurePosixPath(file.path)
        duplicate = file.path in (MANIFEST, *EXTRAS) or files.get(file.path, file.size_bytes) != file.size_bytes
        if duplicate or str(pure) != file.path or "\\" in file.path or len(pure.parts) > 4 or len(file.path) > 200:
            raise BundleError(f"{source}: file {file.path!r}: unusual path or recorded twice; pack the bundle again")
        files[file.path] = file.size_bytes
    total = sum(files.values())
    if len(files) > MAX_FILES or min(files.values()) < 0 or total > MAX_BYTES:
        raise BundleError(
            f"{source}: {len(files)} files of {total} bytes are recorded; {MAX_FILES} files and "
            f"{MAX_BYTES} bytes are allowed"
        )
    for path, size in files.items():
        _check_file(source, path, size)
    for extra in EXTRAS:
        if os.path.lexists(source / extra):
            _check_file(source, extra, MAX_TEXT_BYTES)
            files[extra] = MAX_TEXT_BYTES
    return {path: (source / path).lstat().st_size for path in files}


def _check_file(source: Path, path: str, max_bytes: int) -> None:
    """Raise `BundleError` unless `path` is a regular file of at most `max_bytes`, with no link on the way to it."""
    current = source
    parts = PurePosixPath(path).parts
    for number, part in enumerate(parts):
        current = current / part
        try:
            status = current.lstat()
        except OSError as error:
            raise BundleError(f"{current}: {error.strerror}; copy the bundle again") from None
        expected = stat.S_ISREG if number == len(parts) - 1 else stat.S_ISDIR
        if not expected(status.st_mode):
            raise BundleError(f"{current}: not a regular file or folder; links and devices are not allowed")
    if status.st_size > max_bytes:
        raise BundleError(f"{current}: {status.st_size} bytes, {max_bytes} allowed; copy the bundle again")


def read_chunks(path: Path, max_bytes: int) -> Iterator[bytes]:
    """Read a file. Raises `BundleError` if it grew or was replaced by a link since it was checked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; copy the bundle again") from None
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f"{path}: no longer a regular file; copy the bundle again")
        while chunk := stream.read(_CHUNK_BYTES):
            max_bytes -= len(chunk)
            if max_bytes < 0:
                raise BundleError(f"{path}: grew while it was copied; copy the bundle again")
            yield chunk
