"""The split: which images train, which validate, and which stay sealed until the end.

The manifest names every image by its sha256. Training and validation are open to all stages; `Split.open_test` is the
one way to the sealed part, and every opening is written into a ledger that outlives the split.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.preprocess import Preprocessing
from eyas_host.data.assign import DAY, Places, divide, divide_by_time
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.duplicates import BITS, cluster_hashes, components
from eyas_host.data.held_out import TestAccess, open_test_set, test_accesses
from eyas_host.data.index import Index
from eyas_host.data.sources import LabelledImage
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError
from eyas_host.support.files import atomic_write, write_bytes

PARTS = ("train", "validation", "test")
MANIFEST = Path("split") / "manifest.json"
"""Below the run's folder."""
TABLE = Path("split") / "index.csv"
"""Below the run's folder: one row an image, for a look with other tools."""
_COLUMNS = (
    *("path", "label", "group", "time", "sha256", "width", "height", "mode", "bits"),
    *("perceptual_hash", "near_duplicates", "part"),
)
_SHOWN = 10


class SplitManifest(msgspec.Struct, frozen=True):
    """`split/manifest.json`."""

    strategy: str
    """In words."""
    seed: int
    parts: tuple[float, float, float]
    labels: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    validation: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    counts: dict[str, dict[str, int]]
    unreadable: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    by: str = "stratified"
    """stratified, group or time."""
    fold: tuple[int, int] = (0, 0)
    gap_days: float = 0.0
    near_duplicates: int = 0
    """Bits of 256 in which perceptual hashes may differ to count as near-duplicates; 0: not looked for."""
    clusters: tuple[tuple[str, ...], ...] = ()
    """Near-duplicates, sha256 each: a cluster lies in one part."""
    groups: dict[str, int] = {}
    """by group: number of groups in each part."""
    set_aside: dict[str, tuple[LabelledImage, ...]] = {}
    """by time: images in no part, by reason."""
    copies: int = 0
    """Exact copies that were dropped."""
    data: str = ""
    """sha256 over all images and labels, however they are divided."""
    warnings: tuple[str, ...] = ()


class Split:
    """An opened split."""

    def __init__(self, manifest: SplitManifest, root: Path, spec: Preprocessing | None = None) -> None:
        self.manifest = manifest
        self.root = root
        self.labels = manifest.labels
        self.spec = spec
        self.train = ImageDataset(manifest.train, manifest.labels, spec)
        self.validation = ImageDataset(manifest.validation, manifest.labels, spec)

    @classmethod
    def load(cls, root: Path, spec: Preprocessing | None = None) -> Split:
        """Read the split of the run at `root`, its images to be decoded for the model of `spec`.

        Raises `DataError` if it is missing or malformed.
        """
        path = root / MANIFEST
        try:
            return cls(msgspec.json.decode(path.read_bytes(), type=SplitManifest), root, spec)
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); run again with --from split") from None

    def open_test(self, reason: str, *, early: bool = False) -> ImageDataset:
        """Open the sealed test part and write the opening into the ledger.

        Raises `DataError` unless the bundle is packed from what is there now; `early` allows that too, for a benchmark
        of networks from which no release follows, and the ledger says so.
        """
        open_test_set(self.root, reason, early=early)
        return ImageDataset(self.manifest.test, self.labels, self.spec)

    def test_accesses(self) -> list[TestAccess]:
        """The ledger so far."""
        return test_accesses(self.root)


