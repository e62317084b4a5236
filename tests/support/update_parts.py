"""A stand-in for a trusted repository: a folder whose documents are taken as signed, and small bundles to publish."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, SCHEMA, Artefact, Manifest, sha256
from eyas_device.config import Config, DeviceSection, UpdateSection
from eyas_device.support.closing import Closing
from eyas_device.updates.fetcher import Fetcher
from eyas_device.updates.release import (
    Bounds,
    Channel,
    Policy,
    Release,
    ReleaseFile,
    Variant,
    blob_path,
    release_target,
)
from eyas_device.updates.trust import Refreshed
from tests.support import tiny
from tests.support.bundles import entry


def write_small_bundle(root: Path, version: str, *, name: str = "small") -> Path:
    """A bundle whose hashes are right, and that no runtime could load."""
    (root / "parts").mkdir(parents=True)
    (root / "model.tflite").write_bytes(version.encode() * 1000)
    (root / "parts" / "weights.bin").write_bytes(b"the same in each version" * 500)
    (root / "CARD.md").write_text(f"card of {version}")
    files = (
        entry(root / "model.tflite"),
        msgspec.structs.replace(entry(root / "parts" / "weights.bin"), path="parts/weights.bin"),
    )
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        version=version,
        labels=tiny.LABELS,
        preprocessing=tiny.SPEC,
        artefacts=(Artefact("litert-fp32", "litert", "fp32", files),),
        use={"litert": "litert-fp32"},
    )
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return root


class Published:
    """The folder, as a publisher sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.set_policy(Policy())

    def publish(self, bundle: Path, **fields: object) -> Release:
        """Add a release; `fields` are those of `Release`."""
        manifest = msgspec.json.decode((bundle / MANIFEST).read_bytes(), type=Manifest)
        files = []
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            blob = self.root / blob_path(sha256(path))
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            relative = path.relative_to(bundle).as_posix()
            files.append(ReleaseFile(path=relative, sha256=blob.name, size_bytes=path.stat().st_size))
        digest = sha256(bundle / MANIFEST)
        variant = Variant(runtimes=tuple(manifest.use), manifest_sha256=digest, files=tuple(files))
        release = Release(
            model=manifest.name,
            version=manifest.version,
            identity=manifest.origin or digest,
            issued=time.time(),
            variants=(variant,),
            probation=Bounds(),
        )
        release = msgspec.structs.replace(release, **fields)
        self._write(release_target(release.model, release.version), release)
        return release

    def set_channel(self, channel: Channel | None) -> None:
        if channel is None:
            (self.root / "channel.json").unlink()
        else:
            self._write("channel.json", channel)

    def want(self, release: Release, **fields: object) -> None:
        """Let everybody take a release."""
        target = release_target(release.model, release.version)
        self.set_channel(msgspec.structs.replace(Channel(model=release.model, target=target), **fields))

    def set_policy(self, policy: Policy) -> None:
        self._write("policy.json", policy)

    def _write(self, name: str, document: msgspec.Struct) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(document))


class StandIn(Closing):
    """Answers as `TrustedRepository` does, from a folder of `Published`, without any signature."""

    def __init__(self, update: UpdateSection, site: str, state: Path) -> None:
        self._root = Path(update.url)
        self.fetcher = Fetcher(update.url)

    def refresh(self) -> Refreshed:
        return Refreshed(checked=time.time(), issued=time.time())

    def channel(self, model: str) -> Channel | None:
        path = self._root / "channel.json"
        return msgspec.json.decode(path.read_bytes(), type=Channel) if path.exists() else None

    def release(self, target: str) -> tuple[Release, bytes]:
        data = (self._root / target).read_bytes()
        return msgspec.json.decode(data, type=Release), data

    def policy(self) -> Policy:
        return msgspec.json.decode((self._root / "policy.json").read_bytes(), type=Policy)

    def close(self) -> None:
        """Nothing is held."""


def config_for(state: Path, repository: Path | str, **update: object) -> Config:
    """A device that follows the model `small`."""
    section = msgspec.structs.replace(UpdateSection(url=str(repository), model="small"), **update)
    return Config(device=DeviceSection(name="cam-1", site="hall-2", state=str(state)), update=section)
