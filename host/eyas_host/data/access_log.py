"""The access log of a held-out test set: which run read it when, in one place for all runs on the same images.

It lies beside the images, in `.eyas/test-sets/`, keyed by the hash of the test set; where that folder cannot be
written, or belongs to an installed package, in the user's data folder, and for a user without one beside the runs. Each
line holds the hash of the one before and its own, so that an edited, removed or inserted line is noticed; each run has
a copy of its own lines, by which a removed log is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from eyas_host.support.caches import has_home
from eyas_host.support.errors import DataError
from eyas_host.support.files import try_flock, write_bytes

FOLDER = Path(".eyas") / "test-sets"
"""Below the folder of the images."""
RUN_COPY = Path("test-set") / "access.jsonl"
"""The run's own lines, below its folder, outside the split's, so that it survives a new split."""
_SHARED = 0.5
"""Fraction of a test set's images from which an access to another test set counts as one to it."""


class LoggedAccess(msgspec.Struct, frozen=True):
    """A line of the access log."""

    time: float
    reason: str
    run: str = ""
    """Name of the run's folder."""
    test_set: str = ""
    """Hash of the test set, `test_set_hash`."""
    models: str = ""
    """sha256 over the outputs of all finished stages."""
    early: bool = False
    """Accessed on purpose before the bundle was packed: no choice may depend on it."""
    previous: str = ""
    """Digest of the line before, empty in the first one."""
    digest: str = ""
    """sha256 of all of the above."""


class AccessLog(msgspec.Struct, frozen=True):
    """All accesses to a test set, and what is wrong with the log."""

    path: str
    """The log that the next access is written to; empty if none can be written."""
    accesses: tuple[LoggedAccess, ...]
    """Oldest first; also those to other test sets with half of its images."""
    problems: tuple[str, ...] = ()


def test_set_hash(images: Iterable[str]) -> str:
    """Hash of a test set, from the sha256 of its images in any order."""
    return hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()


def append_access(access: LoggedAccess, images: Sequence[str], sources: Sequence[str], root: Path) -> None:
    """Log an access to the test set of `images` (sha256 of each), beside the images and in the run at `root`.

    Raises `DataError` if no folder for the log can be written.
    """
    key = test_set_hash(images)
    folder = _writable(sources, root, key)
    write_bytes(folder / f"{key}.images", "\n".join(sorted(images)).encode())
    with (folder / f"{key}.jsonl").open("a+b") as stream:
        try_flock(stream, fcntl.LOCK_EX, wait=True)
        stream.seek(0)
        lines = stream.read().splitlines()
        previous = _line_digest(lines[-1]) if lines else ""
        access = msgspec.structs.replace(access, test_set=key, previous=previous, digest="")
        access = msgspec.structs.replace(access, digest=_digest(access))
        _append(stream.fileno(), access)
    copy = root / RUN_COPY
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.open("ab") as stream:
        _append(stream.fileno(), access)


def read_accesses(images: Sequence[str], sources: Sequence[str], root: Path) -> AccessLog:
    """The accesses to the test set of `images` by all runs, and whether lines were edited or removed."""
    key, wanted = test_set_hash(images), set(images)
    found: dict[str, LoggedAccess] = {}
    problems: list[str] = []
    for folder in _folders(sources, root):
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
            if path.stem != key and not _overlap(path.with_suffix(".images"), wanted):
                continue
            accesses, wrong = _read_log(path)
            found |= {access.digest: access for access in accesses}
            problems += wrong
    own, wrong = _read_lines(root / RUN_COPY)
    problems += wrong
    missing = [access for access in own if access.test_set == key and access.digest not in found]
    if missing:
        problems.append(f"{len(missing)} accesses by this run are missing in the log beside the images")
        found |= {access.digest: access for access in missing}
    try:
        log = str(_writable(sources, root, key) / f"{key}.jsonl")
    except DataError:
        log = ""
    return AccessLog(log, tuple(sorted(found.values(), key=lambda access: access.time)), tuple(problems))


def _folders(sources: Sequence[str], root: Path) -> list[Path]:
    """Where the log of the run at `root` may lie, the preferred place first."""
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    beside = [Path(source) for source in sources[:1]]
    beside = [path for path in beside if not any(path.resolve().is_relative_to(package) for package in packages)]
    folders = [path / FOLDER for path in beside]
    if data := os.environ.get("XDG_DATA_HOME"):
        folders.append(Path(data) / "eyas" / "test-sets")
    elif has_home():
        folders.append(Path.home() / ".local/share/eyas/test-sets")
    return [*folders, root.absolute().parent / FOLDER]


def _writable(sources: Sequence[str], root: Path, key: str) -> Path:
    """The first folder in which the log of the test set `key` can be written."""
    folders = _folders(sources, root)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        logs = [path for path in (folder / f"{key}.jsonl", folder / f"{key}.images") if path.exists()]
        if all(os.access(path, os.W_OK) for path in (folder, *logs)):
            return folder
    raise DataError(
        f"the access log of the held-out test set cannot be written to {' or '.join(map(str, folders))}; make one of "
        "them writable or set XDG_DATA_HOME"
    )


def _overlap(path: Path, wanted: set[str]) -> bool:
    """Whether a test set with this list has at least half of the `wanted` images."""
    try:
        listed = set(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return False
    return len(wanted & listed) >= _SHARED * len(wanted)


def _read_log(path: Path) -> tuple[list[LoggedAccess], list[str]]:
    """The lines of a log, and a problem if its chain of hashes is broken."""
    accesses, problems = _read_lines(path)
    previous = ""
    for number, access in enumerate(accesses, 1):
        if access.previous != previous and not problems:
            problems = [f"{path}: a line is missing or was inserted before line {number}"]
        previous = access.digest
    return accesses, problems


def _read_lines(path: Path) -> tuple[list[LoggedAccess], list[str]]:
    accesses, wrong = [], []
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        return [], [f"{path}: cannot be read ({error.strerror})"]
    for number, line in enumerate(lines, 1):
        try:
            access = msgspec.json.decode(line, type=LoggedAccess)
        except msgspec.DecodeError:
            wrong.append(number)
            continue
        if access.digest != _digest(access):
            wrong.append(number)
        accesses.append(access)
    return accesses, [f"{path}: was edited (line {', '.join(map(str, wrong))})"] if wrong else []


def _digest(access: LoggedAccess) -> str:
    plain = msgspec.structs.replace(access, digest="")
    return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()


def _line_digest(line: bytes) -> str:
    """The digest that a line claims; of a damaged line its own hash, so that the chain stays broken."""
    try:
        return msgspec.json.decode(line, type=LoggedAccess).digest
    except msgspec.DecodeError:
        return hashlib.sha256(line).hexdigest()


def _append(descriptor: int, access: LoggedAccess) -> None:
    os.write(descriptor, msgspec.json.encode(access) + b"\n")
    os.fsync(descriptor)
