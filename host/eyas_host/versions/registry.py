"""The registry: a folder that keeps versions, immutable, and the names that change hands.

    REGISTRY/MODEL/VERSION.json        the record; never written again
    REGISTRY/MODEL/VERSION.pruned      its files were removed to free space
    REGISTRY/objects/HA/HASH           the content of files, each once, whichever versions have it
    REGISTRY/aliases.json              model -> alias -> version
    REGISTRY/log.jsonl                 what was done, when and by whom; only ever appended to

A version counts from the moment its record has its name; a killed command leaves contents that nothing names, which
the next `prune` removes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from eyas_device.bundle import sha256
from eyas_host.pipeline.runner import BUNDLE
from eyas_host.recipe.run import NAME
from eyas_host.support.files import atomic_write, exclusive_lock, sync_files, write_bytes
from eyas_host.versions.record import SCHEMA, RegistryError, VersionRecord

CHAMPION, CHALLENGER = "champion", "challenger"
"""The version that serves, and the one that is tried beside it."""
ADDED = "added"
"""What the log says of a version that is new."""
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,30}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_ALIASES, _LOG, _OBJECTS, _LOCK = "aliases.json", "log.jsonl", "objects", ".lock"
_RECORD, _PRUNED = ".json", ".pruned"


def _is_name(text: str) -> bool:
    """Whether a model or a version may be called so: it is part of a path."""
    return re.fullmatch(NAME, text) is not None and text != _OBJECTS


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the log."""

    time: float
    by: str
    what: str
    """`added`, `alias`, `alias dropped`, `pruned`, `restored`, `retraining began` or `retraining kept out`."""
    model: str
    version: str = ""
    alias: str = ""
    before: str = ""
    """The version that had the alias."""
    note: str = ""


class Pruned(NamedTuple):
    """What `prune` removed, or would remove."""

    versions: tuple[str, ...]
    size_bytes: int


