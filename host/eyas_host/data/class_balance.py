"""Class balance: images per class, and warnings about small, unbalanced or contradictory classes."""

from __future__ import annotations

from collections.abc import Mapping

from eyas_host.data.keep import kept_warnings
from eyas_host.data.manifest import SPLITS, SplitManifest

MIN_IMAGES = 20
"""Training images of a class below which its metrics are mostly chance."""
_SHOWN = 6
MAX_RATIO = 10.0
"""Largest over smallest class from which training favours the large one."""


def balance(manifest: SplitManifest) -> dict[str, dict[str, float]]:
    """Label -> number of images in each split and in total, and the fraction of all images."""
    totals = {label: sum(manifest.counts[split].get(label, 0) for split in SPLITS) for label in manifest.labels}
    return {
        label: {split: manifest.counts[split].get(label, 0) for split in SPLITS}
        | {"all": totals[label], "share": totals[label] / sum(totals.values())}
        for label in manifest.labels
    }


def ratio(manifest: SplitManifest) -> float:
    """Training images of the largest class divided by those of the smallest."""
    counts = manifest.counts["train"]
    return max(counts.values()) / min(counts.values())


def summary(manifest: SplitManifest) -> str:
    """One line: sizes of the splits, class balance, and what was kept together or left out."""
    sizes = {split: sum(manifest.counts[split].values()) for split in SPLITS}
    facts = [
        f"{sum(sizes.values())} images, {len(manifest.labels)} classes ({ratio(manifest):.1f} : 1): "
        + ", ".join(f"{count} {split}" for split, count in sizes.items())
    ]
    if manifest.kept is not None:
        facts.append(f"{manifest.kept.images} kept from a former split, {manifest.kept.new} new")
    if manifest.groups:
        facts.append(f"{sum(manifest.groups.values())} groups")
    if manifest.clusters:
        facts.append(
            f"{sum(map(len, manifest.clusters))} near-duplicates in {len(manifest.clusters)} clusters kept together"
        )
    if manifest.copies:
        facts.append(f"{manifest.copies} exact copies dropped")
    facts += [f"{len(images)} set aside ({why})" for why, images in manifest.set_aside.items()]
    if manifest.unreadable:
        facts.append(f"{manifest.unreadable} unreadable left out")
    return "; ".join(facts)


def warnings(manifest: SplitManifest) -> list[str]:
    """Warnings about class counts and labels, each with a remedy."""
    counts = manifest.counts["train"]
    few = {label: count for label, count in counts.items() if count < MIN_IMAGES}
    found = [_small_classes(few)] if few else []
    if ratio(manifest) >= MAX_RATIO:
        large, small = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        found.append(
            f"{ratio(manifest):.0f} training images of {large!r} for each of {small!r}: collect more of {small!r}, "
            "keep [teacher] class_weights = true, judge by balanced accuracy"
        )
    kept = kept_warnings(manifest.kept) if manifest.kept is not None else []
    return kept + found + _label_conflicts(manifest) + _unjoined_clusters(manifest)


def _small_classes(counts: Mapping[str, int]) -> str:
    """One line for all of them."""
    if len(counts) == 1:
        label, count = next(iter(counts.items()))
        return (
            f"class {label!r} has {count} training images: its metrics are mostly chance; collect at least {MIN_IMAGES}"
        )
    shown = ", ".join(f"{label!r} {count}" for label, count in [*counts.items()][:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return (
        f"{len(counts)} classes have fewer than {MIN_IMAGES} training images ({shown}{more}): their metrics are mostly "
        f"chance; collect at least {MIN_IMAGES} of each"
    )


def _label_conflicts(manifest: SplitManifest) -> list[str]:
    images = {p.sha256: p for split in SPLITS for p in getattr(manifest, split)}
    clusters = [[images[sha] for sha in cluster if sha in images] for cluster in manifest.clusters]
    mixed = [cluster for cluster in clusters if len({p.label for p in cluster}) > 1]
    if not mixed:
        return []
    one = mixed[0][0]
    two = next(p for p in mixed[0] if p.label != one.label)
    return [
        f"{len(mixed)} cluster{'s' * (len(mixed) > 1)} of near-duplicates with more than one label, e.g. {one.path} "
        f"({one.label}) and {two.path} ({two.label}): `eyas labels check RECIPE` shows them"
    ]


def _unjoined_clusters(manifest: SplitManifest) -> list[str]:
    """What was found alike and may lie in several splits all the same."""
    if not manifest.unjoined:
        return []
    images = {p.sha256: p for split in SPLITS for p in getattr(manifest, split)}
    images |= {p.sha256: p for some in manifest.set_aside.values() for p in some}
    largest = max(manifest.unjoined, key=lambda cluster: len(cluster.images))
    one, two = (images[sha].path for sha in largest.images[:2])
    several = len(manifest.unjoined) > 1
    return [
        f"{len(manifest.unjoined)} cluster{'s' * several} of images that look alike "
        f"{'were' if several else 'was'} not kept in one split; the largest, of {len(largest.images)}, {largest.why} "
        f"(e.g. {one} and {two}). That is right for one camera that sees a new part in each image; where several "
        "images show the same part, give them a group (source = 'csv')"
    ]
