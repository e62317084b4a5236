"""The device's view of a signed repository: metadata by TUF's client workflow, and the documents that they vouch for.

Every look begins at the root that was pinned at enrolment (`/etc/eyas/root.json`); what is cached only saves bytes and
remembers what was seen, so that an older state is refused. Metadata are on the disk before anything acts on them.

>>> with TrustedRepository(config.update, site, Path("/var/lib/eyas")) as repository:
...     repository.refresh()
...     channel = repository.channel("solar-cells")
...     release, data = repository.release(channel.target)
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from eyas_device.config import UpdateSection
from eyas_device.support.clock import is_synchronised
from eyas_device.support.closing import Closing
from eyas_device.support.files import atomic_write
from eyas_device.updates.clock import CLOCK, Reading, TrustedClock, day
from eyas_device.updates.documents import Documents
from eyas_device.updates.explain import Download, explain
from eyas_device.updates.fetcher import Fetcher, Limits
from eyas_device.updates.records import Lock
from eyas_device.updates.refusals import (
    BusyError,
    EndlessDataError,
    MissingError,
    TamperedError,
)
from eyas_device.updates.release import (
    MAX_BYTES,
    POLICY,
    Channel,
    Document,
    Policy,
    Release,
    UpdateError,
    blob_path,
    channel_target,
    decode_document,
)
from eyas_device.updates.root import read_root

UPDATES = "updates"
"""Folder of everything about updates, below the device's state."""
METADATA, TARGETS = "metadata", "targets"
DOCUMENTS = "documents"
"""Targets that were fetched, beside the metadata on the device."""
ISSUED = "x-eyas-issued"
"""Field of `timestamp.json`: when it was signed, whole seconds since 1970."""
_MAX_FETCH_BYTES = 8 << 20
"""More than TUF's client allows for any metadata."""


class Refreshed(msgspec.Struct, frozen=True):
    """What a look at the repository found out about itself."""

    checked: float
    """When, seconds since 1970, by the trusted clock."""
    issued: float
    """When the repository was last signed, seconds since 1970; 0 if it does not say."""
    clock: str = ""
    """Why the system's clock is not trusted; empty if nothing speaks against it."""
    frozen: str = ""
    """That the repository was not renewed for long: it is neglected, or an old state is served. Empty if it was."""


class DurableUpdater(Updater):
    """TUF's client, whose metadata are synced to the disk and whose expiry follows a clock with a floor.

    Private parts of tuf 7.0 are used for that, which `tests/contract/test_trust.py` guards.
    """

    clock: TrustedClock | None = None
    reading: Reading | None = None
    """The time that expiry is judged against, once the newest root is known."""

    @property
    def signer(self) -> str:
        """The keys that sign `timestamp`, by the root that is trusted now."""
        return ",".join(sorted(self._trusted_set.root.roles["timestamp"].keyids))

    def _load_timestamp(self) -> None:
        if self.clock is not None:
            self.reading = self.clock.read(self.signer)
            self._trusted_set.reference_time = datetime.fromtimestamp(self.reading.now, timezone.utc)
        super()._load_timestamp()

    @property
    def issued(self) -> float:
        """When the loaded timestamp was signed, also of one that is refused as expired; 0 if unknown."""
        if "timestamp" not in self._trusted_set:
            return 0.0
        value = self._trusted_set.timestamp.unrecognized_fields.get(ISSUED, 0)
        return float(value) if isinstance(value, int) and 0 < value < 1 << 40 else 0.0

    @property
    def lifetime_s(self) -> float:
        """Time from the loaded timestamp's signing to its expiry."""
        return self._trusted_set.timestamp.expires.timestamp() - self.issued

    @property
    def root_version(self) -> int:
        """Version of the root that is trusted now."""
        return self._trusted_set.root.version

    def role_keys(self, role: str) -> tuple[frozenset[str], int]:
        """Ids of the keys that sign for a role, and how many of them have to; none for an unknown role."""
        for name in ("root", "targets"):
            signed = self._trusted_set.get(name)
            try:
                found = signed.get_delegated_role(role) if signed is not None else None
            except ValueError:
                continue
            if found is not None:
                return frozenset(found.keyids), found.threshold
        return frozenset(), 0

    def expected_version(self, role: str) -> int:
        """The version of a role's metadata that those above it name; 0 if they do not."""
        if role == "snapshot" and "timestamp" in self._trusted_set:
            return self._trusted_set.timestamp.snapshot_meta.version
        meta = self._trusted_set.snapshot.meta.get(f"{role}.json") if "snapshot" in self._trusted_set else None
        return meta.version if meta else 0

    def file_of(self, info: TargetFile) -> str:
        """Where a target's content is, below the folder of targets."""
        if not self._trusted_set.root.consistent_snapshot:
            return info.path
        folder, slash, name = info.path.rpartition("/")
        return f"{folder}{slash}{next(iter(info.hashes.values()))}.{name}"

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if not (path.is_file() and path.read_bytes() == data):
            atomic_write(path, data)

    def _update_root_symlink(self) -> None:
        link = Path(self._dir, "root.json")
        current = f"root_history/{self._trusted_set.root.version}.root.json"
        if not (link.is_symlink() and str(link.readlink()) == current):
            super()._update_root_symlink()