def split_index(index: Index, data: DataSection, seed: int) -> SplitManifest:
    """Divide the images as `data` says; near-duplicates, and by group all of a group, stay in one part.

    Raises `DataError` that says why, if a part would lack a class or come out far from its share.
    """
    images = sorted(index.images, key=lambda p: p.sha256)  # not by path: the same data anywhere splits alike
    by = _strategy(images, data)
    clusters = _clusters(index, images, data.near_duplicates)
    aside: dict[str, Places] = {}
    if by == "time":
        chosen, aside = divide_by_time(images, clusters, data.split, data.gap_days)
    else:
        units = _bound(images, clusters, index.copies) if by == "group" else clusters
        chosen = divide(images, units, data.split, seed, data.fold)
        _check_shares(images, units, chosen, data)
    parts = {part: tuple(images[i] for i in places) for part, places in zip(PARTS, chosen, strict=True)}
    counts = {part: dict(sorted(Counter(p.label for p in parts[part]).items())) for part in PARTS}
    _check_classes(index, parts, by, data)
    manifest = SplitManifest(
        strategy=_words(by, data),
        seed=seed,
        parts=data.split,
        labels=index.labels,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        counts=counts,
        unreadable=index.unreadable,
        notices=index.notices,
        by=by,
        fold=data.fold,
        gap_days=data.gap_days,
        near_duplicates=data.near_duplicates,
        clusters=tuple(tuple(images[i].sha256 for i in cluster) for cluster in clusters),
        groups={part: len({p.group for p in parts[part]}) for part in PARTS} if by == "group" else {},
        set_aside={why: tuple(images[i] for i in places) for why, places in aside.items() if places},
        copies=len(index.copies),
    )
    return msgspec.structs.replace(manifest, data=data_hash(manifest))


def _strategy(images: Sequence[LabelledImage], data: DataSection) -> str:
    if data.by == "auto":
        return "group" if any(image.group for image in images) else "stratified"
    return data.by


def _words(by: str, data: DataSection) -> str:
    words = {
        "stratified": "stratified by label x stratum",
        "group": "by group, stratified by label x stratum",
        "time": "by time" + (f", {data.gap_days:g} days apart" if data.gap_days else ""),
    }[by]
    words += f", fold {data.fold[0]} of {data.fold[1]}" if data.fold[1] else ""
    near = f", near-duplicates (at most {data.near_duplicates} of {BITS} bits differ) on one side"
    return words + (near if data.near_duplicates else "")


def _clusters(index: Index, images: Sequence[LabelledImage], most: int) -> list[Places]:
    """Near-duplicates: clusters of two or more."""
    if not most or not index.looks:
        return []
    return _gathered(cluster_hashes(index.hashes(images), most).tolist())


def _bound(
    images: Sequence[LabelledImage], clusters: Sequence[Places], copies: Sequence[tuple[LabelledImage, LabelledImage]]
) -> list[Places]:
    """Images that share a group or a cluster, or whose groups share an image, at any remove: two or more each."""
    groups: dict[str, int] = {}
    links: list[tuple[int, int]] = []
    for place, image in enumerate(images):
        links.append((place, len(images) + groups.setdefault(image.group, len(groups))))
    for one, two in copies:
        ends = (groups.setdefault(image.group, len(groups)) for image in (one, two))
        links.append((len(images) + next(ends), len(images) + next(ends)))
    links += [(cluster[0], other) for cluster in clusters for other in cluster[1:]]
    one, two = np.array(links, dtype=np.int64).T
    return _gathered(components(len(images) + len(groups), one, two)[: len(images)].tolist())


def _gathered(numbers: Sequence[int]) -> list[Places]:
    """Places with the same number, where there are two or more."""
    found: dict[int, Places] = {}
    for place, number in enumerate(numbers):
        found.setdefault(number, []).append(place)
    return [places for places in found.values() if len(places) > 1]


def _check_shares(
    images: Sequence[LabelledImage], units: Sequence[Places], chosen: Sequence[Places], data: DataSection
) -> None:
    """Raise `DataError` if a unit is so large that a part is less than half or more than twice of what it should be."""
    if not units:
        return
    test = 1 / data.fold[1] if data.fold[1] else data.split[2]
    rest = (1 - test) / (data.split[0] + data.split[1])
    for part, places, share in zip(PARTS, chosen, (data.split[0] * rest, data.split[1] * rest, test), strict=True):
        have = len(places) / len(images)
        if not share / 2 - 1 / len(images) <= have <= 2 * share + 1 / len(images):
            largest = max(units, key=len)
            names = sorted({images[i].group for i in largest} - {""})
            what = f"group {names[0]!r}" if len(names) == 1 else f"{len(names)} groups linked by near-duplicates"
            what = what if names and data.by != "stratified" else "a cluster of near-duplicates"
            raise DataError(
                f"the {part} part would get {have:.0%} of the images instead of {share:.0%}: {what} holds "
                f"{len(largest)} of {len(images)} (e.g. {images[largest[0]].path}) and stays on one side; "
                "change [data] split or fold, or add other groups; a smaller near_duplicates binds fewer images"
            )


