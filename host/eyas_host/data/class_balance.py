"""Class balance: how many images of each class there are, and what to do where they are few, uneven or in doubt."""

from __future__ import annotations

from eyas_host.data.split import PARTS, SplitManifest

FEW = 20
"""Training images of a class below which its figures are mostly chance."""
UNEVEN = 10.0
"""Largest class over smallest from which training leans to the large one."""


def balance(manifest: SplitManifest) -> dict[str, dict[str, float]]:
    """Label -> its images in each part, in all, and its share of all."""
    whole = {label: sum(manifest.counts[part].get(label, 0) for part in PARTS) for label in manifest.labels}
    total = sum(whole.values())
    return {
        label: {part: manifest.counts[part].get(label, 0) for part in PARTS}
        | {"all": whole[label], "share": whole[label] / total}
        for label in manifest.labels
    }


def ratio(manifest: SplitManifest) -> float:
    """Training images of the largest class over those of the smallest."""
    counts = manifest.counts["train"]
    return max(counts.values()) / min(counts.values())


def summary(manifest: SplitManifest) -> str:
    """One line: sizes of the parts, balance of the classes, what was kept together or left out."""
    sizes = {part: sum(manifest.counts[part].values()) for part in PARTS}
    words = [
        f"{sum(sizes.values())} images, {len(manifest.labels)} classes ({ratio(manifest):.1f} : 1): "
        + ", ".join(f"{count} {part}" for part, count in sizes.items())
    ]
    if manifest.groups:
        words.append(f"{sum(manifest.groups.values())} groups")
    if manifest.clusters:
        words.append(
            f"{sum(map(len, manifest.clusters))} near-duplicates in {len(manifest.clusters)} clusters kept together"
        )
    if manifest.copies:
        words.append(f"{manifest.copies} exact copies dropped")
    words += [f"{len(images)} set aside ({why})" for why, images in manifest.set_aside.items()]
    if manifest.unreadable:
        words.append(f"{len(manifest.unreadable)} unreadable left out")
    return "; ".join(words)


def warnings(manifest: SplitManifest) -> list[str]:
    """What there is to fear of the counts and labels, each with its remedy."""
    counts = manifest.counts["train"]
    found = [
        f"class {label!r} has {count} training images: figures about it are mostly chance; collect at least {FEW}"
        for label, count in counts.items()
        if count < FEW
    ]
    if ratio(manifest) >= UNEVEN:
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        found.append(
            f"{ratio(manifest):.0f} training images of {most!r} for each of {least!r}: collect more of {least!r}, "
            "keep [teacher] class_weights = true, judge by balanced accuracy"
        )
    return found + _doubtful_labels(manifest)


def _doubtful_labels(manifest: SplitManifest) -> list[str]:
    images = {p.sha256: p for part in PARTS for p in getattr(manifest, part)}
    clusters = [[images[sha] for sha in cluster if sha in images] for cluster in manifest.clusters]
    mixed = [cluster for cluster in clusters if len({p.label for p in cluster}) > 1]
    if not mixed:
        return []
    one = mixed[0][0]
    two = next(p for p in mixed[0] if p.label != one.label)
    return [
        f"{len(mixed)} cluster{'s' * (len(mixed) > 1)} of near-duplicates with more than one label, e.g. {one.path} "
        f"({one.label}) and {two.path} ({two.label}): look at them in split/index.csv"
    ]
