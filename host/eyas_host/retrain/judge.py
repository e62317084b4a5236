"""Whether the next version is better than the one that serves, on images that neither was trained on.

Two sets tell it: the test images that both know, on which the next one may lose a little at most, and the new images
that were held out, on which it may lose nothing. Both predict every image as a device does, by each bundle's own
decision rule, so that the difference is that of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch

from eyas_device.bundle import Bundle
from eyas_device.decision import decide
from eyas_device.predict import calibrated_probabilities
from eyas_host.data.manifest import SplitManifest
from eyas_host.data.split import Split
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.metrics import PairedLoss, paired_loss
from eyas_host.evaluation.networks import all_logits

MAX_LOSS = 0.01
"""Balanced accuracy that may be lost on the old test images."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What became better or worse."""

    old: PairedLoss | None
    """On the test images that the parent was tested on; null without any."""
    old_images: int
    new: PairedLoss | None
    """On held-out images that the parent never saw; null without any."""
    new_images: int
    problems: tuple[str, ...]
    """Why it is kept out; empty if it is better."""

    @property
    def better(self) -> bool:
        """Whether it may be tried in the parent's place."""
        return not self.problems

    def describe(self) -> Iterator[str]:
        """What was measured, a line each."""
        for what, loss, images in (
            ("old test images", self.old, self.old_images),
            ("new held-out images", self.new, self.new_images),
        ):
            if loss is None:
                yield f"{what}: none"
            else:
                low, high = (-limit for limit in reversed(loss.interval))
                yield f"{what}: {-loss.loss:+.3f} balanced accuracy ({low:+.3f} to {high:+.3f}) on {images}"


def judge(root: Path, parent: Path, parent_split: SplitManifest, *, max_loss: float = MAX_LOSS) -> Judged:
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
        _loss(before, after, images.targets, images.units, chosen) if chosen.any() else None
        for chosen in (is_old, ~is_old)
    )
    problems = []
    if old is not None and old.loss > max_loss:
        problems.append(f"it loses {old.loss:.3f} on the old test images; at most {max_loss:g} is allowed")
    if new is not None and new.loss > 0:
        problems.append(f"it loses {new.loss:.3f} on the new held-out images")
    if new is None:
        problems.append("none of the new images was held out, so that nothing shows that it is better")
    return Judged(
        old=old, old_images=int(is_old.sum()), new=new, new_images=int((~is_old).sum()), problems=tuple(problems)
    )


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


def _loss(before: Floats, after: Floats, targets: Ints, units: Ints, chosen: np.ndarray) -> PairedLoss:
    return paired_loss(before[chosen], after[chosen], targets[chosen], units=units[chosen])
