"""What a signed repository says of a release, and where: the contract between `eyas publish` and the devices.

A repository is a folder that any static server, or a USB stick, can hold. Roles and metadata are those of TUF (The
Update Framework, theupdateframework.github.io), whose targets are small JSON files; a release's own files are blobs,
named by their hash, so that a device fetches only those that it does not have.

    metadata/   N.root.json, N.targets.json, N.ROLE.json, N.snapshot.json, timestamp.json
    targets/    HASH.release.json and so on: the targets below, under the folders of their names
    blobs/      SHA256[:2]/SHA256

    target                                                signed by
    releases/MODEL/VERSION/release.json                   targets (may be kept off-line)
    agent/VERSION/release.json                            targets
    policy.json                                           targets
    channels/CHANNEL/MODEL.json                           role `channels` (on-line): may point to signed releases only
    sites/SITE/releases/MODEL/VERSION/release.json        role `site-SITE`, which ends the search for its paths
    sites/SITE/channels/CHANNEL/MODEL.json                role `site-SITE`

Every field has a default and unknown fields are ignored, so that an older agent reads a newer repository. A change of
a field's type or meaning needs another `SCHEMA`, which an older agent refuses by name.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, TypeVar

import msgspec

from eyas_device.errors import EyasError
from eyas_device.support.names import check_name

SCHEMA = 1
MAX_BYTES = 1 << 20
"""Maximum size of one of these documents."""
MAX_BLOB_BYTES = 2 << 30
"""Maximum size of a blob, and of all blobs of a release."""
MAX_FILES = 256
"""Maximum number of files of a release's variant."""
POLICY = "policy.json"
CHANNELS_ROLE = "channels"
ALL_GROUPS = "*"
"""In `Channel.shares`: every group that is not named."""

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class UpdateError(EyasError, OSError):
    """An update was refused, or could not be carried out; the model that runs is unchanged."""


class ReleaseFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a variant; its content is the blob `sha256`."""

    path: str
    """Relative to the bundle (or, for an agent, a wheel's name), forward slashes."""
    sha256: Digest
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle as one kind of device gets it: whole, or reduced to what its runtimes load."""

    runtimes: tuple[str, ...] = ()
    """Runtimes that it has an artefact for, e.g. `litert`; empty in an agent's release."""
    manifest_sha256: str = ""
    """sha256 of this variant's manifest; empty in an agent's release."""
    files: tuple[ReleaseFile, ...] = ()
    platform: str = ""
    """Agent's release: `PYTHON-MACHINE`, e.g. `cp311-aarch64`, that the wheels are for; empty for a bundle."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a new model must keep to on real frames before it is committed: its probation."""

    frames: Annotated[int, msgspec.Meta(ge=1)] = 500
    """Predictions after which it is judged, or later where they cannot tell yet."""
    seconds: Annotated[float, msgspec.Meta(ge=1)] = 900.0
    """Time after which it is judged on what there is; a dark or absent camera is no fault of the model."""
    min_frames: Annotated[int, msgspec.Meta(ge=0)] = 50
    """With fewer predictions after `seconds`, errors and latency are judged and the rates below are not."""
    max_error_rate: Share = 0.01
    """Predictions that failed or were not finite."""
    max_latency_factor: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """Median latency, as a multiple of the previous model's on this device."""
    max_ood_share: Share = 1.0
    """Shadowed frames that this model takes to be out of distribution where the previous one does not."""
    min_agreement: Share = 0.7
    """Shadowed frames on which both models give the same label."""
    shadow_every: Annotated[int, msgspec.Meta(ge=0)] = 10
    """One of so many frames is given to the previous model, too (0: none)."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle, or the agent's own wheels (`model` is then `AGENT`), as it was published."""

    schema: int = SCHEMA
    model: str = ""
    version: str = ""
    site: str = ""
    """The only site that it is for; empty: all."""
    identity: str = ""
    """sha256 of the manifest of the whole bundle; of an agent, of its wheel."""
    boards: tuple[str, ...] = ()
    """Kinds of boards (`eyas_device.board`) that it is for; empty: all."""
    min_agent: str = ""
    """Oldest agent that can run it."""
    issued: float = 0.0
    """When it was signed, seconds since 1970."""
    variants: tuple[Variant, ...] = ()
    """The smallest first; a device takes the first that has its runtime."""
    probation: Bounds = Bounds()
    note: str = ""
    """For people: what changed."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What no device runs or installs, whatever a channel says."""

    schema: int = SCHEMA
    revoked: dict[str, str] = {}
    """`identity` of a release -> why; a device that runs it goes to its other slot if that is good, else says so."""
    min_versions: dict[str, str] = {}
    """Model -> oldest version that may be installed."""


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """Which release a channel wants of one model, and which devices take it now: changed by each wave of a rollout."""

    schema: int = SCHEMA
    model: str = ""
    target: str = ""
    """Path of the wanted release's target; empty: none is wanted, a device keeps what it has."""
    previous: str = ""
    """Target for the devices outside of the share, and of an aborted rollout; empty: they keep what they have."""
    rollout: str = ""
    """Id of the rollout, part of what a device's bucket is computed from; empty: everybody takes `target`."""
    shares: dict[str, Share] = {}
    """Group -> share of its devices that take `target`, 0..1; `*` for the groups that are not named, else none."""
    rolled_back: bool = False
    """Whether `previous` was chosen by a roll-back: only then a device goes back to an older version."""
    refresh: tuple[str, ...] = ()
    """Devices of the control group: they install `previous` again, so that both arms are freshly flashed."""
    hours: str = ""
    """Maintenance hours in the device's time zone, `22:00-05:00`; empty: always."""
    issued: float = 0.0
    """When it was signed, seconds since 1970."""


Document = TypeVar("Document", Release, Policy, Channel)
AGENT = "eyas-agent"
"""`Release.model` of the agent itself, and its name in channels."""


def release_target(model: str, version: str, site: str = "") -> str:
    """Path of a release's target. Raises `ValueError` for names that cannot be part of it."""
    return f"{_site(site)}releases/{check_name(model)}/{check_name(version)}/release.json"


def channel_target(channel: str, model: str, site: str = "") -> str:
    """Path of a channel's target. Raises `ValueError` for names that cannot be part of it."""
    return f"{_site(site)}channels/{check_name(channel)}/{check_name(model)}.json"


def site_role(site: str) -> str:
    """Name of the role that signs for a site alone."""
    return f"site-{check_name(site)}"


def blob_path(sha256: str) -> str:
    """Path of a blob below the repository."""
    return f"blobs/{sha256[:2]}/{sha256}"


def bucket(rollout: str, device: str) -> float:
    """Where a device stands in a rollout, 0..1: it takes part from the share on that is above this.

    The same device is in every larger share of the same rollout; another rollout begins with other devices.
    """
    digest = hashlib.sha256(f"{rollout}\n{device}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def takes_target(channel: Channel, group: str, device: str) -> bool:
    """Whether a device of `group` takes the wanted release now."""
    if channel.rolled_back or not channel.target:
        return False
    if not channel.rollout:
        return True
    share = channel.shares.get(group, channel.shares.get(ALL_GROUPS, 0.0))
    return device not in channel.refresh and bucket(channel.rollout, device) < share


def decode_document(data: bytes, kind: type[Document], name: str) -> Document:
    """Decode a verified target. Raises `UpdateError` that names it for one that this agent cannot read."""
    if len(data) > MAX_BYTES:
        raise UpdateError(f"{name}: {len(data)} bytes; {MAX_BYTES} are allowed")
    try:
        document = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpdateError(f"{name}: {error}; publish it again") from None
    if document.schema > SCHEMA:
        raise UpdateError(f"{name}: schema {document.schema}, this agent reads up to {SCHEMA}: update the agent")
    return document


def _site(site: str) -> str:
    return f"sites/{check_name(site)}/" if site else ""