class MetadataFetcher(FetcherInterface):
    """TUF's way to a `Fetcher`; remembers the last file, so that a refusal can be explained."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.last = Download()

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.last = download = Download(url)
        try:
            for chunk in self._fetcher.open(url, max_bytes=_MAX_FETCH_BYTES):
                download.data += chunk
                yield chunk
        except MissingError as error:
            raise DownloadHTTPError(str(error), 404) from None


class TrustedRepository(Closing):
    """A repository as this device may see it.

    Args:
        update: The section [update] of the configuration.
        site: Site of the device.
        state: Folder of the device's state.
        limits: How long the repository may take.
        clock: The time; by default the system's, with a floor that is kept below `state`.
        fetcher: Reads the repository; by default from `update.url`, within `limits`.

    Raises:
        RootError: No root is pinned, or it cannot be read.
        BusyError: Another process uses the metadata.
        UpdateError: The address is unusable, or the metadata cannot be kept.

    """

    def __init__(
        self,
        update: UpdateSection,
        site: str,
        state: Path,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        clock: TrustedClock | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._channel, self._site = update.channel, site
        self.fetcher = fetcher or Fetcher(update.url, limits=limits)
        self._root = read_root(Path(update.root))
        folder = state / UPDATES
        self._folder = folder / METADATA
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = Lock.acquire(folder / ".metadata.lock")
        except OSError as error:
            raise UpdateError(f"{folder}: cannot be used ({error.strerror})") from None
        if lock is None:
            raise BusyError(f"{folder}: another process looks for updates now")
        self._lock = lock
        self._clock = clock or TrustedClock(folder / CLOCK)
        self._documents = Documents(folder / DOCUMENTS)
        self._metadata = MetadataFetcher(self.fetcher)
        self._updater: DurableUpdater | None = None

    def refresh(self) -> Refreshed:
        """Bring the metadata up to date.

        Raises `UpdateError`: what was there stays, and `channel`, `release` and `policy` cannot be asked.
        """
        self._updater = None
        updater: DurableUpdater | None = None
        try:
            updater = DurableUpdater(
                str(self._folder),
                METADATA,
                fetcher=self._metadata,
                config=UpdaterConfig(prefix_targets_with_hash=True),
                bootstrap=self._root,
            )
            updater.clock = self._clock
            updater.refresh()
            reading = updater.reading or self._clock.read()
            # a clock that the network sets needs no signed time, and takes none that is ahead of it
            self._clock.advance(reading.now if is_synchronised() else max(updater.issued, reading.now), updater.signer)
        except (RepositoryError, DownloadError, OSError) as error:
            raise self._explained(error, updater) from None
        finally:
            self.fetcher.close()
        self._updater = updater
        return Refreshed(reading.now, updater.issued, reading.doubt, _frozen(updater, reading.now))

    def channel(self, model: str) -> Channel | None:
        """What the device's channel wants of a model: its site's own word, else that for all; None without either."""
        names = [channel_target(self._channel, model)]
        if self._site:
            names.insert(0, channel_target(self._channel, model, self._site))
        for name in names:
            if (info := self._info(name)) is not None:
                return decode_document(self._target(info), Channel, name)
        return None

    def release(self, target: str) -> tuple[Release, bytes]:
        """A release and the signed bytes that it was read from. Raises `MissingError` for one that is not listed."""
        return self.document(target, Release)

    def document(self, name: str, kind: type[Document]) -> tuple[Document, bytes]:
        """A target's content and its bytes. Raises `MissingError` for one that is not listed."""
        info = self._info(name)
        if info is None:
            raise MissingError(f"{name}: the repository lists no such target; it was withdrawn, or never published")
        data = self._target(info)
        return decode_document(data, kind, name), data

    def policy(self) -> Policy:
        """What no device runs or installs; an empty one where the repository has none."""
        info = self._info(POLICY)
        return Policy() if info is None else decode_document(self._target(info), Policy, POLICY)

    def blob_url(self, sha256: str) -> str:
        """Path of a blob in the repository, for `fetcher`."""
        return blob_path(sha256)

    def close(self) -> None:
        """Let other processes use the metadata."""
        self.fetcher.close()
        self._lock.close()

    def _info(self, name: str) -> TargetFile | None:
        """What signed metadata say of a target; None if it is not listed."""
        updater = self._updater
        if updater is None:
            raise UpdateError("the repository was not looked at: call `refresh` first")
        try:
            return updater.get_targetinfo(name)
        except (RepositoryError, DownloadError, OSError) as error:
            raise self._explained(error, updater) from None

    def _explained(self, error: Exception, updater: DurableUpdater | None) -> UpdateError:
        reading = updater.reading if updater is not None else None
        return explain(error, updater, self._metadata.last, reading or self._clock.read())

    def _target(self, info: TargetFile) -> bytes:
        assert self._updater is not None
        if (kept := self._documents.get(info)) is not None:
            return kept
        try:
            data = fetch_target(self.fetcher, f"{TARGETS}/{self._updater.file_of(info)}", info, MAX_BYTES)
        finally:
            self.fetcher.close()
        self._documents.put(info, data)
        return data


def fetch_target(fetcher: Fetcher, path: str, info: TargetFile, max_bytes: int) -> bytes:
    """A target's content, which has the signed length and hashes.

    Raises `EndlessDataError` for one that is, or is signed for, too large, and `TamperedError` for another content.
    """
    if info.length > max_bytes:
        raise EndlessDataError(f"{info.path}: {info.length} bytes are signed for; {max_bytes} are allowed")
    data = b"".join(fetcher.open(path, max_bytes=info.length))
    try:
        info.verify_length_and_hashes(data)
    except RepositoryError:
        raise TamperedError(f"{path}: not what was signed: damaged or altered; publish it again") from None
    return data


def _frozen(updater: DurableUpdater, now: float) -> str:
    """A sentence if the repository was signed so long ago that it should have been renewed; empty otherwise."""
    if not updater.issued or now - updater.issued <= updater.lifetime_s / 2:
        return ""
    return (
        f"nothing new was signed since {day(updater.issued)}, {(now - updater.issued) / 86400:.0f} days ago: either "
        "nobody runs `eyas repo renew`, or an old state is served"
    )
