"""What is remembered of each slot beside its bundle: attempts to run it, refusals, its release and its probation."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, read_manifest, sha256
from eyas_device.errors import BundleError
from eyas_device.support.clock import boot_id
from eyas_device.updates.records import MAX_ATTEMPTS, Attempts, Refusal, Verdict, read_record, write_record
from eyas_device.updates.release import MAX_BYTES


class SlotRecords:
    """The records of both slots; see `eyas_device.updates.records` for their files."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.folder = state / "slots"

    def attempts(self, name: str, key: str = "") -> int:
        """Attempts to run a slot that did not end well; with `key`, only those under that key."""
        return self._attempts(name, key).count

    def excess(self, name: str, key: str = "") -> int:
        """How many attempts a slot has beyond those that count for nothing."""
        return max(0, self.attempts(name, key) - MAX_ATTEMPTS + 1)

    def count_attempt(self, name: str, key: str) -> None:
        """Count an attempt to run a slot, durably and before its model is loaded. A disk that fails is ignored.

        An attempt that ended with the board does not count against a model that has been healthy, in that attempt or
        in an earlier one: the power was cut. It does against one that never was: a model may also bring a board down.
        """
        record, boot = self._attempts(name, key), boot_id()
        before = record.settled or (record.boot if record.proven else "")
        if record.count and before and before != boot:
            record = msgspec.structs.replace(record, count=record.count - 1, runtime="")
        ended = record.ended
        if record.runtime:  # the attempt before did not live to say how it ended
            ended = ended | {record.runtime: ended.get(record.runtime, 0) + 1}
        counted = Attempts(key=key, count=record.count + 1, ended=ended, boot=boot, proven=record.proven)
        write_record(self.folder / f"{name}.attempts", counted)

    def settle_attempt(self, name: str) -> None:
        """Note that the last attempt has run for a while: the end of the board does not count against it any more."""
        record = read_record(self.folder / f"{name}.attempts", Attempts)
        if record is not None:
            write_record(self.folder / f"{name}.attempts", msgspec.structs.replace(record, settled=boot_id()))

    def note_runtime(self, name: str, key: str, runtime: str) -> None:
        """Note the runtime that a counted attempt loads now; empty if none of them could be blamed."""
        record = self._attempts(name, key)
        write_record(self.folder / f"{name}.attempts", msgspec.structs.replace(record, runtime=runtime))

    def deadly_runtimes(self, name: str, key: str) -> set[str]:
        """Runtimes that ended the process `MAX_ATTEMPTS` times when they ran this slot's bundle."""
        return {runtime for runtime, count in self._attempts(name, key).ended.items() if count >= MAX_ATTEMPTS}

    def end_attempt(self, name: str, *, healthy: bool, proven: bool = False) -> None:
        """Forget all attempts of a `healthy` slot; else only the last, of an agent that was stopped on purpose.

        `proven`: the model of the healthy slot has predicted; that is remembered.
        """
        path = self.folder / f"{name}.attempts"
        record = read_record(path, Attempts)
        if record is None:
            return
        if healthy or record.count <= 1:
            record = Attempts(key=record.key, boot=record.boot, proven=record.proven or proven)
        else:
            record = msgspec.structs.replace(record, count=record.count - 1, runtime="")
        if record.proven or record.count:
            write_record(path, record)
            return
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def refuse(self, name: str, reason: str) -> None:
        """Remember why the bundle in a slot is refused. A disk that fails is ignored."""
        write_record(self.folder / f"{name}.refused", _refusal(self.folder / name, reason))

    def accept(self, name: str) -> None:
        """Forget why a slot was refused."""
        with suppress(OSError):
            (self.folder / f"{name}.refused").unlink(missing_ok=True)

    def refusal(self, name: str) -> str:
        """Why the bundle that is in a slot now is refused; empty if it is not."""
        record = read_record(self.folder / f"{name}.refused", Refusal)
        return record.reason if record is not None and self._is_about(name, record.manifest_sha256) else ""

    def verdict(self, name: str) -> Verdict | None:
        """How the bundle that is in a slot now does on probation; None if that has not begun."""
        verdict = read_record(self.folder / f"{name}.probation", Verdict)
        return verdict if verdict is not None and self._is_about(name, verdict.manifest_sha256) else None

    def has_failed(self, name: str) -> bool:
        """Whether the bundle in a slot failed on probation."""
        verdict = self.verdict(name)
        return verdict is not None and verdict.state == "failed"

    def is_unproven(self, name: str) -> bool:
        """Whether a slot holds a signed release that has not passed its probation."""
        verdict = self.verdict(name)
        return self.release(name) is not None and (verdict is None or verdict.state != "passed")

    def release(self, name: str) -> bytes | None:
        """The signed release, as JSON, that a slot was installed from; None for a bundle that came without one."""
        path = self.folder / f"{name}.release"
        try:
            if not path.is_file():  # a pipe would block
                return None
            with path.open("rb") as stream:
                return stream.read(MAX_BYTES + 1)
        except OSError:
            return None

    def _is_about(self, name: str, manifest_sha256: str) -> bool:
        """Whether a record of this manifest is about the bundle that is in a slot now."""
        try:
            return manifest_sha256 == sha256(self.folder / name / MANIFEST)
        except OSError:
            return False

    def _attempts(self, name: str, key: str) -> Attempts:
        record = read_record(self.folder / f"{name}.attempts", Attempts)
        return record if record is not None and key in ("", record.key) else Attempts(key=key)


def _refusal(slot: Path, reason: str) -> Refusal:
    """A refusal of the bundle in `slot`."""
    name = version = digest = ""
    with suppress(BundleError, OSError):
        digest = sha256(slot / MANIFEST)
        manifest = read_manifest(slot)
        name, version = manifest.name, manifest.version
    return Refusal(name=name, version=version, manifest_sha256=digest, reason=reason, time=time.time())
