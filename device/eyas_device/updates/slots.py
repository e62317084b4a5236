"""Two slots for the model: an update goes into the one that is not in use, and one rename makes it the current one.

    STATE/slots/a/, b/          a bundle each
    STATE/slots/a.good, ...     the sha256 of that slot's manifest, written last: without it a slot counts as empty
    STATE/slots/current         a link to `a` or `b`, replaced atomically
    STATE/slots/.lock           held while something is installed

A crash or power cut at any instruction leaves the slot that was current as it was. "No good slot yet" is a state of its
own: `Slots.current` is None only until the first installation succeeds (or if somebody damages both slots).

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
from eyas_device.updates.golden import check

NAMES = ("a", "b")
EXTRAS = ("CARD.md", "README.md", "NOTICE")
"""Files that a bundle may hold beside those that its manifest names."""
MOST_BYTES = 2 << 30
"""Largest bundle that is taken."""
MOST_FILES = 64
MOST_TEXT_BYTES = 4 << 20
"""Largest manifest, card, README or notice."""
_ROOM_BYTES = 1 << 20
_PIECE = 1 << 20


class SlotError(EyasError, OSError):
    """A slot cannot be written or there is none to switch to; the current one is as it was."""


class SlotState(msgspec.Struct, frozen=True):
    """One slot as it is now."""

    slot: str
    """`a` or `b`."""
    path: str
    current: bool
    good: bool
    """Whether it was proven when it was installed and has not changed since."""
    name: str = ""
    """Of the bundle in it."""
    version: str = ""
    manifest_sha256: str = ""
    fault: str = ""
    """Why it is not good."""


def prove(root: Path) -> None:
    """The golden check: raise `CheckFailed` unless every artefact that runs here answers as it did on the host.

    Raises `BundleError` without golden images, and `RuntimeUnavailable` if no runtime is there to answer.
    """
    failed = [result for result in check(Bundle.open(root)) if result.status == "failed"]
    if failed:
        told = "; ".join(f"{result.artefact}: {result.note}" for result in failed)
        raise CheckFailed(f"{root}: the golden check failed here: {told}")


class Slots:
    """The two slots below a device's state folder."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "slots"

    def current(self) -> Path | None:
        """The folder of the current bundle, verified (hashes and marker), or None: no good slot yet.

        If the link or the slot behind it is damaged, the other slot if that one is good. Raises `SlotError` if the
        folder cannot be read.
        """
        name = self._current()
        return None if name is None else self.folder / name

    def inactive(self) -> Path:
        """The folder that the next installation writes to: never the current one."""
        return self.folder / _other(self._current())

    def states(self) -> list[SlotState]:
        """Both slots, for people to read."""
        current = self._current()
        return [self._state(name, current) for name in NAMES]

    def install(self, source: Path, *, prove: Callable[[Path], None] = prove) -> Path:
        """Copy the bundle at `source` into the inactive slot, prove it there, and make it the current one.

        `prove` is given the copy, whose hashes are right, and raises if it does not answer as it should. A bundle that
        is current already is proven again where it is. Returns the slot's folder. Raises `BundleError` for a bundle
        that is damaged or odd, what `prove` raises, and `SlotError` if the disk is full, cannot be written, or another
        installation is under way; in each case the current slot stays as it was. A loaded model keeps the files that
        it has open: files are replaced, never overwritten.
        """
        files = _inspect(source)
        Bundle.open(source)  # before the other slot, which one may want to switch back to, is given up
        with self._writing():
            current = self._current()
            if current is not None and sha256(self.folder / current / MANIFEST) == sha256(source / MANIFEST):
                prove(self.folder / current)
                self._switch(current)
                return self.folder / current
            name = _other(current)
            slot = self.folder / name
            self._expect_room(sum(files.values()), slot)
            self._clear(name)
            try:
                _copy_all(source, slot, files)
                Bundle.open(slot)
                prove(slot)
                self._mark(name)
            except BaseException:
                with suppress(OSError):
                    self._clear(name)
                raise
            self._switch(name)
            return slot

    def roll_back(self) -> Path:
        """Make the other slot the current one and return its folder. Raises `SlotError` if that one is not good."""
        with self._writing():
            current = self._current()
            name = _other(current)
            fault = self._fault(name)
            if current is None or fault:
                raise SlotError(f"{self.folder / name}: there is no good slot to switch back to ({fault})")
            self._switch(name)
            return self.folder / name

    def _current(self) -> str | None:
        linked = self._linked()
        order = NAMES if linked is None else (linked, _other(linked))
        return next((name for name in order if not self._fault(name)), None)

    def _linked(self) -> str | None:
        """What the link names, or None if it is missing or damaged."""
        try:
            target = str((self.folder / "current").readlink())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:  # not a link
                return None
            raise SlotError(f"{self.folder}: {error.strerror}; the state folder must be readable") from None
        return target if target in NAMES else None

    def _fault(self, name: str) -> str:
        """Why a slot is not good; empty if it is."""
        slot = self.folder / name
        try:
            if slot.is_symlink() or not slot.is_dir():
                return "empty"
            if not _marker(slot).is_file():
                return "not installed completely"
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
        fault = self._fault(name)
        manifest: Manifest | None = None
        with suppress(BundleError):
            manifest = read_manifest(slot)
        return SlotState(
            slot=name,
            path=str(slot),
            current=name == current,
            good=not fault,
            name=manifest.name if manifest else "",
            version=manifest.version if manifest else "",
            manifest_sha256="" if fault else sha256(slot / MANIFEST),
            fault=fault,
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock; what the system refuses becomes a `SlotError`."""
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise SlotError(f"{self.folder}: cannot be written ({error.strerror})") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SlotError(f"{self.folder}: another installation is under way; wait until it is done") from None
            yield
        except EyasError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some room" if full else "see to the disk and its permissions"
            raise SlotError(
                f"{error.filename or self.folder}: {error.strerror}; the current slot is as it was: {fix}"
            ) from None
        finally:
            os.close(lock)

    def _expect_room(self, needed: int, slot: Path) -> None:
        """Raise `SlotError` unless `needed` bytes fit once `slot` is cleared."""
        system = os.statvfs(self.folder)
        held = sum(path.lstat().st_size for path in slot.rglob("*")) if slot.is_dir() and not slot.is_symlink() else 0
        free = system.f_bavail * system.f_frsize + held
        if free < needed + _ROOM_BYTES:
            raise SlotError(
                f"{self.folder}: {free / 1e6:.1f} MB free, {(needed + _ROOM_BYTES) / 1e6:.1f} MB needed; free some room"
            )

    def _clear(self, name: str) -> None:
        """Empty a slot. Its marker goes first and for good, so that what is left never counts as a bundle."""
        slot = self.folder / name
        _step(f"unmark {name}")
        _discard(_marker(slot))
        _sync(self.folder)
        _step(f"clear {name}")
        _discard(slot)

    def _mark(self, name: str) -> None:
        slot = self.folder / name
        temporary = self.folder / f".{name}.good"
        _discard(temporary)
        _step(f"mark {name}")
        _write(temporary, [sha256(slot / MANIFEST).encode("ascii")])
        temporary.rename(_marker(slot))
        _step(f"marked {name}")
        _sync(self.folder)

    def _switch(self, name: str) -> None:
        """Let the link name the slot `name`."""
        link, temporary = self.folder / "current", self.folder / ".current"
        if self._linked() == name:
            return
        _discard(temporary)
        _step(f"link {name}")
        temporary.symlink_to(name)
        _sync(self.folder)
        if not link.is_symlink():
            _discard(link)  # a folder by that name could not be replaced by a rename
        temporary.rename(link)
        _step(f"linked {name}")
        _sync(self.folder)


def _other(name: str | None) -> str:
    return "b" if name == "a" else "a"


def _marker(slot: Path) -> Path:
    return slot.with_name(f"{slot.name}.good")


def _inspect(source: Path) -> dict[str, int]:
    """The files to copy (path below `source` -> most bytes), before anything is read in full.

    Raises `BundleError` for links, pipes, odd paths and absurd sizes.
    """
    _expect_file(source, MANIFEST, MOST_TEXT_BYTES)
    try:
        manifest = read_manifest(source)
    except RecursionError:
        raise BundleError(f"{source / MANIFEST}: nested too deeply; this is no manifest") from None
    files = {MANIFEST: MOST_TEXT_BYTES}
    for file in manifest.files():
        pure = PurePosixPath(file.path)
        taken = file.path in (MANIFEST, *EXTRAS) or files.get(file.path, file.size_bytes) != file.size_bytes
        if taken or str(pure) != file.path or "\\" in file.path or len(pure.parts) > 4 or len(file.path) > 200:
            raise BundleError(f"{source}: file {file.path!r}: an odd path or recorded twice; pack the bundle again")
        files[file.path] = file.size_bytes
    total = sum(files.values())
    if len(files) > MOST_FILES or min(files.values()) < 0 or total > MOST_BYTES:
        raise BundleError(
            f"{source}: {len(files)} files of {total} bytes are recorded; {MOST_FILES} files and "
            f"{MOST_BYTES} bytes are the most that is taken"
        )
    for path, size in files.items():
        _expect_file(source, path, size)
    for extra in EXTRAS:
        if os.path.lexists(source / extra):
            _expect_file(source, extra, MOST_TEXT_BYTES)
            files[extra] = MOST_TEXT_BYTES
    return {path: (source / path).lstat().st_size for path in files}


def _expect_file(source: Path, path: str, most: int) -> None:
    """Raise `BundleError` unless `path` is a plain file of at most `most` bytes with no link on the way to it."""
    place = source
    parts = PurePosixPath(path).parts
    for number, part in enumerate(parts):
        place = place / part
        try:
            found = place.lstat()
        except OSError as error:
            raise BundleError(f"{place}: {error.strerror}; copy the bundle again") from None
        right = stat.S_ISREG if number == len(parts) - 1 else stat.S_ISDIR
        if not right(found.st_mode):
            raise BundleError(f"{place}: not a plain file or folder; a bundle has no links and no devices")
    if found.st_size > most:
        raise BundleError(f"{place}: {found.st_size} bytes, {most} allowed; copy the bundle again")


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
        _write(target, _pieces(source / path, size))
    for folder in reversed(folders):
        folder.chmod(0o755)  # whatever the umask: the service is another user
        _sync(folder)
    _sync(slot.parent)


def _pieces(path: Path, most: int) -> Iterator[bytes]:
    """A file's bytes. Raises `BundleError` if it grew or was replaced by a link since it was looked at."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; copy the bundle again") from None
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f"{path}: not a plain file any more; copy the bundle again")
        while piece := stream.read(_PIECE):
            most -= len(piece)
            if most < 0:
                raise BundleError(f"{path}: grew while it was copied; copy the bundle again")
            yield piece


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    write_new(path, chunks)
    _step(f"synced {path.name}")


def _sync(folder: Path) -> None:
    _step(f"sync {folder.name}")
    sync_folder(folder)


def _discard(path: Path) -> None:
    """Remove a file, a link (not what it names) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step(name: str) -> None:
    """Called before each change of the disk; the tests crash here."""
