"""Publish the agent itself: wheels for each platform, signed as a release of the model `eyas-agent`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eyas_device.bundle import sha256
from eyas_device.updates.release import AGENT, Channel, Release, ReleaseFile, Variant
from eyas_host.fleet.updates.repository import Repository
from eyas_host.fleet.updates.variants import Content, PublishError

_PLATFORM = re.compile(r"cp3\d{1,2}-[a-z0-9_]{1,32}")
_VERSION = re.compile(r"eyas_device-([^-]+)-")


def publish_agent(
    repository: Repository,
    wheels: Mapping[str, Path],
    *,
    channel: str = "",
    boards: Sequence[str] = (),
    note: str = "",
) -> Release:
    """Publish a version of the agent.

    Args:
        repository: The kit's repository.
        wheels: Platform (`cp311-aarch64`) -> folder with the wheel of eyas-device and exactly those that it needs
            there, as `eyas flash --offline` collects them.
        channel: Channel whose devices shall all take it now; empty: only publish, for a rollout.
        boards: Kinds of boards that may install it; none: all.
        note: What changed, for people.

    Raises:
        PublishError: A folder does not hold what is needed, or the folders differ in the agent.
        SigningError: A key is missing; nothing was published.

    """
    variants, blobs, agents = [], {}, set()
    for platform, folder in sorted(wheels.items()):
        if not _PLATFORM.fullmatch(platform):
            raise PublishError(f"{platform!r}: not a platform; such as cp311-aarch64 or cp311-x86_64")
        found = sorted(folder.glob("*.whl"))
        own = [path for path in found if path.name.startswith("eyas_device-")]
        if len(own) != 1:
            raise PublishError(f"{folder}: {len(own)} wheels of eyas-device; exactly one is needed")
        agents.add((own[0].name, sha256(own[0])))
        files = []
        for path in found:
            blobs[digest := sha256(path)] = path
            files.append(ReleaseFile(path=path.name, sha256=digest, size_bytes=path.stat().st_size))
        variants.append(Variant(platform=platform, files=tuple(files)))
    if len(agents) != 1:
        raise PublishError(f"{len(agents)} different wheels of eyas-device; every platform gets the same one")
    [(name, identity)] = agents
    matched = _VERSION.match(name)
    version = matched[1] if matched else ""
    release = Release(
        model=AGENT,
        version=version,
        identity=identity,
        boards=tuple(boards),
        issued=float(int(repository.now())),
        variants=tuple(variants),
        note=note,
    )
    target = f"agent/{version}/release.json"
    published = repository.publish_files(target, release, Content(tuple(variants), blobs))
    if channel:
        before = repository.channel(channel, AGENT)
        previous = before.target if before is not None and before.target != target else ""
        repository.set_channel(channel, Channel(model=AGENT, target=target, previous=previous))
    return published
