"""Robustness of the shipped artefact: changes of light, focus and view on validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eyas_device.bundle import Bundle
from eyas_host.evaluation import robustness
from eyas_host.evaluation.changes import CHANGES
from eyas_host.evaluation.robustness import changed_examples, measure_robustness, sample_rows
from tests.support import tiny


def test_a_rare_label_is_sampled_as_often_as_a_common_one() -> None:
    targets = np.array([0] * 900 + [1] * 30 + [2] * 70)
    counts = np.bincount(targets[sample_rows(targets, 120)], minlength=3)
    assert counts.tolist() == [45, 30, 45]
    few = sample_rows(np.array([0, 1, 1]), 120)
    assert few.tolist() == [0, 1, 2]


def test_the_table_says_what_a_change_costs_and_whether_a_device_notices(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "_WINDOWS", 10)
    targets = np.repeat(np.arange(len(tiny.LABELS)), 12)
    images = [tiny.draw_shape(tiny.LABELS[label], 1000 + n) for n, label in enumerate(targets)]
    measured = measure_robustness(Bundle.open(pristine_bundle), "litert-int8", images, targets)
    rows = {row.change: row for row in measured.rows}
    assert list(rows) == [change.name for change in CHANGES]
    assert measured.images == len(images)
    assert measured.balanced_accuracy > 0.9
    assert measured.flagged == 0.0
    flat = rows["flat grey"]  # one prediction for all images: chance, and nothing like the training images
    assert flat.balanced_accuracy == pytest.approx(1 / len(tiny.LABELS))
    assert flat.drop == pytest.approx(measured.balanced_accuracy - flat.balanced_accuracy)
    assert flat.flagged == 1.0
    assert flat.reason
    assert flat.confidence is not None
    assert 0 < flat.confidence <= 1


def test_examples_show_each_change_on_a_small_image() -> None:
    examples = changed_examples([np.full((2000, 3000, 3), 200, dtype=np.uint8)])
    assert list(examples) == [change.name for change in CHANGES]
    assert int(examples["light x0.5"].mean()) == 100
    assert all(min(image.shape[:2]) <= 300 for image in examples.values())
    assert changed_examples([]) == {}
