"""Overlap of a labelled set with the images of the run that a bundle comes from: exact copies and near-duplicates."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from eyas_device.bundle import sha256
from eyas_host.data.duplicates import BITS, Hashes, nearest_hashes
from eyas_host.data.manifest import MANIFEST as SPLIT_MANIFEST
from eyas_host.data.manifest import SplitManifest
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import Split
from eyas_host.pipeline.lock import RunLock
from eyas_host.pipeline.runner import IMAGE_TABLE


class SeenImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the set that the run of the bundle has seen."""

    path: str
    split: str
    """Where the run has it: train, validation or test."""
    match: Literal["exact", "near-duplicate"]
    original: str
    """Path of the run's image."""
    bits: int = 0
    """Bits, of 256, in which the perceptual hashes differ."""


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Which images the run of the bundle has seen, as far as that could be checked."""

    checked: bool
    near_duplicates_checked: bool = False
    notes: tuple[str, ...] = ()
    """What could not be checked, and why."""
    images: tuple[SeenImage, ...] = ()


def run_of(bundle: Path) -> Path | None:
    """The folder of the run that `bundle` lies in, if it does."""
    root = bundle.resolve().parent
    return root if (root / SPLIT_MANIFEST).is_file() else None


def joined_hashes(hashes: Sequence[bytes]) -> Hashes:
    """Perceptual hashes as one array, uint8 [n, 32]."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), BITS // 8)


class SeenBefore:
    """The images of the run that a bundle was packed in."""

    def __init__(self, manifest: SplitManifest | None, hashes: Mapping[str, bytes], notes: Sequence[str]) -> None:
        self._manifest = manifest
        self._hashes = hashes
        self._notes = tuple(notes)

    @classmethod
    def of(cls, bundle: Path, split_sha256: str, run: Path | None) -> SeenBefore:
        """Of `run`, or of the run that `bundle` lies in. Raises `DataError` for a run without a split."""
        root = run or run_of(bundle)
        if root is None:
            return cls(None, {}, ("the bundle does not lie in its run; give --run DIR",))
        path, notes = root / SPLIT_MANIFEST, []
        with RunLock(root, create=False) as lock:
            if not lock.acquire(shared=True):
                return cls(None, {}, (f"another eyas command writes to {root}; wait for it",))
            manifest = Split.load(root).manifest
            if split_sha256 and sha256(path) != split_sha256:
                notes.append(f"{path} is not the split that the bundle was made from: what it trained on may differ")
            hashes = _table_hashes(root / IMAGE_TABLE)
        if not manifest.near_duplicates:
            notes.append("near-duplicates were not looked for: the run has [data] near_duplicates = 0")
        elif not hashes:
            notes.append(f"near-duplicates were not looked for: {root / IMAGE_TABLE} has no perceptual hashes")
        alike = {sha for cluster in manifest.unjoined for sha in cluster.images}
        if alike and hashes:
            notes.append(f"{len(alike)} images of the run look alike without being duplicates: only copies are found")
        hashes = {sha: value for sha, value in hashes.items() if sha not in alike}
        return cls(manifest, hashes if manifest.near_duplicates else {}, notes)

    def compare(self, images: Sequence[LabelledImage], hashes: Hashes) -> Overlap:
        """What the run has seen of `images` with perceptual `hashes` [n, 32]."""
        if self._manifest is None:
            return Overlap(checked=False, notes=self._notes)
        own = [(split, image) for split in ("train", "validation", "test") for image in getattr(self._manifest, split)]
        exact = {image.sha256: (split, image) for split, image in reversed(own)}
        hashed = [(split, image) for split, image in own if image.sha256 in self._hashes]
        seen = []
        nearest, distances = nearest_hashes(hashes, joined_hashes([self._hashes[image.sha256] for _, image in hashed]))
        for row, image in enumerate(images):
            if image.sha256 in exact:
                split, original = exact[image.sha256]
                seen.append(SeenImage(path=image.path, split=split, match="exact", original=original.path))
            elif hashed and distances[row] <= self._manifest.near_duplicates:
                split, original = hashed[nearest[row]]
                seen.append(
                    SeenImage(
                        path=image.path,
                        split=split,
                        match="near-duplicate",
                        original=original.path,
                        bits=int(distances[row]),
                    )
                )
        return Overlap(checked=True, near_duplicates_checked=bool(hashed), notes=self._notes, images=tuple(seen))


def _table_hashes(path: Path) -> dict[str, bytes]:
    """sha256 -> perceptual hash, from the run's table of images; empty without one."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [(row["sha256"], bytes.fromhex(row["perceptual_hash"])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return {}
    return {digest: value for digest, value in rows if len(value) == BITS // 8}
