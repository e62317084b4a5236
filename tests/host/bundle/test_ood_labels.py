"""Images among those of the predicted label: against scipy, through the file, and where labels look very different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from eyas_device import ood
from eyas_device.bundle import REFERENCE, Bundle, Manifest
from eyas_device.errors import BundleError
from eyas_device.image_statistics import STATISTICS, image_statistics
from eyas_device.ood import NAMES, OF_LABEL, OodJudge, all_statistics, describe, normal_scores, scene_distances
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.reference import LabelStatistics, Reference, reference_arrays
from eyas_host.bundle.ood_labels import fit_labels
from eyas_host.bundle.ood_thresholds import draw_streams
from eyas_host.bundle.ood_thresholds import flagged as flagged_fraction
from eyas_host.bundle.reference import fit_reference, write_reference
from eyas_host.evaluation.changes import CHANGES
from eyas_host.evaluation.ood_streams import observe
from eyas_host.export.manifest import file_entry

SPEC = Preprocessing(size=64)
BY_NAME = {change.name: change for change in CHANGES}
KINDS = ("sky", "code", "leaf", "night")


def scene(kind: str, seed: int) -> Pixels:
    """Four kinds with hardly anything in common: smooth and blue, sharp black on white, green and rough, dark."""
    rng = np.random.default_rng((KINDS.index(kind), seed))
    if kind == "sky":
        ramp = np.linspace(rng.uniform(150, 190), rng.uniform(210, 250), 90)[:, None, None]
        image = ramp * np.array([1.0, 0.85, 0.7]) * np.ones((90, 120, 1))
        cv2.circle(image, (int(rng.integers(20, 100)), int(rng.integers(20, 70))), 15, (230.0, 230.0, 230.0), -1)
    elif kind == "code":
        image = cv2.resize((rng.random((12, 16)) > 0.5) * 255.0, (120, 90), interpolation=cv2.INTER_NEAREST)
        image = np.repeat(image[:, :, None], 3, axis=2)
    elif kind == "leaf":
        image = np.array([40.0, 130.0, 60.0]) * rng.gamma(9.0, 1 / 9, (90, 120, 1))
    else:
        image = np.full((90, 120, 3), 8.0)
        for _ in range(int(rng.integers(3, 8))):
            cv2.circle(image, (int(rng.integers(0, 120)), int(rng.integers(0, 90))), 3, (60.0, 180.0, 220.0), -1)
    return np.asarray(np.clip(image * rng.uniform(0.9, 1.1) + rng.normal(0, 2, image.shape), 0, 255), dtype=np.uint8)


def scenes(count: int, seed: int) -> tuple[list[Pixels], np.ndarray]:
    labels = np.arange(count) % len(KINDS)
    return [scene(KINDS[label], 10_000 * seed + n) for n, label in enumerate(labels)], labels


def sure(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Probabilities of a model that is right, more or less sure."""
    found = np.random.default_rng(seed).uniform(0.0, 0.1, (len(labels), len(KINDS)))
    found[np.arange(len(labels)), labels] += 1.0
    return np.asarray(found / found.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def reference() -> Reference:
    (train, a), (validation, b) = scenes(240, 1), scenes(160, 2)
    groups = (([KINDS[n] for n in a],), ([KINDS[n] for n in b],))
    return fit_reference(train, validation, SPEC, groups=groups, probabilities=sure(b), labels=a)


def bundle_of(root: Path, reference: Reference, **over: Any) -> Bundle:
    arrays = {name: value for name, value in {**reference_arrays(reference), **over}.items() if value is not None}
    with (root / REFERENCE).open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    entry = file_entry(root / REFERENCE, root)
    manifest = Manifest(
        schema=1, name="p", version="1", labels=KINDS, preprocessing=SPEC, artefacts=(), use={}, reference=entry
    )
    return Bundle(root, manifest)


def reason(bundle: Bundle, stream: list[Pixels], labels: np.ndarray) -> str:
    """The first reason that is given while a camera shows these images; empty if none is."""
    judge = OodJudge(bundle)
    for image, probabilities in zip(stream, sure(labels, 3), strict=True):
        judge.measure(image, probabilities)
        if (judged := judge.judgement()) is not None and judged.ood:
            return judged.reason
    return ""


@pytest.mark.parametrize(
    "change",
    ["noise 10", "JPEG quality 10", "red tint", "light x0.5", "dirt 6 px", "zoom x0.5", "rotate 90 degrees", "text"],
)
def test_a_change_that_makes_no_image_unusual_among_all_is_noticed(
    change: str, reference: Reference, tmp_path: Path
) -> None:
    images, labels = scenes(30, 4)
    assert reason(bundle_of(tmp_path, reference), [BY_NAME[change].apply(image) for image in images], labels)


def test_one_page_that_is_called_something_else_is_noticed_and_why(reference: Reference, tmp_path: Path) -> None:
    """One image thirty times: it is usual among all images, and not among those of its label."""
    bundle, code = bundle_of(tmp_path, reference), scene("code", 77)
    assert not reason(bundle, [code] * 30, np.full(30, KINDS.index("code")))
    said = reason(bundle, [code] * 30, np.full(30, KINDS.index("leaf")))
    assert said.endswith("% of the validation images of the same label")


@pytest.mark.parametrize("shown", [1, 2, 5, 30])
@pytest.mark.parametrize("pure", [False, True], ids=["mixed", "one kind"])
def test_unseen_images_are_in_distribution(shown: int, pure: bool, reference: Reference) -> None:
    """At most one per cent of streams are flagged at any moment."""
    images, labels = scenes(200, 3)
    table = reference.table
    assert table is not None and set(OF_LABEL) < set(table.names)
    scores = np.stack([_scores(image, each, reference) for image, each in zip(images, sure(labels, 5), strict=True)])
    pools = [np.flatnonzero(labels == label) for label in range(len(KINDS))] if pure else [np.arange(200)]
    streams = draw_streams(pools, shown, 500, np.random.default_rng(shown))
    seen = observe(streams, scores[streams], scene_distances(scores, table.names), table)
    assert flagged_fraction(seen, table.thresholds.astype(np.float64)) <= 0.01


def _scores(image: Pixels, probabilities: np.ndarray, reference: Reference) -> np.ndarray:
    prepared = prepare(image, SPEC)
    assert reference.table is not None
    values = all_statistics(image_statistics(prepared), describe(prepared), reference, probabilities)
    return normal_scores(values, reference.table)


def test_distances_are_mahalanobis_from_the_mean_of_the_label(reference: Reference) -> None:
    """Second formulation: scipy's distance, numpy's means and covariance."""
    images, labels = scenes(240, 1)
    statistics = np.stack([image_statistics(prepare(image, SPEC)) for image in images])
    fitted = reference.labels
    assert fitted is not None
    standardized = np.empty_like(statistics)
    for label in range(len(KINDS)):
        own = labels == label
        assert np.allclose(fitted.mean[label], statistics[own].mean(axis=0), rtol=1e-4, atol=1e-4)
        standardized[own] = (statistics[own] - statistics[own].mean(axis=0)) / fitted.scale[label]
    m = len(STATISTICS)
    shrunk = 0.9 * np.cov(standardized.T, bias=True) + 0.1 * np.eye(m)
    image = prepare(scene("sky", 9), SPEC)
    values = all_statistics(image_statistics(image), describe(image), reference, np.array([0.9, 0.1, 0.0, 0.0]))
    own = (image_statistics(image) - fitted.mean[0]) / fitted.scale[0]
    wanted = mahalanobis(own, np.zeros(m), np.linalg.inv(shrunk)) / np.sqrt(m)
    assert values[NAMES.index("together_of_label")] == pytest.approx(np.log(wanted), abs=1e-3)
    assert values[NAMES.index("noise_of_label")] == pytest.approx(own[7], abs=1e-3)
    assert np.isnan(
        all_statistics(image_statistics(image), describe(image), reference)[NAMES.index(OF_LABEL[0]) :]
    ).all()


def test_labels_of_few_images_and_none_have_the_variance_within_the_others(reference: Reference) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], [100, 100, 2])
    statistics = rng.normal(size=(202, len(STATISTICS))) * 50 + labels[:, None] * 1000.0
    fitted = fit_labels(statistics, rng.normal(size=(202, reference.mean.size)), labels, 4, reference)
    assert fitted.scale[0] == pytest.approx(50, rel=0.3) and fitted.scale[3] == pytest.approx(60, rel=0.4)
    assert (fitted.scale[2] > 400).all(), "a label without training images can look like any"
    assert all(np.isfinite(value).all() for value in msgspec.structs.asdict(fitted).values())


