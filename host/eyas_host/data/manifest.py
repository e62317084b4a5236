"""The manifest of a split: which image is in which split, by its hash."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from eyas_host.data.index import Index
from eyas_host.data.locations import save_locations, without_paths
from eyas_host.data.sources import LabelledImage
from eyas_host.data.units import UnjoinedCluster
from eyas_host.pipeline.runner import IMAGE_TABLE
from eyas_host.support.errors import DataError
from eyas_host.support.files import atomic_write, write_bytes

SPLITS = ("train", "validation", "test")
MANIFEST = Path("split") / "manifest.json"
"""Below the run's folder."""
_COLUMNS = (
    *("path", "label", "group", "time", "sha256", "width", "height", "mode", "bits"),
    *("perceptual_hash", "near_duplicates", "split"),
)


class KeptSplit(msgspec.Struct, frozen=True):
    """What was kept of a former split."""

    manifest: str
    """sha256 of the former manifest."""
    images: int
    """Images that stayed where they were."""
    new: int
    """Images that the former split did not have."""
    gone: dict[str, int]
    """Split -> images that are no longer there."""
    relabelled: int
    """Images with another label than before."""


class SplitManifest(msgspec.Struct, frozen=True):
    """`split/manifest.json`."""

    strategy: str
    """How the images were assigned, as a sentence."""
    seed: int
    fractions: tuple[float, float, float]
    """Requested fractions of training, validation and test."""
    labels: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    validation: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    counts: dict[str, dict[str, int]]
    """Split -> label -> images."""
    unreadable: int = 0
    """Files that were left out; `index.csv` names them."""
    notices: tuple[str, ...] = ()
    by: str = "stratified"
    """stratified, group or time."""
    fold: tuple[int, int] = (0, 0)
    gap_days: float = 0.0
    near_duplicates: int = 0
    """Maximum Hamming distance of the 256-bit perceptual hashes of near-duplicates; 0: no search."""
    clusters: tuple[tuple[str, ...], ...] = ()
    """Clusters of near-duplicates as sha256 hashes; each cluster is in one split."""
    unjoined: tuple[UnjoinedCluster, ...] = ()
    """Clusters of near-duplicates that were not kept together, and why."""
    groups: dict[str, int] = {}
    """by group: number of groups in each split."""
    set_aside: dict[str, tuple[LabelledImage, ...]] = {}
    """by time: images in no split, by reason."""
    copies: int = 0
    """Exact copies that were dropped."""
    data: str = ""
    """sha256 over all images and labels, independent of the split."""
    kept: KeptSplit | None = None
    """What `[data] keep` kept."""


def load_manifest(path: Path) -> SplitManifest:
    """Read a manifest, without paths. Raises `DataError` if it is missing or malformed."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SplitManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def save_split(manifest: SplitManifest, root: Path, index: Index | None = None, sources: Sequence[str] = ()) -> Path:
    """Write the manifest of the run at `root`, without the images' paths; return its path.

    Beside it are the paths, with the folders of the `sources`, and `index` as a CSV table.
    """
    path = root / MANIFEST
    if index is not None:
        _save_table(manifest, index, root / IMAGE_TABLE)
    aside = [image for some in manifest.set_aside.values() for image in some]
    save_locations(root, [*manifest.train, *manifest.validation, *manifest.test, *aside], sources)
    plain = map_images(manifest, without_paths)
    write_bytes(path, msgspec.json.format(msgspec.json.encode(plain), indent=1))
    return path


def map_images(
    manifest: SplitManifest, change: Callable[[Sequence[LabelledImage]], tuple[LabelledImage, ...]]
) -> SplitManifest:
    """The manifest with `change` applied to the images of every split, and to those set aside."""
    return msgspec.structs.replace(
        manifest,
        **{name: change(getattr(manifest, name)) for name in SPLITS},
        set_aside={why: change(images) for why, images in manifest.set_aside.items()},
    )


def _save_table(manifest: SplitManifest, index: Index, target: Path) -> None:
    cluster = {sha: number for number, one in enumerate(manifest.clusters, 1) for sha in one}
    with atomic_write(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(_COLUMNS)
        for image, where in _assignments(manifest, index):
            file = index.files.get(image.sha256)
            columns = (file.width, file.height, file.mode, file.bits, file.hash.hex()) if file else ("",) * 5
            when = "" if image.time is None else image.time
            near = cluster.get(image.sha256, "")
            table.writerow([image.path, image.label, image.group, when, image.sha256, *columns, near, where])
        for path, why in index.unreadable:
            table.writerow([path, *[""] * 10, f"unreadable: {why}"])


def _assignments(manifest: SplitManifest, index: Index) -> Iterator[tuple[LabelledImage, str]]:
    """Every readable image and where it was assigned."""
    for name in SPLITS:
        yield from ((image, name) for image in getattr(manifest, name))
    for why, images in manifest.set_aside.items():
        yield from ((image, f"set aside: {why}") for image in images)
    yield from ((copy, f"copy of {first.path}") for copy, first in index.copies)


def data_hash(manifest: SplitManifest) -> str:
    """sha256 over all images and labels, independent of the split."""
    digest = hashlib.sha256()
    images = [*manifest.train, *manifest.validation, *manifest.test]
    images += [image for some in manifest.set_aside.values() for image in some]
    for line in sorted(f"{p.sha256} {p.label}\n" for p in images):
        digest.update(line.encode())
    return digest.hexdigest()


def known_images(split: SplitManifest) -> dict[str, str]:
    """sha256 -> label of every image that a version was made from or tested on."""
    named = [image for name in SPLITS for image in getattr(split, name)]
    aside = [image for images in split.set_aside.values() for image in images]
    return {image.sha256: image.label for image in (*named, *aside)}