def _check_classes(index: Index, parts: dict[str, tuple[LabelledImage, ...]], by: str, data: DataSection) -> None:
    """Raise `DataError` that says why, if a part has no image of a class."""
    for part in PARTS:
        missing = sorted(set(index.labels) - {p.label for p in parts[part]})
        if not missing:
            continue
        own = [p for p in index.images if p.label == missing[0]]
        if by == "time" and not parts[part]:
            times = {p.time for p in index.images if p.time is not None}
            why = f"the images span {(max(times) - min(times)) / DAY:.3g} days at {len(times)} different times"
            fix = f"take less than gap_days = {data.gap_days:g} or another [data] split"
        elif by == "time":
            why = f"{missing[0]!r} was seen {_span(own)}, the part is {_span(parts[part])}"
            fix = "change [data] split or gap_days, add images, or leave the class out"
        elif by == "group":
            groups = sorted({p.group for p in own})
            shown = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
            why = f"{missing[0]!r} comes in {len(groups)} group{'s' * (len(groups) > 1)} ({shown})"
            fix = "each part needs a group with each class: add groups, or try another [data] split or [run] seed"
        else:
            counts = index.counts()
            why = f"images a class: { ({label: counts[label] for label in index.labels[:_SHOWN]}) }"
            fix = "add images or change [data] split"
        raise DataError(f"too few images: the {part} part would have none of {', '.join(missing)} ({why}); {fix}")


def _span(images: Sequence[LabelledImage]) -> str:
    times = [p.time for p in images if p.time is not None]
    first, last = (time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (min(times), max(times)))
    return f"from {first} to {last}"


def save_split(manifest: SplitManifest, root: Path, index: Index | None = None) -> Path:
    """Write the manifest of the run at `root`, and its `index` as a table beside it."""
    path = root / MANIFEST
    if index is not None:
        _save_table(manifest, index, root / TABLE)
    write_bytes(path, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return path


def _save_table(manifest: SplitManifest, index: Index, path: Path) -> None:
    cluster = {sha: number for number, one in enumerate(manifest.clusters, 1) for sha in one}
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(_COLUMNS)
        for image, where in _everywhere(manifest, index):
            look = index.looks.get(image.sha256)
            seen = (look.width, look.height, look.mode, look.bits, look.hash.hex()) if look else ("",) * 5
            when = "" if image.time is None else image.time
            near = cluster.get(image.sha256, "")
            table.writerow([image.path, image.label, image.group, when, image.sha256, *seen, near, where])
        for line in index.unreadable:
            table.writerow([line.partition(": ")[0], *[""] * 10, "unreadable: " + line.partition(": ")[2]])


def _everywhere(manifest: SplitManifest, index: Index) -> Iterator[tuple[LabelledImage, str]]:
    """Every readable image and where it went."""
    for part in PARTS:
        yield from ((image, part) for image in getattr(manifest, part))
    for why, images in manifest.set_aside.items():
        yield from ((image, f"set aside: {why}") for image in images)
    yield from ((copy, f"copy of {first.path}") for copy, first in index.copies)


def data_hash(manifest: SplitManifest) -> str:
    """One sha256 over all images and labels, whatever the split."""
    digest = hashlib.sha256()
    everything = [*manifest.train, *manifest.validation, *manifest.test]
    everything += [image for images in manifest.set_aside.values() for image in images]
    for line in sorted(f"{p.sha256} {p.label}\n" for p in everything):
        digest.update(line.encode())
    return digest.hexdigest()