def test_through_the_file_and_small_enough(reference: Reference, tmp_path: Path) -> None:
    write_reference(reference, tmp_path / "written.npz")
    read = bundle_of(tmp_path, reference).reference()
    assert read is not None and read.labels is not None and reference.labels is not None
    for field in msgspec.structs.fields(LabelStatistics):
        assert np.array_equal(getattr(read.labels, field.name), getattr(reference.labels, field.name)), field.name
    assert (tmp_path / "written.npz").stat().st_size < 120_000


@pytest.mark.parametrize(
    "over",
    [
        {"labels.mean": None},
        {"labels.mean": np.zeros(4)},
        {"labels.scale": np.zeros((4, len(STATISTICS)))},
        {"labels.whitening": np.eye(3)},
        {"labels.centre": np.zeros((4, 2))},
        {"labels.residual": np.zeros(4)},
        {"labels.spread": np.full(30, np.nan)},
    ],
    ids=str,
)
def test_malformed_labels_are_refused(over: dict[str, Any], reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"reference\.npz"):
        bundle_of(tmp_path, reference, **over).reference()


def test_agents_and_references_of_before_and_after_are_understood(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference without labels, and one for other statistics, judge by what is known; so does an older agent."""
    images, labels = scenes(30, 4)
    dark = [BY_NAME["light x0.05"].apply(image) for image in images]
    former = msgspec.structs.replace(reference, labels=None)
    other = {
        "labels.mean": np.zeros((4, 2), np.float32),
        "labels.scale": np.ones((4, 2), np.float32),
        "labels.whitening": np.eye(2, dtype=np.float32),
    }
    for bundle in (bundle_of(tmp_path, former), bundle_of(tmp_path, reference, **other)):
        assert not reason(bundle, images, labels) and reason(bundle, dark, labels)
    monkeypatch.setattr(ood, "NAMES", NAMES[: -len(OF_LABEL)])
    monkeypatch.setattr(ood, "OF_LABEL", ())
    monkeypatch.setattr(ood, "_of_label", lambda *_: np.zeros(0))
    bundle = bundle_of(tmp_path, reference)
    assert not reason(bundle, images, labels) and reason(bundle, dark, labels)
