"""The choice of golden images."""

from __future__ import annotations

import numpy as np

from eyas_host.bundle.golden import golden_rows


def test_golden_images_go_from_low_to_high_confidence_without_the_lowest() -> None:
    confidence = np.linspace(0.5, 1.0, 40)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)[np.random.default_rng(0).permutation(40)]
    rows = golden_rows(probabilities, 6)
    confidence = probabilities.max(axis=1)[rows]
    assert len(set(rows)) == 6
    assert list(confidence) == sorted(confidence)
    assert confidence[0] > 0.54 and confidence[-1] == 1.0
