"""Compare the next version with the one that serves, on images that neither was trained on.

Two sets show which is better: the test images that both know, and the new images that were held out. Both predict every
image as a device does, by each bundle's own decision rule, so that the difference is that of pairs; `compare` has the
test, `eyas_host.retrain.outcome` what follows from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from eyas_device.bundle import Bundle
from eyas_device.decision import decide
from eyas_device.predict import calibrated_probabilities
from eyas_host.data.manifest import SplitManifest
from eyas_host.data.split import Split
from eyas_host.evaluation.bootstrap import Floats, Ints, paired_draws
from eyas_host.evaluation.metrics import balanced_mean
from eyas_host.evaluation.networks import all_logits
from eyas_host.retrain.outcome import LEVEL, MAX_LOSS, Compared, Judged, decide_outcome


def compare(
    before: Floats, after: Floats, targets: Ints, *, units: Ints | None = None, level: float = LEVEL
) -> Compared:
    """Compare predictions [n, classes] of two versions, 1 for the predicted label and else 0, with true labels [n].

    The test is that of the paired bootstrap over units, with one more unit against the claim (`paired_draws`): classes
    count alike, and look-alike images count as one. Where one class has one image a unit, `p_better` is the exact test
    of McNemar ("Note on the sampling error of the difference between correlated proportions", 1947) on the images that
    only one of both has right, because P(gamma(gained) < gamma(lost + 1)) = P(Binomial(gained + lost, 1/2) >= gained).

    Args:
        before: Of the parent.
        after: Of the next version.
        targets: Indices of the true labels.
        units: Unit of each image [n]; by default each image is one.
        level: One-sided level of each limit of the interval.

    """
    predicted = before.argmax(axis=1), after.argmax(axis=1)
    gap = (predicted[0] == targets).astype(np.float64) - (predicted[1] == targets)
    lost, gained = (paired_draws(gap, targets, before.shape[1], units=units, adverse=side) for side in (1.0, -1.0))
    gain = -balanced_mean(gap, targets)
    low, high = -float(np.quantile(lost, 1 - level)), -float(np.quantile(gained, level))
    return Compared(
        images=len(targets),
        changed=int(np.count_nonzero(predicted[0] != predicted[1])),
        gain=gain + 0.0,  # no -0
        interval=(min(low, gain), max(high, gain)),
        p_better=float((lost >= 0).mean()),
        p_worse=float((gained <= 0).mean()),
    )


def judge(
    root: Path,
    parent: Path,
    parent_split: SplitManifest,
    *,
    level: float = LEVEL,
    max_loss: float = MAX_LOSS,
    strict: bool = False,
) -> Judged:
    """Compare the bundle of the run at `root` with the bundle `parent`, on the run's test images.

    The access to the test set is logged. Raises what the split and the bundles raise.
    """
    split = Split.load(root)
    images = split.open_test(f"retrain: compared with {parent.name}")
    bundles = Bundle.open(parent), Bundle.open(root / "bundle")
    before, after = (_predictions(bundle, images.pixels, split.labels) for bundle in bundles)
    known = {image.sha256 for image in parent_split.test}
    is_old = np.array([image.sha256 in known for image in images.images], dtype=bool)
    old, new = (
        compare(before[chosen], after[chosen], images.targets[chosen], units=images.units[chosen], level=level)
        if chosen.any()
        else None
        for chosen in (is_old, ~is_old)
    )
    return decide_outcome(old, new, level=level, max_loss=max_loss, strict=strict)


def _predictions(bundle: Bundle, pixels: object, labels: tuple[str, ...]) -> Floats:
    """What devices predict with a bundle: 1 for the predicted label, else 0; [n, classes + 1] in the order of `labels`.

    The last column is for classes that no image has any more.
    """
    manifest = bundle.manifest
    name = next(iter(manifest.use.values()))
    logits = all_logits({}, bundle, pixels, torch.device("cpu"))[name]  # type: ignore[arg-type]
    probabilities = calibrated_probabilities(logits, manifest.confidence)
    predicted = decide(logits, probabilities, manifest.labels, manifest.decision)
    found = np.zeros((len(logits), len(labels) + 1))
    places = np.array([labels.index(label) if label in labels else len(labels) for label in manifest.labels])
    found[np.arange(len(found)), places[predicted]] = 1.0
    return found
