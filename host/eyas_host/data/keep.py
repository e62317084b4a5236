"""Keep the assignment of a former split: images that it knows stay where they were, only new ones are assigned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eyas_device.bundle import sha256
from eyas_host.data.assign import DAY, assign_stratified
from eyas_host.data.manifest import SPLITS, KeptSplit, SplitManifest, load_manifest
from eyas_host.data.sources import LabelledImage
from eyas_host.data.units import Indices, Units
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError

LINKED = "linked to images of another split"
"""Reason for setting a new image aside."""
_SHOWN = 3


def load_kept(path: str) -> SplitManifest:
    """Read the manifest that `[data] keep` names. Raises `DataError` if it is missing or malformed."""
    try:
        return load_manifest(Path(path))
    except DataError as error:
        raise DataError(f"[data] keep: {error}; the split/manifest.json of a former run is needed") from None


def check_kept(former: SplitManifest, data: DataSection, by: str, images: Sequence[LabelledImage]) -> KeptSplit:
    """Compare a former split with today's images.

    Raises `DataError` if it was made by another strategy or fold, or if images of its held-out test set are gone and
    `keep_missing` is off: what is left is another test set, on which the former model's figures do not hold.
    """
    for name, before, now in (("by", former.by, by), ("fold", list(former.fold), list(data.fold))):
        if before != now:
            raise DataError(
                f"{data.keep}: was split with {name} = {before!r}, this recipe asks for {now!r}; set the same or leave "
                "out [data] keep"
            )
    labels = {image.sha256: image.label for image in images}
    gone = {name: [p for p in getattr(former, name) if p.sha256 not in labels] for name in SPLITS}
    if gone["test"] and not data.keep_missing:
        shown = ", ".join(p.sha256[:12] for p in gone["test"][:_SHOWN])
        raise DataError(
            f"{data.keep}: {len(gone['test'])} of the {len(former.test)} images of its held-out test set are gone "
            f"(sha256 {shown}{', ...' if len(gone['test']) > _SHOWN else ''}): without them the new model cannot be "
            "compared with the former one; put them back, or set [data] keep_missing = true"
        )
    known = [p for p in _all(former) if p.sha256 in labels]
    return KeptSplit(
        manifest=sha256(Path(data.keep)),
        images=len(known),
        new=len(images) - len(known),
        gone={name: len(lost) for name, lost in gone.items() if lost},
        relabelled=sum(labels[p.sha256] != p.label for p in known),
    )


def assign_kept(
    images: Sequence[LabelledImage], found: Units, former: SplitManifest, data: DataSection, seed: int
) -> tuple[tuple[Indices, Indices, Indices], dict[str, Indices]]:
    """Indices of training, validation and test, and of the images set aside, by reason.

    A new image follows the known images of its unit; if they are in several splits it is set aside. Other new units are
    assigned as in a data set of their own; by time, according to the former split's times.
    """
    where = {p.sha256: name for name in SPLITS for p in getattr(former, name)}
    where |= {p.sha256: reason for reason, some in former.set_aside.items() for p in some}
    place = {row: where[image.sha256] for row, image in enumerate(images) if image.sha256 in where}
    new = [row for row in range(len(images)) if row not in place]
    links = found.clusters if former.by == "time" else found.units
    wanted = _by_time(images, new, former, data.gap_days) if former.by == "time" else {}
    for unit in links:
        splits = {place[row] for row in unit if place.get(row) in SPLITS}
        for row in unit if splits else ():
            if row not in place:
                own = wanted.get(row, min(splits))
                place[row] = own if splits == {own} or own not in SPLITS else LINKED
    place = wanted | place
    rest = [row for row in new if row not in place]
    if rest:
        position = {row: number for number, row in enumerate(rest)}
        units = [[position[row] for row in unit if row in position] for unit in found.units]
        chosen = assign_stratified(
            [images[row] for row in rest],
            [unit for unit in units if unit],
            data.split,
            seed,
            data.fold,
            grouped=former.by == "group",
        )
        place |= {rest[number]: name for name, part in zip(SPLITS, chosen, strict=True) for number in part}
    rows: dict[str, Indices] = {name: [] for name in SPLITS}
    for row in range(len(images)):
        rows.setdefault(place[row], []).append(row)
    train, validation, test = (rows.pop(name) for name in SPLITS)
    return (train, validation, test), rows


def kept_warnings(kept: KeptSplit) -> list[str]:
    """What differs from the former split."""
    found = []
    if kept.gone:
        lost = ", ".join(f"{count} of {name}" for name, count in kept.gone.items())
        found.append(f"images of the kept split are gone: {lost}")
    if kept.relabelled:
        found.append(f"{kept.relabelled} images of the kept split have another label now")
    return found


def _all(former: SplitManifest) -> list[LabelledImage]:
    aside = [image for some in former.set_aside.values() for image in some]
    return [*former.train, *former.validation, *former.test, *aside]


def _by_time(
    images: Sequence[LabelledImage], new: Sequence[int], former: SplitManifest, gap_days: float
) -> dict[int, str]:
    """Split of each new image by the former splits' times; between two of them it is set aside if they are apart."""
    train_end = max(p.time or 0.0 for p in former.train)
    validation = [p.time or 0.0 for p in former.validation]
    test_start = min(p.time or 0.0 for p in former.test)
    found = {}
    for row in new:
        moment = images[row].time or 0.0
        if moment <= train_end:
            found[row] = "train"
        elif moment >= test_start:
            found[row] = "test"
        elif moment < min(validation) and gap_days:
            found[row] = "gap" if moment < train_end + gap_days * DAY else "validation"
        elif moment > max(validation) and moment > test_start - gap_days * DAY:
            found[row] = "gap"
        else:
            found[row] = "validation"
    return found
