"""Two slots for bundles: an update is written to the inactive slot and one rename makes it current.

    STATE/slots/a/, b/          one bundle each
    STATE/slots/a.good, ...     marker: sha256 of that slot's manifest, written last; without it a slot counts as empty
    STATE/slots/current         symbolic link to `a` or `b`, replaced atomically
    STATE/slots/.lock           held during an installation

A crash or power cut at any instruction leaves the current slot unchanged. `Slots.current` is None only until the first
installation succeeds (or if both slots are damaged).

>>> slots = Slots(Path("/var/lib/eyas"))
>>> slots.install(Path("/tmp/bundle"))
PosixPath('/var/lib/eyas/slots/a')
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, Manifest, read_manifest, sha256
from eyas_device.errors import BundleError, CheckFailed, EyasError
from eyas_device.support.files import sync_folder, write_new
from eyas_device.updates.golden import check_bundle

NAMES = ("a", "b")
EXTRAS = ("CARD.md", "README.md", "NOTICE")
"""Files that a bundle may contain besides those in its manifest."""
MAX_BYTES = 2 << 30
"""Maximum size of a bundle."""
MAX_FILES = 64
MAX_TEXT_BYTES = 4 << 20
"""Maximum size of the manifest, the card, the README and the notice, each."""
_MARGIN_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


class SlotError(EyasError, OSError):
    """A slot cannot be written, or there is no good one to switch to; the current slot is unchanged."""


class SlotState(msgspec.Struct, frozen=True):
    """State of one slot."""

    slot: str
    """`a` or `b`."""
    path: str
    current: bool
    good: bool
    """Whether it passed the golden check at installation and has not changed since."""
    name: str = ""
    """Name of the bundle in it."""
    version: str = ""
    manifest_sha256: str = ""
    problem: str = ""
    """Why it is not good."""


def golden_check(root: Path) -> None:
    """Raise `CheckFailed` unless every artefact that can run here passes the golden check.

    Raises `BundleError` without golden images, and `RuntimeUnavailable` without a runtime.
    """
    failed = [result for result in check_bundle(Bundle.open(root)) if result.status == "failed"]
    if failed:
        reasons = "; ".join(f"{result.artefact}: {result.note}" for result in failed)
        raise CheckFailed(f"{root}: the golden check failed here: {reasons}")


class Slots:
    """The two slots below a device's state folder."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "slots"

    def current(self) -> Path | None:
        """The folder of the current bundle, verified (hashes and marker); None without a good slot.

        Falls back to the other slot if the link or the slot behind it is damaged. Raises `SlotError` if the
        folder cannot be read.
        """
        name = self._current()
        return None if name is None else self.folder / name

    def inactive(self) -> Path:
        """The folder that the next installation writes to; never the current one."""
        return self.folder / _other(self._current())

    def states(self) -> list[SlotState]:
        """State of both slots."""
        current = self._current()
        return [self._state(name, current) for name in NAMES]

    def install(self, source: Path, *, check: Callable[[Path], None] = golden_check) -> Path:
        """Copy a bundle into the inactive slot, check it there, and make it current.

        A bundle that is already current is only checked again. A loaded model keeps its open files: files are
        replaced, never overwritten.

        Args:
            source: The bundle to install.
            check: Called with the copy, whose hashes are right; raises if its predictions are wrong.

        Returns:
            The slot's folder.

        Raises:
            BundleError: The bundle is damaged or malformed. The current slot is unchanged, as after any other error.
            SlotError: The disk is full or cannot be written, or another installation is running.

        """
        files = _list_files(source)
        Bundle.open(source)  # before the other slot, which one may want to switch back to, is cleared
        with self._writing():
            current = self._current()
            if current is not None and sha256(self.folder / current / MANIFEST) == sha256(source / MANIFEST):
                check(self.folder / current)
                self._switch(current)
                return self.folder / current
            name = _other(current)
            slot = self.folder / name
            self._check_free_space(sum(files.values()), slot)
            self._clear(name)
            try:
                _copy_all(source, slot, files)
                Bundle.open(slot)
                check(slot)
                self._mark(name)
            except BaseException:
                with suppress(OSError):
                    self._clear(name)
                raise
            self._switch(name)
            return slot

    def roll_back(self) -> Path:
        """Switch to the other slot and return its folder. Raises `SlotError` if it is not good."""
        with self._writing():
            current = self._current()
            name = _other(current)
            problem = self._problem(name)
            if current is None or problem:
                raise SlotError(f"{self.folder / name}: there is no good slot to switch back to ({problem})")
            self._switch(name)
            return self.folder / name

    def _current(self) -> str | None:
        linked = self._linked()
        order = NAMES if linked is None else (linked, _other(linked))
        return next((name for name in order if not self._problem(name)), None)

    def _linked(self) -> str | None:
        """The slot that the link names; None if it is missing or damaged."""
        try:
            target = str((self.folder / "current").readlink())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:  # not a link
                return None
            raise SlotError(f"{self.folder}: {error.strerror}; the state folder must be readable") from None
        return target if target in NAMES else None

    def _problem(self, name: str) -> str:
        """Why a slot is not good; empty if it is good."""
        slot = self.folder / name
        try:
            if slot.is_symlink() or not slot.is_dir():
                return "empty"
            if not _marker(slot).is_file():
                return "incomplete installation"
            if _marker(slot).read_text(encoding="ascii") != sha256(slot / MANIFEST):
                return f"{slot / MANIFEST}: differs from what was installed"
            Bundle.open(slot)
        except (BundleError, UnicodeDecodeError) as error:
            return str(error)
        except OSError as error:
            return f"{slot}: {error.strerror}"
        return ""

    def _state(self, name: str, current: str | None) -> SlotState:
        slot = self.folder / name
        problem = self._problem(name)
        manifest: Manifest | None = None
        with suppress(BundleError):
            manifest = read_manifest(slot)
        return SlotState(
            slot=name,
            path=str(slot),
            current=name == current,
            good=not problem,
            name=manifest.name if manifest else "",
            version=manifest.version if manifest else "",
            manifest_sha256="" if problem else sha256(slot / MANIFEST),
            problem=problem,
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock; turn `OSError` into `SlotError`."""
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise SlotError(f"{self.folder}: cannot be written ({error.strerror})") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SlotError(f"{self.folder}: another installation is running; wait until it ends") from None
            yield
        except EyasError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some space" if full else "check the disk and its permissions"
            raise SlotError(
                f"{error.filename or self.folder}: {error.strerror}; the current slot is unchanged: {fix}"
            ) from None
        finally:
            os.close(lock)

    def _check_free_space(self, needed: int, slot: Path) -> None:
        """Raise `SlotError` unless `needed` bytes fit after `slot` is cleared."""
        filesystem = os.statvfs(self.folder)
        reclaimed = (
            sum(path.lstat().st_size for path in slot.rglob("*")) if slot.is_dir() and not slot.is_symlink() else 0
        )
        free = filesystem.f_bavail * filesystem.f_frsize + reclaimed
        if free < needed + _MARGIN_BYTES:
            raise SlotError(
                f"{self.folder}: {free / 1e6:.1f} MB free, {(needed + _MARGIN_BYTES) / 1e6:.1f} MB needed; "
                "free some space"
            )

    def _clear(self, name: str) -> None:
        """Empty a slot. Its marker is removed first, durably, so that the rest never counts as a bundle."""
        slot = self.folder / name
        _step(f"unmark {name}")
        _remove(_marker(slot))
        _sync(self.folder)
        _step(f"clear {name}")
        _remove(slot)

    def _mark(self, name: str) -> None:
        slot = self.folder / name
        temporary = self.folder / f".{name}.good"
        _remove(temporary)
        _step(f"mark {name}")
        _write(temporary, [sha256(slot / MANIFEST).encode("ascii")])
        temporary.rename(_marker(slot))
        _step(f"marked {name}")
        _sync(self.folder)

    def _switch(self, name: str) -> None:
        """Point the link to the slot `name`."""
        link, temporary = self.folder / "current", self.folder / ".current"
        if self._linked() == name:
            return
        _remove(temporary)
        _step(f"link {name}")
        temporary.symlink_to(name)
        _sync(self.folder)
        if not link.is_symlink():
            _remove(link)  # a rename cannot replace a folder
        temporary.rename(link)
        _step(f"linked {name}")
        _sync(self.folder)


def _other(name: str | None) -> str:
    return "b" if name == "a" else "a"


def _marker(slot: Path) -> Path:
    return slot.with_name(f"{slot.name}.good")


def _list_files(source: Path) -> dict[str, int]:
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


def _copy_all(source: Path, slot: Path, files: dict[str, int]) -> None:
    """Copy and sync every file and folder."""
    slot.mkdir(mode=0o755)
    folders = [slot]
    for path, size in files.items():
        target = slot / path
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            folder = slot / parent
            if folder not in folders:
                folder.mkdir(mode=0o755)
                folders.append(folder)
        _step(f"copy {path}")
        _write(target, _read_chunks(source / path, size))
    for folder in reversed(folders):
        folder.chmod(0o755)  # whatever the umask: the service may be another user
        _sync(folder)
    _sync(slot.parent)


def _read_chunks(path: Path, max_bytes: int) -> Iterator[bytes]:
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


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    write_new(path, chunks)
    _step(f"synced {path.name}")


def _sync(folder: Path) -> None:
    _step(f"sync {folder.name}")
    sync_folder(folder)


def _remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step(name: str) -> None:
    """Hook before each change of the disk, for tests that crash here."""
