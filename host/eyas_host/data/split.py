"""The split of the images into training, validation and held-out test set.

The manifest lists every image by its sha256, `data.locations` knows where it lies. Training and validation are open to
all stages; `Split.open_test` is the only access to the held-out test set, and every access is logged.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from eyas_device.preprocess import Preprocessing
from eyas_host.data.access_log import AccessLog, LoggedAccess, append_access, read_accesses
from eyas_host.data.assign import DAY, assign_by_time, assign_divided, assign_stratified
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.duplicates import BITS, cluster_hashes
from eyas_host.data.held_out import check_test_access
from eyas_host.data.index import Index
from eyas_host.data.keep import assign_kept, check_kept, load_kept
from eyas_host.data.locations import load_locations
from eyas_host.data.manifest import MANIFEST, SPLITS, KeptSplit, SplitManifest, data_hash, load_manifest, map_images
from eyas_host.data.sources import LabelledImage
from eyas_host.data.units import Indices, Units, find_units, unit_ids
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError

_SHOWN = 10


class Split:
    """The images of a run's split, with logged access to the test set."""

    def __init__(
        self, manifest: SplitManifest, root: Path, spec: Preprocessing | None = None, sources: Sequence[str] = ()
    ) -> None:
        self.manifest = manifest
        self.root = root
        self.sources = tuple(sources)
        self.labels = manifest.labels
        self.spec = spec
        self.train = self._dataset(manifest.train)
        self.validation = self._dataset(manifest.validation)

    @classmethod
    def load(cls, root: Path, spec: Preprocessing | None = None) -> Split:
        """Read the split of the run at `root`; images are decoded as `spec` asks.

        Raises `DataError` if it is missing or malformed.
        """
        path = root / MANIFEST
        try:
            manifest = load_manifest(path)
        except DataError as error:
            raise DataError(f"{error}; run again with --from split") from None
        locations = load_locations(root)
        return cls(map_images(manifest, locations.located), root, spec, locations.sources)

    def open_test(self, reason: str, *, early: bool = False) -> ImageDataset:
        """Return the held-out test set and log the access.

        Raises `DataError` unless the bundle is packed from the current outputs. `early` skips that check, for
        benchmarks from which no release follows; the log records it.
        """
        models, too_early = check_test_access(self.root, early=early)
        access = LoggedAccess(
            time=time.time(), reason=reason, run=self.root.resolve().name, models=models, early=too_early
        )
        append_access(access, self._test_hashes(), self.sources, self.root)
        return self._dataset(self.manifest.test)

    def access_log(self) -> AccessLog:
        """All accesses to this test set, also by other runs."""
        return read_accesses(self._test_hashes(), self.sources, self.root)

    def test_accesses(self) -> list[LoggedAccess]:
        """All logged accesses to the test set, oldest first."""
        return list(self.access_log().accesses)

    def _test_hashes(self) -> list[str]:
        return [image.sha256 for image in self.manifest.test]

    def _dataset(self, images: Sequence[LabelledImage]) -> ImageDataset:
        units = unit_ids(images, self.manifest.clusters, grouped=self.manifest.by == "group")
        return ImageDataset(images, self.labels, self.spec, units)


class _UnitSizeError(DataError):
    """A unit cannot be divided and is too large for a split."""


class _Assignment(NamedTuple):
    found: Units
    chosen: tuple[Indices, Indices, Indices]
    aside: dict[str, Indices]
    kept: KeptSplit | None


