"""Remember what a bundle recorded of its validation images, for estimates and rules."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eyas_device.bundle import Bundle
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.estimate import ModelReference
from eyas_host.fleet.drift.measures import most_frequent
from eyas_host.fleet.drift.records import DriftRecords
from eyas_host.fleet.store.database import Store

_DIGITS = 12


def remember(store: Store, folder: Path) -> str:
    """Store the reference of a bundle, and say so in a line.

    Raises:
        BundleError: The folder is no bundle, or it is damaged.
        DriftError: It has no reference of predictions.

    """
    bundle = Bundle.open(folder)
    reference, labels = bundle.reference(), bundle.manifest.labels
    found = None if reference is None else reference.predictions
    if found is None or len(found.bins) != len(labels):
        raise DriftError(
            f"{folder}: the bundle does not say what it predicted for its validation images; pack it again"
        )
    recorded = ModelReference(
        labels=labels,
        bins=tuple(tuple(row) for row in found.bins.tolist()),
        right=tuple(tuple(row) for row in found.right.tolist()),
        confidence_sum=tuple(found.confidence_sum.tolist()),
    )
    model = f"{bundle.manifest.name} {bundle.manifest.version}"
    followed = most_frequent(dict(zip(labels, found.bins.sum(axis=1).tolist(), strict=True)))
    digest = bundle.identity[:_DIGITS]
    DriftRecords(store).set_reference(digest, model, followed, msgspec.json.encode(recorded).decode())
    return f"{model}: {recorded.images:.0f} validation images, accuracy {recorded.accuracy:.3f}"
