"""Two slots for bundles: an update is written to the inactive slot and one rename makes it current.

    STATE/slots/a/, b/          one bundle each
    STATE/slots/a.good, ...     marker: sha256 of that slot's manifest, written last; without it a slot counts as empty
    STATE/slots/a.release, ...  the signed release that the slot was installed from; absent for a bundle without one
    STATE/slots/current         symbolic link to `a` or `b`, replaced atomically
    STATE/slots/.lock           held during an installation
    (and what `eyas_device.updates.records` remembers)

A slot that an agent runs is never written to, whatever the link says. A crash or power cut at any instruction leaves
the current slot unchanged. `Slots.current` is None only until the first installation succeeds (or if both slots are
damaged).

>>> slots = Slots(Path("/var/lib/eyas"))
>>> slots.install(Path("/tmp/bundle"))
PosixPath('/var/lib/eyas/slots/a')
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, Manifest, read_manifest, sha256
from eyas_device.config import ModelSection
from eyas_device.errors import BundleError, EyasError
from eyas_device.support.files import atomic_write, sync_folder, write_new
from eyas_device.updates.copying import list_files, read_chunks
from eyas_device.updates.judge import prove
from eyas_device.updates.records import Lock, Refusal, read_agent, read_record, short_reason
from eyas_device.updates.slot_records import SlotRecords
from eyas_device.updates.space import shortage, stored_bytes

NAMES = ("a", "b")


class SlotError(EyasError, OSError):
    """A slot cannot be written, or there is no good one to switch to; the current slot is unchanged, or named."""


class SlotState(msgspec.Struct, frozen=True):
    """State of one slot."""

    slot: str
    """`a` or `b`."""
    path: str
    current: bool
    good: bool
    """Whether it passed the golden check at installation, has not changed since, and the agent did not refuse it."""
    name: str = ""
    """Name of the bundle in it."""
    version: str = ""
    manifest_sha256: str = ""
    identity: str = ""
    """sha256 of the manifest of the whole bundle, which a reduced one was made from; else its own."""
    problem: str = ""
    """Why it is not good."""
    running: bool = False
    """Whether the agent runs it now."""
    refused: str = ""
    """Why the agent, or an installation, refused this bundle or the last one that should have gone here."""
    attempts: int = 0
    """Attempts to run it that have not ended well (yet)."""
    probation: str = ""
    """Of a signed release: `running`, `passed` or `failed`; empty before it has begun, and for any other bundle."""


class Slots(SlotRecords):
    """The two slots below a device's state folder."""

    def current(self) -> Path | None:
        """The folder of the current bundle, verified (hashes and marker); None without a good slot.

        Falls back to the other slot if the link or the slot behind it is damaged. Raises `SlotError` if the
        folder cannot be read.
        """
        name = self._current()
        return None if name is None else self.folder / name

    def inactive(self) -> Path:
        """The folder that the next installation writes to: never the one that runs or would run.

        Raises `SlotError` if agents run both.
        """
        return self.folder / other_slot(self._kept())

    def candidates(self, key: str = "") -> list[str]:
        """The good slots in the order in which an agent tries them.

        The current one comes first, unless `MAX_ATTEMPTS` attempts to run it did not end well; if that is so of both,
        the one with fewer attempts: a device keeps trying. One that failed on probation comes last. `key` as for
        `attempts`.
        """
        current = self._current()
        names = [name for name in NAMES if not self.problem(name)]
        return sorted(names, key=lambda name: (self.has_failed(name), self.excess(name, key), name != current))

    def states(self) -> list[SlotState]:
        """State of both slots."""
        current, agent = self._current(), read_agent(self.state)
        running = agent.slot if agent is not None else ""
        return [self._state(name, current, running) for name in NAMES]

    def hold(self, name: str) -> Lock | None:
        """Keep installations out of a slot that is run; None where it is being written.

        Raises `OSError` if the folder takes no lock file.
        """
        return Lock.acquire(self._lock_of(name), shared=True)

    def install(
        self, source: Path, *, check: Callable[[Path], object] | None = None, release: bytes | None = None
    ) -> Path:
        """Copy a bundle into the inactive slot, check it there, and make it current.

        A bundle that is already current is only checked again. The slot that an agent runs becomes the current one
        before the other is written to. The reason of a failed check is kept: see `refusal` and `states`.

        Args:
            source: The bundle to install.
            check: Called with the copy, whose hashes are right; raises if its predictions are wrong. By default, the
                judgement of `eyas_device.updates.judge` with default settings.
            release: The signed release, as JSON, that the bundle belongs to; it is on the disk before the switch.

        Returns:
            The slot's folder.

        Raises:
            BundleError: The bundle is damaged or malformed. The current slot is unchanged, as after any other error.
            SlotError: The disk is full or cannot be written, or another installation is running.

        """
        check = check or (lambda root: prove(root, ModelSection(), self.state))
        files = list_files(source)
        Bundle.open(source)  # before the other slot, which one may want to switch back to, is cleared
        with self._writing():
            current = self._current()
            if current is not None and sha256(self.folder / current / MANIFEST) == sha256(source / MANIFEST):
                self._check(current, check)
                self._keep_release(current, release)
                self.end_attempt(current, healthy=True)
                self._switch(current)
                return self.folder / current
            kept = self._kept()
            name = other_slot(kept)
            with self._exclusive(name):
                if kept is not None and not self.problem(kept):
                    self._switch(kept)  # the link never names a slot that is being written
                self._write_slot(name, source, files, check, release)
            return self.folder / name

    def _write_slot(
        self,
        name: str,
        source: Path,
        files: dict[str, int],
        check: Callable[[Path], object],
        release: bytes | None,
    ) -> None:
        slot = self.folder / name
        if missing := shortage(self.folder, sum(files.values()), reclaimed=stored_bytes(slot)):
            raise SlotError(missing)
        self._clear(name)
        try:
            _copy_all(source, slot, files)
            Bundle.open(slot)
            self._check(name, check)
            self._keep_release(name, release)
            self._mark(name)
        except BaseException:
            with suppress(OSError):
                self._clear(name)
            raise
        self._switch(name)

    def _keep_release(self, name: str, release: bytes | None) -> None:
        if release is not None:
            _step(f"release {name}")
            atomic_write(self.folder / f"{name}.release", release)

    def _check(self, name: str, check: Callable[[Path], object]) -> None:
        """Check a slot's bundle; the reason of a refusal stays, also if the check ends this process."""
        self.refuse(name, "its check did not end: a crash, a kill or a power cut")
        try:
            check(self.folder / name)
        except Exception as error:
            self.refuse(name, short_reason(error))
            raise
        _remove(self.folder / f"{name}.refused")  # not `accept`: where it stays, the slot counts as refused

    def roll_back(self) -> Path:
        """Switch to the other slot and return its folder. Raises `SlotError` if it is not good, or was refused."""
        with self._writing():
            current = self._current()
            name = other_slot(current)
            problem = self.problem(name) or self.refusal(name)
            if current is None or problem:
                raise SlotError(f"{self.folder / name}: there is no good slot to switch back to ({problem})")
            self.end_attempt(name, healthy=True)
            self._switch(name)
            return self.folder / name

    def _kept(self) -> str | None:
        """The slot that an installation must not write to; None if nothing is worth keeping.

        It is the one that an agent runs, or else the one that an agent would run: the current slot, but rather the
        other one if the current was refused or still has to prove itself.
        """
        running = [name for name in NAMES if Lock.is_held(self._lock_of(name))]
        if len(running) == len(NAMES):
            raise SlotError(
                f"{self.folder}: both slots are in use, because a model is on probation or agents run both; wait until "
                "that has ended (`eyas-device status`), or stop the agent"
            )
        if running:
            return running[0]
        names = self.candidates()
        return min(
            names, key=lambda name: (bool(self.refusal(name)), self.is_unproven(name), names.index(name)), default=None
        )

    def _current(self) -> str | None:
        linked = self.linked()
        order = sorted(NAMES, key=lambda name: (name != linked, bool(self.refusal(name))))
        return next((name for name in order if not self.problem(name)), None)

    def linked(self) -> str | None:
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

    def problem(self, name: str) -> str:
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

    def _state(self, name: str, current: str | None, running: str) -> SlotState:
        slot = self.folder / name
        problem = self.problem(name)
        refused = read_record(self.folder / f"{name}.refused", Refusal)
        why = self._refusal_text(name, refused)
        verdict = self.verdict(name)
        manifest: Manifest | None = None
        with suppress(BundleError):
            manifest = read_manifest(slot)
        digest = "" if problem else sha256(slot / MANIFEST)
        return SlotState(
            slot=name,
            path=str(slot),
            current=name == current,
            good=not problem and not self.refusal(name),
            name=manifest.name if manifest else "",
            version=manifest.version if manifest else "",
            manifest_sha256=digest,
            identity=(manifest.origin if manifest and digest else "") or digest,
            problem=problem or (f"refused: {why}" if self.refusal(name) else ""),
            running=name == running,
            refused=why,
            attempts=self.attempts(name),
            probation=verdict.state if verdict is not None else "",
        )

    def _refusal_text(self, name: str, record: Refusal | None) -> str:
        if record is None:
            return ""
        other = not self.refusal(name) and (record.name or record.version)
        return f"{record.name} {record.version}: {record.reason}" if other else record.reason

    def _lock_of(self, name: str) -> Path:
        return self.folder / f".{name}.lock"

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """Keep agents out of a slot while it is written."""
        lock = Lock.acquire(self._lock_of(name))
        if lock is None:
            raise SlotError(f"{self.folder / name}: an agent runs it; wait until its reload has ended")
        with lock:
            yield

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

    def _clear(self, name: str) -> None:
        """Empty a slot. Its marker is removed first, durably, so that the rest never counts as a bundle."""
        slot = self.folder / name
        _step(f"unmark {name}")
        _remove(_marker(slot))
        for suffix in ("attempts", "release", "probation"):
            _remove(self.folder / f"{name}.{suffix}")
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
        """Point the link to the slot `name`, and wait until that is on the disk, whoever did it."""
        link, temporary = self.folder / "current", self.folder / ".current"
        if self.linked() != name:
            _remove(temporary)
            _step(f"link {name}")
            temporary.symlink_to(name)
            _sync(self.folder)
            if not link.is_symlink():
                _remove(link)  # a rename cannot replace a folder
            temporary.rename(link)
            _step(f"linked {name}")
        try:
            _sync(self.folder)
        except OSError as error:
            raise SlotError(
                f"{self.folder}: {error.strerror}; slot {name} is current now, and a power cut may undo that: "
                "check the disk and install again"
            ) from None


def other_slot(name: str | None) -> str:
    """The slot that `name` is not."""
    return "b" if name == "a" else "a"


def _marker(slot: Path) -> Path:
    return slot.with_name(f"{slot.name}.good")


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
        _write(target, read_chunks(source / path, size))
    for folder in reversed(folders):
        folder.chmod(0o755)  # whatever the umask: the service may be another user
        _sync(folder)
    _sync(slot.parent)


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