def split_index(index: Index, data: DataSection, seed: int) -> SplitManifest:
    """Assign the images to the splits as `data` asks; near-duplicates, and by group whole groups, stay together.

    Raises `DataError` with the reason if a split would lack a class or miss its requested size by far.
    """
    images = sorted(index.images, key=lambda p: p.sha256)  # not by path: the split does not depend on the folder
    by = _strategy(images, data)
    try:
        found, chosen, aside, kept = _assign(index, images, data, by, seed)
    except _UnitSizeError as error:
        raise DataError(f"{error}; {_smaller_units(index, images, data, by, seed)}") from None
    splits = {
        name: tuple(msgspec.structs.replace(images[i], split="") if images[i].split else images[i] for i in indices)
        for name, indices in zip(SPLITS, chosen, strict=True)
    }
    counts = {name: dict(sorted(Counter(p.label for p in splits[name]).items())) for name in SPLITS}
    _check_classes(index, splits, by, data)
    manifest = SplitManifest(
        strategy=_strategy_text(by, data),
        seed=seed,
        fractions=data.split,
        labels=index.labels,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        counts=counts,
        unreadable=len(index.unreadable),
        notices=index.notices,
        by=by,
        fold=data.fold,
        gap_days=data.gap_days,
        near_duplicates=data.near_duplicates,
        clusters=tuple(tuple(images[i].sha256 for i in cluster) for cluster in found.clusters),
        unjoined=found.unjoined,
        groups={name: len({p.group for p in splits[name]}) for name in SPLITS} if by == "group" else {},
        set_aside={why: tuple(images[i] for i in indices) for why, indices in aside.items() if indices},
        copies=len(index.copies),
        kept=kept,
    )
    return msgspec.structs.replace(manifest, data=data_hash(manifest))


def _assign(index: Index, images: Sequence[LabelledImage], data: DataSection, by: str, seed: int) -> _Assignment:
    """Find the units and assign them. Raises `_UnitSizeError`, and `DataError` for a former split that does not fit."""
    clusters = _clusters(index, images, data.near_duplicates)
    grouped = by == "group"
    found = find_units(images, clusters, index.copies, grouped=grouped, splits=max(len(SPLITS), data.fold[1]))
    aside: dict[str, Indices] = {}
    kept = None
    if data.keep:
        former = load_kept(data.keep)
        kept = check_kept(former, data, by, images)
        chosen, aside = assign_kept(images, found, former, data, seed)
    elif data.divided:
        chosen = assign_divided(images, found.units, data.split, seed)
    elif by == "time":
        chosen, aside = assign_by_time(images, found.clusters, data.split, data.gap_days)
    else:
        chosen = assign_stratified(images, found.units, data.split, seed, data.fold, grouped=grouped)
        _check_sizes(images, found.units, chosen, data)
    return _Assignment(found, chosen, aside, kept)


def _smaller_units(index: Index, images: Sequence[LabelledImage], data: DataSection, by: str, seed: int) -> str:
    """What to change where a unit is too large: a smaller bound on near-duplicates only if it was tried and works."""
    advice = "change [data] split or fold, or add images" + (" of other groups" if by == "group" else "")
    bits = data.near_duplicates
    while bits:
        bits = bits * 3 // 4 if bits > 1 else 0
        try:
            chosen = _assign(index, images, msgspec.structs.replace(data, near_duplicates=bits), by, seed).chosen
        except _UnitSizeError:
            continue
        if any(len({images[i].label for i in indices}) < len(index.labels) for indices in chosen):
            continue
        works = f"set near_duplicates = {bits} (tried: it can be split so); " if bits else ""
        return (
            f"{works}near_duplicates = 0 turns the search off. Where one fixed camera sees a new part in each image, "
            f"all look alike: by = 'time' or 'group' says what belongs together; else {advice}"
        )
    return advice


def _strategy(images: Sequence[LabelledImage], data: DataSection) -> str:
    if data.by == "auto":
        return "group" if any(image.group for image in images) else "stratified"
    return data.by


def _strategy_text(by: str, data: DataSection) -> str:
    text = {
        "folders": "as the folders divide the images",
        "column": "as the column split divides the images",
        "stratified": "stratified by label x stratum",
        "group": "by group, stratified by label x stratum",
        "time": "by time" + (f", {data.gap_days:g} days apart" if data.gap_days else ""),
    }[by]
    text += ", images of a former split where they were" if data.keep else ""
    text += f", fold {data.fold[0]} of {data.fold[1]}" if data.fold[1] else ""
    near = f", near-duplicates (at most {data.near_duplicates} of {BITS} bits differ) kept together"
    return text + (near if data.near_duplicates else "")


