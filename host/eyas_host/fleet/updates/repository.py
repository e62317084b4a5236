"""The signed repository of a kit: releases, channels and policy are published in it, withdrawn and renewed.

KIT/repository/     what is served, or copied to a stick: metadata/, targets/, blobs/
KIT/keys/           never served
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from tuf.api.metadata import TargetFile

from eyas_device.bundle import Bundle
from eyas_device.errors import EyasError
from eyas_device.support.versions import version_numbers
from eyas_device.updates.release import (
    POLICY,
    Bounds,
    Channel,
    Document,
    Policy,
    Release,
    blob_path,
    channel_target,
    decode_document,
    release_target,
    site_role,
)
from eyas_device.updates.trust import TARGETS as TARGETS_FOLDER
from eyas_host.fleet.broker.pki import CredentialError, exists, read_file
from eyas_host.fleet.updates.keys import Ask, KeyStore
from eyas_host.fleet.updates.metadata import (
    ONLINE_DAYS,
    ROOT,
    SNAPSHOT,
    TARGETS,
    RepositoryMetadata,
    newest_root,
)
from eyas_host.fleet.updates.variants import Content, PublishError, bundle_content
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write, exclusive_lock, write_bytes

REPOSITORY, KEYS = "repository", "keys"
"""Folders of a kit."""
CHANNEL_PATHS = ["channels/*/*.json"]
_WARN_DAYS = 60.0
"""Roles whose keys are kept away are reported so long before they expire."""


class Listed(msgspec.Struct, frozen=True):
    """A release and the path of its target."""

    target: str
    release: Release


class Repository:
    """The repository of a kit.

    Args:
        kit: Folder of the kit.
        ask: Asks for the passphrase of an encrypted key.
        key_folders: Other folders in which private keys are looked for, e.g. a stick.
        now: The time, seconds since 1970.

    Raises:
        DamagedRepository: There is none yet; `ceremony.create` makes one.

    """

    def __init__(
        self,
        kit: Path,
        *,
        ask: Ask | None = None,
        key_folders: Sequence[Path] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self.kit, self.folder = kit, kit / REPOSITORY
        self.keys = KeyStore(kit / KEYS, ask=ask, folders=key_folders)
        self.now = now
        newest_root(self.folder)

    # Reading

    def root(self) -> bytes:
        """The newest root, which devices pin."""
        return read_file(self.folder / "metadata" / f"{newest_root(self.folder)}.root.json")

    def metadata(self) -> RepositoryMetadata:
        """The current metadata."""
        return RepositoryMetadata.load(self.folder, self.keys)

    def channel(self, name: str, model: str, site: str = "") -> Channel | None:
        """What a channel wants of a model; None if nothing was ever published there."""
        return self.document(self.metadata(), _path(channel_target, name, model, site), Channel)

    def channels(self) -> dict[str, Channel]:
        """Target -> channel, of all sites."""
        metadata = self.metadata()
        names = [name for name in _target_names(metadata) if "channels" in name.split("/")]
        return {name: one for name in names if (one := self.document(metadata, name, Channel)) is not None}

    def releases(self, model: str = "", site: str | None = None) -> list[Release]:
        """The releases of a model, oldest first; by default of all models and sites (`site` "": those for all)."""
        return [one.release for one in self.listed(model, site)]

    def listed(self, model: str = "", site: str | None = None) -> list[Listed]:
        """As `releases`, with their targets."""
        metadata = self.metadata()
        names = [name for name in _target_names(metadata) if name.endswith("/release.json")]
        found = [Listed(name, one) for name in names if (one := self.document(metadata, name, Release)) is not None]
        return sorted(
            (
                one
                for one in found
                if (not model or one.release.model == model) and (site is None or one.release.site == site)
            ),
            key=lambda one: (one.release.model, version_numbers(one.release.version), one.release.site),
        )

    def policy(self) -> Policy:
        """What no device runs or installs."""
        return self.document(self.metadata(), POLICY, Policy) or Policy()

    def document(self, metadata: RepositoryMetadata, name: str, kind: type[Document]) -> Document | None:
        """A target's content; None if it is not listed."""
        role = metadata.roles.get(metadata.role_of(name))
        info = role.signed.targets.get(name) if role is not None else None
        return None if info is None else decode_document(read_file(self._target_file(info)), kind, name)

    # Publishing

    def publish(
        self,
        bundle: Path,
        *,
        channel: str = "",
        site: str = "",
        targets: Sequence[str] = (),
        boards: Sequence[str] = (),
        probation: Bounds = Bounds(),  # noqa: B008 - frozen
        note: str = "",
    ) -> Release:
        """Publish a bundle; the same one again only sets the channel.

        Args:
            bundle: The bundle.
            channel: Channel whose devices shall all take it now; empty: only publish, for a rollout.
            site: The only site that it is for; empty: all.
            targets: Kinds of devices that it is reduced for; none: one variant a runtime, and the whole bundle.
            boards: Kinds of boards that may install it; none: all.
            probation: What it must keep to on real frames.
            note: What changed, for people.

        Raises:
            PublishError: Another bundle has this version, it was revoked, or the channel has a newer one.
            SigningError: A key is missing; nothing was published.

        """
        opened = Bundle.open(bundle)
        opened.golden()
        manifest = opened.manifest
        target = _path(release_target, manifest.name, manifest.version, site)
        with tempfile.TemporaryDirectory(prefix="eyas-publish-") as scratch, self.changing() as metadata:
            release = Release(
                model=manifest.name,
                version=manifest.version,
                site=site,
                identity=opened.identity,
                boards=tuple(boards),
                min_agent=manifest.min_agent_version,
                issued=float(int(self.now())),
                probation=probation,
                note=note,
            )
            before = self.document(metadata, target, Release)
            if before is None:
                content = bundle_content(opened, targets, Path(scratch))
                release = msgspec.structs.replace(release, variants=content.variants)
                changed = self._add_release(metadata, target, release, content)
            elif before.identity != release.identity:
                raise PublishError(
                    f"{manifest.name} {manifest.version} is published with other content; pack the bundle with a "
                    "higher version"
                )
            else:
                release, changed = before, set()
            if channel:
                changed |= self._point_channel(metadata, channel, target, release)
            if changed:
                metadata.commit(changed, self.now())
        return release

    def publish_files(self, target: str, release: Release, content: Content) -> Release:
        """Publish a release that is not a bundle, e.g. the agent's wheels, under a target of the role `targets`."""
        with self.changing() as metadata:
            changed = self._add_release(metadata, target, release, content)
            metadata.commit(changed, self.now())
        return release

    def set_channel(self, name: str, channel: Channel, site: str = "") -> None:
        """Publish what a channel wants. Raises `PublishError` for a release that is not published."""
        with self.changing() as metadata:
            for target in filter(None, (channel.target, channel.previous)):
                if self.document(metadata, target, Release) is None:
                    raise PublishError(f"{target}: not published; `eyas publish BUNDLE` comes first")
            metadata.commit(self._put_channel(metadata, name, channel, site), self.now())

    def set_policy(self, policy: Policy) -> None:
        """Publish what no device runs or installs."""
        with self.changing() as metadata:
            metadata.commit(self._put(metadata, POLICY, policy), self.now())

    def revoke(self, version: str, *, model: str = "", reason: str = "", site: str | None = None) -> list[Release]:
        """Withdraw a release: no device installs it, and one that runs it goes back to its other slot.

        Channels that want it go back to the release before it, if that is still there.

        Args:
            version: Its version.
            model: Its model; needed only where several models have this version.
            reason: Why, for people; devices report it.
            site: Only the release of this site; empty: that for all sites; None: wherever it is.

        Returns:
            The releases that were withdrawn.

        Raises:
            PublishError: There is no such release, or several models have one.
            SigningError: A key is missing; nothing was withdrawn.

        """
        with self.changing() as metadata:
            found = self._of_version(version, model, site)
            policy = self.document(metadata, POLICY, Policy) or Policy()
            revoked = policy.revoked | {one.release.identity: reason or "revoked" for one in found}
            changed = self._put(metadata, POLICY, msgspec.structs.replace(policy, revoked=revoked))
            gone = {one.target for one in found}
            for target in gone:
                role = metadata.role_of(target)
                del metadata.roles[role].signed.targets[target]
                changed.add(role)
            for name, channel in self.channels().items():
                if channel.target in gone or channel.previous in gone:
                    changed |= self._put(metadata, name, _without(channel, gone, float(int(self.now()))))
            metadata.commit(changed, self.now())
        return [one.release for one in found]

    def refuse_older(self, version: str, *, model: str = "") -> str:
        """Let no device install a release that is older than `version`; one that runs stays until it is replaced.

        Args:
            version: The oldest version that may be installed: that of a published release.
            model: Its model; needed only where several models have this version.

        Returns:
            The model's name.

        Raises:
            PublishError: There is no such release, several models have one, or a channel still wants an older one.
            SigningError: A key is missing; nothing was changed.

        """
        with self.changing() as metadata:
            name = self._of_version(version, model, None)[0].release.model
            older = {one.target: one.release.version for one in self.listed(name) if _precedes(one.release, version)}
            channels = self.channels()
            for path, channel in channels.items():
                goes_back = channel.rolled_back or _is_rolling(channel)
                wanted = older.get(channel.target) or (older.get(channel.previous) if goes_back else None)
                if wanted:
                    raise PublishError(
                        f"{path}: devices of it may still take {wanted}; bring them all to {version} first"
                    )
            policy = self.document(metadata, POLICY, Policy) or Policy()
            oldest = policy.min_versions | {name: version}
            changed = self._put(metadata, POLICY, msgspec.structs.replace(policy, min_versions=oldest))
            for path, channel in channels.items():
                if channel.previous in older:
                    changed |= self._put(metadata, path, msgspec.structs.replace(channel, previous=""))
            metadata.commit(changed, self.now())
        return name

    def renew(self, *, everything: bool = False) -> list[str]:
        """Sign timestamp again, and what has less than half of its life left and a key here.

        Args:
            everything: Also sign what is not due, and `targets`.

        Returns:
            What has to be renewed with a key that is not here.

        Raises:
            SigningError: The key of timestamp or snapshot is missing.

        """
        with self.changing() as metadata:
            changed, warnings = set(), []
            for role in (*metadata.roles, SNAPSHOT):
                due = metadata.days_left(role, self.now()) < (_WARN_DAYS if role == TARGETS else ONLINE_DAYS / 2)
                if not (due or everything or not metadata.is_signed(role)):
                    continue
                if missing := metadata.missing_keys(role):
                    warnings.append(f"{_expires(metadata, role, self.now())}: needs {', '.join(missing)}")
                elif role != TARGETS or everything:
                    changed.add(role)
                else:
                    warnings.append(f"{_expires(metadata, role, self.now())}: `eyas repo renew --all` renews it")
            metadata.commit(changed, self.now())
            if metadata.days_left(ROOT, self.now()) < _WARN_DAYS:
                warnings.append(f"{_expires(metadata, ROOT, self.now())}: `eyas keys rotate root` renews it")
        return warnings

    @contextmanager
    def changing(self) -> Iterator[RepositoryMetadata]:
        """The current metadata, while no other process changes them."""
        with self._locked():
            yield self.metadata()

    def begin(self, metadata: RepositoryMetadata) -> None:
        """Write the first state of a new repository, with a policy that forbids nothing."""
        with self._locked():
            metadata.commit({*metadata.roles, *self._put(metadata, POLICY, Policy())}, self.now())

    # Parts

    def _of_version(self, version: str, model: str, site: str | None) -> list[Listed]:
        """The releases of a version, all of one model. Raises `PublishError` where there are none, or of several."""
        found = [one for one in self.listed(model, site) if one.release.version == version]
        if not found:
            known = ", ".join(sorted({f"{one.release.model} {one.release.version}" for one in self.listed()}))
            raise PublishError(f"{version}: no such release; published are: {known or 'none'}")
        if len({one.release.model for one in found}) > 1:
            raise PublishError(f"{version}: of which model? {', '.join(sorted({o.release.model for o in found}))}")
        return found

    def _add_release(self, metadata: RepositoryMetadata, target: str, release: Release, content: Content) -> set[str]:
        policy = self.document(metadata, POLICY, Policy) or Policy()
        if (why := policy.revoked.get(release.identity)) is not None:
            raise PublishError(f"{release.model} {release.version} was revoked ({why}); train and pack another bundle")
        oldest = policy.min_versions.get(release.model, "")
        if oldest and _precedes(release, oldest):
            raise PublishError(
                f"{release.model} {release.version} is older than {oldest}, the oldest version that may be installed"
            )
        changed = self._make_site(metadata, release.site) if release.site else set()
        for digest, path in content.blobs.items():
            self._store_blob(digest, path)
        return changed | self._put(metadata, target, release)

    def _make_site(self, metadata: RepositoryMetadata, site: str) -> set[str]:
        """Delegate a site's targets to a role of its own, which ends the search for them."""
        role = site_role(site)
        if role in metadata.roles:
            return set()
        key = self.keys.create(role, self.now(), encrypted=False)
        paths = [f"sites/{site}/releases/*/*/release.json", f"sites/{site}/channels/*/*.json"]
        metadata.add_role(role, key, paths, terminating=True)
        return {TARGETS, role}

    def _point_channel(self, metadata: RepositoryMetadata, name: str, target: str, release: Release) -> set[str]:
        """Let all devices of a channel take a release."""
        before = self.document(metadata, _path(channel_target, name, release.model, release.site), Channel)
        if before is not None and before.target == target and not before.rollout and not before.rolled_back:
            return set()
        if before is not None and _is_rolling(before):
            raise PublishError(f"channel {name}: rollout {before.rollout} is under way; end it first, or use another")
        wanted = before.target if before is not None else ""
        current = self.document(metadata, wanted, Release) if wanted else None
        if current is not None and version_numbers(current.version) > version_numbers(release.version):
            raise PublishError(
                f"channel {name} wants {current.version}, which is newer than {release.version}: devices do not go "
                f"back by themselves; `eyas revoke {current.version}` takes that back"
            )
        channel = Channel(model=release.model, target=target, previous=wanted if wanted != target else "")
        return self._put_channel(metadata, name, channel, release.site)

    def _put_channel(self, metadata: RepositoryMetadata, name: str, channel: Channel, site: str) -> set[str]:
        changed = self._make_site(metadata, site) if site else set()
        channel = msgspec.structs.replace(channel, issued=float(int(self.now())))
        return changed | self._put(metadata, _path(channel_target, name, channel.model, site), channel)

    def _put(self, metadata: RepositoryMetadata, name: str, document: Release | Channel | Policy) -> set[str]:
        """Write a target's content and list it; returns the role that has to sign."""
        data = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        info = TargetFile.from_data(name, data, ["sha256"])
        path = self._target_file(info)
        if not (exists(path) and read_file(path) == data):
            _guarded(lambda: write_bytes(path, data))
        role = metadata.role_of(name)
        if role not in metadata.roles:
            raise PublishError(f"{name}: no such site; `eyas publish --site` creates it")
        metadata.roles[role].signed.targets[name] = info
        return {role}

    def _target_file(self, info: TargetFile) -> Path:
        folder, _, name = info.path.rpartition("/")
        return self.folder / TARGETS_FOLDER / folder / f"{info.hashes['sha256']}.{name}"

    def _store_blob(self, digest: str, source: Path) -> None:
        path = self.folder / blob_path(digest)
        if exists(path) and path.stat().st_size == source.stat().st_size and file_digest(path) == digest:
            return

        def store() -> None:
            with atomic_write(path) as temporary:
                shutil.copyfile(source, temporary)
                if file_digest(temporary) != digest:
                    raise PublishError(f"{source}: changed while it was published; publish it again")

        _guarded(store)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with exclusive_lock(self.kit / KEYS / ".lock"):
                yield
        except EyasError:
            raise
        except OSError as error:
            raise CredentialError(f"{self.kit / KEYS}: {error.strerror}") from None


