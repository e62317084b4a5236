"""Robustness of the shipped artefact: changes of light, focus and view on validation images."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import REFERENCE, Bundle
from eyas_device.ood import OodJudge
from eyas_device.predict import Classifier
from eyas_host.bundle.reference import fit_reference, write_reference
from eyas_host.evaluation import robustness
from eyas_host.evaluation.changes import CHANGES, light
from eyas_host.evaluation.robustness import changed_examples, measure_robustness, sample_rows
from tests.support import tiny
from tests.support.bundles import edit, entry


@pytest.fixture(scope="module")
def bundle(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small bundle, with a reference as packing fits it."""
    root = shutil.copytree(pristine_bundle, tmp_path_factory.mktemp("robustness") / "bundle")
    shapes = [tiny.draw_shape(tiny.LABELS[number % len(tiny.LABELS)], 5000 + number) for number in range(240)]
    fitted = fit_reference(shapes[:120], shapes[120:], Bundle.open(root).manifest.preprocessing)
    write_reference(fitted, root / REFERENCE)
    return Bundle.open(edit(root, reference=msgspec.to_builtins(entry(root / REFERENCE))))


def test_a_rare_label_is_sampled_as_often_as_a_common_one() -> None:
    targets = np.array([0] * 900 + [1] * 30 + [2] * 70)
    counts = np.bincount(targets[sample_rows(targets, 120)], minlength=3)
    assert counts.tolist() == [45, 30, 45]
    few = sample_rows(np.array([0, 1, 1]), 120)
    assert few.tolist() == [0, 1, 2]


def test_the_table_says_what_a_change_costs_and_whether_a_device_notices(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "_WINDOWS", 10)
    targets = np.repeat(np.arange(len(tiny.LABELS)), 12)
    images = [tiny.draw_shape(tiny.LABELS[label], 1000 + n) for n, label in enumerate(targets)]
    measured = measure_robustness(bundle, "litert-int8", images, targets)
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


def test_windows_are_judged_as_a_device_judges_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some windows are flagged, and not all, each is flagged if a device's own judge says so at any moment."""
    monkeypatch.setattr(robustness, "_WINDOWS", 12)
    generator = np.random.default_rng(3)
    frames = [tiny.draw_shape(tiny.LABELS[n % len(tiny.LABELS)], 2000 + n) for n in range(80)]
    for row in generator.choice(len(frames), 3, replace=False):
        frames[row] = light(frames[row], 0.4)
    judge = OodJudge(bundle)
    with Classifier.load(bundle, artefact="litert-int8") as classifier:
        seen = [judge.observe(frame, classifier.predict(frame).probabilities) for frame in frames]
    observations = [observation for observation in seen if observation is not None]
    zeros = np.zeros(len(observations))
    flagged, reason = robustness._Measured(bundle, observations, zeros.astype(np.int64), zeros).judge()
    draws, reasons = np.random.default_rng(robustness._SEED), list[str]()
    for _ in range(12):
        judge = OodJudge(bundle)
        for row in draws.choice(len(observations), robustness.WINDOW_FRAMES, replace=False):
            judge.add(observations[row])
            judgement = judge.judgement()
            if judgement is not None and judgement.ood:
                reasons.append(judgement.reason)
                break
    assert flagged == len(reasons) / 12
    assert 0 < flagged < 1, "otherwise the comparison says little"
    assert reason == Counter(reasons).most_common(1)[0][0]


def test_examples_show_each_change_on_a_small_image() -> None:
    examples = changed_examples([np.full((2000, 3000, 3), 200, dtype=np.uint8)])
    assert list(examples) == [change.name for change in CHANGES]
    assert int(examples["light x0.5"].mean()) == 100
    assert all(min(image.shape[:2]) <= 300 for image in examples.values())
    assert changed_examples([]) == {}