def _clusters(index: Index, images: Sequence[LabelledImage], max_bits: int) -> list[Indices]:
    """Clusters of two or more near-duplicates."""
    if not max_bits or not index.files:
        return []
    clusters: dict[int, Indices] = {}
    for row, number in enumerate(cluster_hashes(index.hashes(images), max_bits).tolist()):
        clusters.setdefault(number, []).append(row)
    return [cluster for cluster in clusters.values() if len(cluster) > 1]


def _check_sizes(
    images: Sequence[LabelledImage], units: Sequence[Indices], chosen: Sequence[Indices], data: DataSection
) -> None:
    """Raise `_UnitSizeError` if a unit is so large that a split gets less than half or more than twice its fraction."""
    if not units:
        return
    test = 1 / data.fold[1] if data.fold[1] else data.split[2]
    rest = (1 - test) / (data.split[0] + data.split[1])
    for name, indices, wanted in zip(SPLITS, chosen, (data.split[0] * rest, data.split[1] * rest, test), strict=True):
        fraction = len(indices) / len(images)
        if not wanted / 2 - 1 / len(images) <= fraction <= 2 * wanted + 1 / len(images):
            largest = max(units, key=len)
            names = sorted({images[i].group for i in largest} - {""})
            what = f"group {names[0]!r}" if len(names) == 1 else f"{len(names)} groups linked by near-duplicates"
            what = what if names and data.by != "stratified" else "a cluster of near-duplicates"
            raise _UnitSizeError(
                f"the {name} split would get {fraction:.0%} of the images instead of {wanted:.0%}: {what} holds "
                f"{len(largest)} of {len(images)} (e.g. {images[largest[0]].path}) and cannot be divided"
            )


def _check_classes(index: Index, splits: dict[str, tuple[LabelledImage, ...]], by: str, data: DataSection) -> None:
    """Raise `DataError` with the reason if a split has no image of a class."""
    for name in SPLITS:
        missing = sorted(set(index.labels) - {p.label for p in splits[name]})
        if not missing:
            continue
        own = [p for p in index.images if p.label == missing[0]]
        if by == "time" and not splits[name]:
            times = {p.time for p in index.images if p.time is not None}
            why = f"the images span {(max(times) - min(times)) / DAY:.3g} days at {len(times)} different times"
            fix = f"take less than gap_days = {data.gap_days:g} or another [data] split"
        elif by == "time":
            why = f"{missing[0]!r} was taken {_span(own)}, the split is {_span(splits[name])}"
            fix = "change [data] split or gap_days, add images, or leave the class out"
        elif by == "group":
            groups = sorted({p.group for p in own})
            shown = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
            why = f"{missing[0]!r} comes in {len(groups)} group{'s' * (len(groups) > 1)} ({shown})"
            fix = "each split needs a group with each class: add groups, or try another [data] split or [run] seed"
        elif data.divided:
            where = "column split has" if by == "column" else "folders have"
            why = f"the {where} {missing[0]!r} in {', '.join(sorted({p.split for p in own}))} alone"
            fix = "every split needs images of every class: add some, or leave the class out everywhere"
        else:
            counts = index.counts()
            why = f"images per class: { ({label: counts[label] for label in index.labels[:_SHOWN]}) }"
            fix = "add images or change [data] split"
        raise DataError(f"too few images: the {name} split would have none of {', '.join(missing)} ({why}); {fix}")


def _span(images: Sequence[LabelledImage]) -> str:
    times = [p.time for p in images if p.time is not None]
    first, last = (time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (min(times), max(times)))
    return f"from {first} to {last}"
