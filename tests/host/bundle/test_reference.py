"""The OOD reference of the training images: against a second formulation, and through the file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import Bundle
from eyas_device.ood import describe, distance, ood_quantile
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.reference import Reference
from eyas_host.bundle.reference import fit_reference, write_reference

SPEC = Preprocessing(size=48)


def scenes(count: int, seed: int, *, bright: int = 60) -> list[Pixels]:
    """A bright bar on a dark ground, where a camera would see it: a little to the left or right, in some noise."""
    images = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        image = np.full((60, 80, 3), bright, np.uint8)
        left = 30 + int(rng.integers(-6, 7))
        image[10:50, left : left + 12] = 200
        images.append(np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8))
    return images


@pytest.fixture(scope="module")
def reference() -> Reference:
    return fit_reference(scenes(120, 1), scenes(80, 2), SPEC)


def test_components_are_eigenvectors_of_the_covariance(reference: Reference) -> None:
    features = np.stack([describe(prepare(p, SPEC)) for p in scenes(120, 1)]).astype(np.float64)
    standardized = (features - features.mean(axis=0)) / reference.scale
    values, vectors = np.linalg.eigh(standardized.T @ standardized / len(standardized))
    k = len(reference.components)
    assert k == 120 // 8
    assert np.allclose(np.square(reference.spread), values[::-1][:k], rtol=0.02, atol=0.01)
    overlap = np.abs(vectors[:, ::-1][:, :3].T @ reference.components[:3].T)
    assert np.allclose(np.diag(overlap), 1.0, atol=1e-3)
    assert reference.residual == pytest.approx(values[::-1][k:].mean(), rel=0.02), "it is not the mean per dimension"


def test_validation_is_in_distribution_and_another_scene_is_not(reference: Reference) -> None:
    def median_quantile(images: list[Pixels]) -> float:
        distances = [distance(describe(prepare(p, SPEC)), reference) for p in images]
        return ood_quantile(float(np.median(distances)), reference)

    assert 0.2 < median_quantile(scenes(30, 3)) < 0.8
    assert median_quantile(scenes(30, 3, bright=190)) > 0.95
    assert median_quantile([np.rot90(p).copy() for p in scenes(30, 3)]) > 0.95
    assert list(reference.distances) == sorted(reference.distances)


def test_few_images_give_a_reference_too() -> None:
    tiny = fit_reference(scenes(3, 1), scenes(2, 2), SPEC)
    assert len(tiny.components) == 1
    assert np.isfinite(distance(describe(prepare(scenes(1, 9)[0], SPEC)), tiny))


def test_many_distances_are_thinned_evenly() -> None:
    reference = fit_reference(scenes(40, 1), scenes(700, 2), SPEC)
    assert len(reference.distances) == 512
    assert ood_quantile(float(np.median(reference.distances)), reference) == pytest.approx(0.5, abs=0.01)


def test_through_the_file(reference: Reference, tmp_path: Path) -> None:
    write_reference(reference, tmp_path / "reference.npz")
    manifest = msgspec.convert({"reference": {"path": "reference.npz", "sha256": "", "size_bytes": 0}}, _Named)
    read = Bundle(tmp_path, manifest).reference()  # type: ignore[arg-type]
    assert read is not None and read.table is not None and reference.table is not None
    for ours, theirs in ((reference, read), (reference.table, read.table)):
        for field in msgspec.structs.fields(type(ours)):
            value = getattr(ours, field.name)
            if field.name == "names":
                assert getattr(theirs, field.name) == value
            elif field.name not in ("table", "labels", "predictions"):
                assert np.allclose(getattr(theirs, field.name), value, rtol=1e-6), field.name


class _Named(msgspec.Struct):
    reference: _Entry


class _Entry(msgspec.Struct):
    path: str
    sha256: str
    size_bytes: int