def _path(join: Callable[[str, str, str], str], first: str, second: str, site: str = "") -> str:
    """Path of a target. Raises `PublishError` for names that cannot be part of it."""
    try:
        return join(first, second, site)
    except ValueError as error:
        raise PublishError(str(error)) from None


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _target_names(metadata: RepositoryMetadata) -> Iterable[str]:
    return [name for role in metadata.roles.values() for name in role.signed.targets]


def _precedes(release: Release, version: str) -> bool:
    return version_numbers(release.version) < version_numbers(version)


def _is_rolling(channel: Channel) -> bool:
    """Whether a rollout is under way in a channel."""
    return bool(channel.rollout) and any(share < 1 for share in channel.shares.values())


def _without(channel: Channel, gone: set[str], now: float) -> Channel:
    """A channel that no longer wants withdrawn releases: it goes back to the one before, or wants none."""
    previous = "" if channel.previous in gone else channel.previous
    if channel.target in gone:
        return Channel(
            model=channel.model, previous=previous, rolled_back=bool(previous), hours=channel.hours, issued=now
        )
    return msgspec.structs.replace(channel, previous=previous, issued=now)


def _expires(metadata: RepositoryMetadata, role: str, now: float) -> str:
    days = metadata.days_left(role, now)
    return f"{role} expires in {days:.0f} days" if days > 0 else f"{role} has expired"


_Result = TypeVar("_Result")


def _guarded(write: Callable[[], _Result]) -> _Result:
    """Call `write`; a disk that does not take it is a user's matter."""
    try:
        return write()
    except (StageError, OSError) as error:
        if isinstance(error, EyasError) and not isinstance(error, StageError):
            raise
        raise CredentialError(str(error)) from None