class Registry:
    """Versions of models in a folder.

    Args:
        folder: Where they lie; it is made by the first `add`.
        now: The time, seconds since 1970.
        by: Who acts, for the log.

    """

    def __init__(self, folder: Path, *, now: Callable[[], float], by: str) -> None:
        self.folder, self.by, self._now = folder, by, now

    # What there is

    def models(self) -> list[str]:
        """Names of all models."""
        places = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(place.name for place in places if place.is_dir() and _is_name(place.name))

    def versions(self, model: str = "") -> list[VersionRecord]:
        """All versions, or those of one model, in the order they were added."""
        found = [
            self._read(path)
            for name in ([model] if model else self.models())
            for path in sorted((self.folder / name).glob(f"*{_RECORD}"))
        ]
        return sorted(found, key=lambda record: (record.model, record.added))

    def find(self, name: str) -> VersionRecord:
        """The version that `MODEL@VERSION`, `MODEL@ALIAS`, `MODEL` (its champion, else its newest) or a digest names.

        Without `MODEL@`, a version or alias is that of the only model. Raises `RegistryError` if there is none.
        """
        model, _, which = name.rpartition("@") if "@" in name else ("", "", name)
        models = self.models()
        if not models:
            raise RegistryError(f"{self.folder}: no model is registered; eyas models add RUN registers one")
        if not model and which in models:
            model, which = which, ""
        if not model and _DIGEST.fullmatch(which):
            found = [one for one in self.versions() if one.digest.startswith(which)]
            if len(found) == 1:
                return found[0]
        if not model and len(models) > 1:
            raise RegistryError(f"{name}: of which model? {self._some(f'{one}@{which}' for one in models)}")
        model = model or models[0]
        if model not in models:
            raise RegistryError(f"{model}: no such model; there are: {self._some(models)}")
        aliases, versions = self.aliases().get(model, {}), self.versions(model)
        wanted = aliases.get(which or CHAMPION, which) or versions[-1].version
        for record in versions:
            if record.version == wanted:
                return record
        there = [*(record.version for record in versions), *aliases]
        raise RegistryError(f"{name}: {model} has no such version or alias; there are: {self._some(there)}")

    def aliases(self) -> dict[str, dict[str, str]]:
        """Model -> alias -> version."""
        path = self.folder / _ALIASES
        if not path.exists():
            return {}
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, str]])
        except (OSError, msgspec.MsgspecError) as error:
            raise RegistryError(f"{path}: damaged ({error}); {_LOG} beside it says what it held") from None

    def history(self) -> list[Event]:
        """The log, oldest first; a line that a power cut left half-written is left out."""
        path = self.folder / _LOG
        lines = path.read_bytes().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Event))
            except msgspec.MsgspecError:
                continue
        return found

    def children(self, record: VersionRecord) -> list[VersionRecord]:
        """Versions that follow this one."""
        return [one for one in self.versions(record.model) if one.parent == record.version]

    def is_pruned(self, record: VersionRecord) -> bool:
        """Whether its files were removed."""
        return self._place(record, _PRUNED).exists()

    # What is done

    def add(self, record: VersionRecord, run: Path) -> bool:
        """Keep a version with its files from the run's folder; False if it is here already.

        One whose files were removed gets them back. Raises `RegistryError` for another bundle of the same model and
        version, an unknown parent, or a file that has changed since the record was made.
        """
        if not (_is_name(record.model) and _is_name(record.version)):
            raise RegistryError(f"{record.name}: a name is of letters, digits, dots, hyphens and underscores")
        with self._changing():
            path = self._place(record, _RECORD)
            if path.exists():
                if self._read(path).digest != record.digest:
                    raise RegistryError(
                        f"{record.name} is registered, with another bundle; raise [pack] version in the recipe"
                    )
                if not self.is_pruned(record):
                    return False
                for name, file in self._read(path).files.items():
                    self._keep(run / name, file.sha256)
                self._place(record, _PRUNED).unlink()
                self._log("restored", record)
                return True
            if record.parent and not self._place(record, _RECORD, record.parent).exists():
                raise RegistryError(f"{record.model}@{record.parent}: the parent is not registered")
            for name, file in record.files.items():
                self._keep(run / name, file.sha256)
            write_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
            self._log(ADDED, record, note=record.note)
        return True

    def set_alias(self, alias: str, record: VersionRecord) -> str:
        """Give an alias to a version; returns the version that had it, or nothing."""
        if _ALIAS.fullmatch(alias) is None:
            raise RegistryError(f"{alias!r}: an alias is of small letters, digits and hyphens, e.g. {CHAMPION}")
        if self.is_pruned(record):
            raise RegistryError(f"{record.name}: its files were removed; it cannot serve any more")
        with self._changing():
            aliases = self.aliases()
            before = aliases.setdefault(record.model, {}).get(alias, "")
            if before != record.version:
                aliases[record.model][alias] = record.version
                self._write_aliases(aliases)
                self._log("alias", record, alias=alias, before=before)
        return before

    def drop_alias(self, alias: str, model: str) -> str:
        """Take an alias away; returns the version that had it. Raises `RegistryError` if none has."""
        with self._changing():
            aliases = self.aliases()
            before = aliases.get(model, {}).pop(alias, "")
            if not before:
                raise RegistryError(f"{model}@{alias}: no such alias; there are: {self._some(aliases.get(model, {}))}")
            self._write_aliases(aliases)
            event = Event(time=self._now(), by=self.by, what="alias dropped", model=model, alias=alias, before=before)
            self._append(event)
        return before

    def note(self, what: str, model: str, version: str, note: str) -> None:
        """Add a line to the log about a version that need not be registered."""
        with self._changing():
            self._append(Event(time=self._now(), by=self.by, what=what, model=model, version=version, note=note))

    def check_out(self, record: VersionRecord, folder: Path, *, only: str = "") -> None:
        """Write its files into a new folder, as in the run; each is verified.

        `only` is a folder of them (`bundle`), whose content is written alone.
        """
        if folder.exists():
            raise RegistryError(f"{folder}: is there already; name a folder that is not")
        self._require_files(record)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for name, file in record.files.items():
            if only and not name.startswith(f"{only}/"):
                continue
            target = part / name.removeprefix(f"{only}/" if only else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._object(file.sha256), target)
            if sha256(target) != file.sha256:
                shutil.rmtree(part)
                raise RegistryError(f"{record.name}: {name} is damaged in the registry; restore it from a copy")
        part.rename(folder)

    def bundle(self, record: VersionRecord, folder: Path) -> Path:
        """Write its bundle into a new folder."""
        self.check_out(record, folder, only=BUNDLE)
        return folder

    def open_file(self, record: VersionRecord, name: str) -> bytes | None:
        """The content of one of its files; None if it has none of that name."""
        file = record.files.get(name)
        if file is None:
            return None
        self._require_files(record)
        return self._object(file.sha256).read_bytes()

    def verify(self) -> list[str]:
        """What is damaged or missing, a sentence each; empty if all is well."""
        found, seen = [], {}
        for record in self.versions():
            if self.is_pruned(record):
                continue
            for name, file in record.files.items():
                if file.sha256 not in seen:
                    path = self._object(file.sha256)
                    seen[file.sha256] = (
                        "is missing" if not path.exists() else "" if sha256(path) == file.sha256 else "is damaged"
                    )
                if seen[file.sha256]:
                    found.append(f"{record.name}: {name} {seen[file.sha256]} ({self._object(file.sha256)})")
        for model, aliases in self.aliases().items():
            there = {record.version for record in self.versions(model)}
            found += [f"{model}@{alias}: {v} is not registered" for alias, v in aliases.items() if v not in there]
        return found

    def prune(self, keep: int, *, dry_run: bool = False) -> Pruned:
        """Remove the files of all but the newest `keep` versions of each model, and contents that nothing names.

        A version with an alias stays whole, and so does the parent of one: what was trained from it can be rebuilt.
        Records stay in any case.
        """
        with self._changing():
            aliases, removed = self.aliases(), []
            kept: set[str] = set()
            for model in self.models():
                versions = [record for record in self.versions(model) if not self.is_pruned(record)]
                held = set(aliases.get(model, {}).values())
                held |= {record.parent for record in versions if record.version in held}
                for record in versions:
                    if record in versions[-keep:] or record.version in held:
                        kept |= {file.sha256 for file in record.files.values()}
                    else:
                        removed.append(record)
            loose = [path for path in (self.folder / _OBJECTS).glob("*/*") if path.name not in kept]
            size = sum(path.stat().st_size for path in loose)
            if not dry_run:
                for record in removed:
                    write_bytes(self._place(record, _PRUNED), b"")
                    self._log("pruned", record)
                for path in loose:
                    path.unlink()
        return Pruned(tuple(record.name for record in removed), size)

    # How it lies there

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One command changes a registry at a time."""
        with exclusive_lock(self.folder / _LOCK):
            yield

    def _read(self, path: Path) -> VersionRecord:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=VersionRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise RegistryError(f"{path}: damaged ({error}); restore it from a copy") from None
        if record.schema > SCHEMA:
            raise RegistryError(f"{path}: written by a newer Eyas (schema {record.schema}); update this one")
        return record

    def _place(self, record: VersionRecord, ending: str, version: str = "") -> Path:
        return self.folder / record.model / f"{version or record.version}{ending}"

    def _object(self, digest: str) -> Path:
        return self.folder / _OBJECTS / digest[:2] / digest

    def _keep(self, source: Path, digest: str) -> None:
        """Store a file's content. Raises `RegistryError` if it is another one than the record says."""
        target = self._object(digest)
        if target.exists() and target.stat().st_size == source.stat().st_size:
            return
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
            if sha256(temporary) != digest:
                raise RegistryError(f"{source}: changed meanwhile; run the command again")
            temporary.chmod(0o444)

    def _require_files(self, record: VersionRecord) -> None:
        if self.is_pruned(record):
            raise RegistryError(f"{record.name}: its files were removed to free space; its record stays")
        missing = [name for name, file in record.files.items() if not self._object(file.sha256).exists()]
        if missing:
            raise RegistryError(f"{record.name}: {missing[0]} is missing in the registry; restore it from a copy")

    def _write_aliases(self, aliases: dict[str, dict[str, str]]) -> None:
        write_bytes(self.folder / _ALIASES, msgspec.json.format(msgspec.json.encode(aliases), indent=1) + b"\n")

    def _log(self, what: str, record: VersionRecord, *, alias: str = "", before: str = "", note: str = "") -> None:
        self._append(
            Event(
                time=self._now(),
                by=self.by,
                what=what,
                model=record.model,
                version=record.version,
                alias=alias,
                before=before,
                note=note,
            )
        )

    def _append(self, event: Event) -> None:
        path = self.folder / _LOG
        data = msgspec.json.encode(event) + b"\n"
        with path.open("ab+") as stream:
            if stream.tell() and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n":
                data = b"\n" + data  # after a line that a power cut left unfinished
            stream.write(data)
        sync_files([path], self.folder)

    @staticmethod
    def _some(names: Iterator[str] | Sequence[str] | dict[str, str]) -> str:
        found = list(names)
        return (", ".join(found[:8]) + (", …" if len(found) > 8 else "")) or "none"
