"""Labels of mixed views, against the pixels of the views."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from eyas_device.preprocess import Preprocessing
from eyas_host.data.transforms import Augmenter
from eyas_host.recipe.augment import AugmentSection

STILL = AugmentSection(
    horizontal_flip=False, rotate_degrees=0.0, crop_scale=1.0, brightness=0.0, contrast=0.0, quarter_turns=False
)
SPEC = Preprocessing(size=32)


@pytest.mark.parametrize(("cutmix", "mixup"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.7, 0.7), (1.0, 1.0)])
def test_a_label_is_the_fraction_of_its_pixels(cutmix: float, mixup: float) -> None:
    """Images of class c are bright in channel c alone, so a view's channel means are the fractions of its classes."""
    targets = np.array([0, 0, 1, 1, 2, 2, 0, 1] * 8)
    images = [np.zeros((32, 32, 3), dtype=np.uint8) for _ in targets]
    for image, target in zip(images, targets, strict=True):
        image[..., target] = 255
    augmenter = Augmenter(msgspec.structs.replace(STILL, cutmix=cutmix, mixup=mixup), SPEC)
    rows = [5, 63, *range(30)]
    views = augmenter.views(images, (0, 5, 2), rows)
    labels = augmenter.labels(targets, 3, (0, 5, 2), rows)
    assert np.abs(views.mean(axis=(1, 2)) / 255 - labels).max() < 0.003  # half a level of a pixel
    assert labels.sum(axis=1) == pytest.approx(1.0)
    mixed = (labels.max(axis=1) < 1.0).sum()
    assert mixed == 0 if cutmix == mixup == 0 else mixed > 8


def test_without_mixing_a_label_is_one_class() -> None:
    targets = np.array([2, 0, 1])
    labels = Augmenter(STILL, SPEC).labels(targets, 3, (0,), [0, 1, 2, 0])
    assert np.array_equal(labels, np.eye(3)[[2, 0, 1, 2]])
