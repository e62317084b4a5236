"""Calibration of the OOD judgement: quantiles and tails, scenes in a stream, false alarms and what is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import stats

from eyas_device.bundle import REFERENCE, Bundle, Manifest
from eyas_device.image_statistics import image_statistics
from eyas_device.ood import NAMES, OodJudge, all_statistics, describe, normal_scores, novelty, scene_distances
from eyas_device.preprocess import Pixels, Preprocessing, prepare
from eyas_device.reference import Reference, reference_arrays
from eyas_host.bundle.ood_thresholds import draw_streams, exceeded_by, score_quantiles
from eyas_host.bundle.ood_thresholds import flagged as flagged_fraction
from eyas_host.bundle.reference import fit_reference, write_reference
from eyas_host.evaluation.changes import CHANGES
from eyas_host.evaluation.ood_streams import observe
from eyas_host.export.manifest import file_entry

SPEC = Preprocessing(size=64)
BY_NAME = {change.name: change for change in CHANGES}
KINDS = ("bolt", "plate")


def part(kind: str, seed: int) -> Pixels:
    """A part on a conveyor: grey bolts and reddish plates, at varying places, in varying light."""
    rng = np.random.default_rng((KINDS.index(kind), seed))
    image = np.full((90, 120, 3), 70.0)
    x, y = int(rng.integers(35, 85)), int(rng.integers(30, 60))
    if kind == "bolt":
        cv2.circle(image, (x, y), int(rng.integers(12, 22)), (190, 190, 185), -1)
        cv2.circle(image, (x, y), 6, (40, 40, 40), -1)
    else:
        cv2.rectangle(image, (x - 25, y - 15), (x + 25, y + 15), (90, 110, 180), -1)
    image = image * rng.uniform(0.85, 1.15) + rng.normal(0, 4, image.shape)
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)


def parts(count: int, seed: int) -> tuple[list[Pixels], list[str]]:
    kinds = [KINDS[n % 2] for n in range(count)]
    return [part(kind, 10_000 * seed + n) for n, kind in enumerate(kinds)], kinds


def certain(images: Sequence[Pixels], kinds: Sequence[str], seed: int = 0) -> np.ndarray:
    """Probabilities of a model that is right, more or less sure."""
    sure = np.random.default_rng(seed).uniform(0.7, 0.999, len(images))
    return np.stack([[s, 1 - s] if kind == KINDS[0] else [1 - s, s] for s, kind in zip(sure, kinds, strict=True)])


@pytest.fixture(scope="module")
def reference() -> Reference:
    (train, a), (validation, b) = parts(200, 1), parts(160, 2)
    labels = np.array([KINDS.index(kind) for kind in a])
    sure = certain(validation, b)
    return fit_reference(train, validation, SPEC, groups=((a,), (b,)), probabilities=sure, labels=labels)


@pytest.fixture(scope="module")
def bundle(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundle")
    write_reference(reference, root / REFERENCE)
    entry = file_entry(root / REFERENCE, root)
    return Bundle(
        root,
        Manifest(
            schema=1, name="p", version="1", labels=KINDS, preprocessing=SPEC, artefacts=(), use={}, reference=entry
        ),
    )


def flagged(bundle: Bundle, stream: Sequence[Pixels], probabilities: np.ndarray | None = None) -> str:
    """The first reason that is given while a camera shows these images; empty if none is."""
    judge = OodJudge(bundle)
    for number, image in enumerate(stream):
        judge.measure(image, None if probabilities is None else probabilities[number])
        if (judged := judge.judgement()) is not None and judged.ood:
            return judged.reason
    return ""


def test_scores_of_gaussian_values_are_standardized() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 20_000)
    quantiles = score_quantiles(values, 0.01)
    scores = np.interp([5.0, 7.0, 1.0, 10.0], quantiles, _scores(quantiles))
    assert scores == pytest.approx([0.0, 1.0, -2.0, 2.5], abs=0.06)
    assert np.interp(5 + 2 * 4.0, quantiles, _scores(quantiles)) == pytest.approx(3.6, abs=0.4), "the tail is heavier"


def test_the_tail_of_exponential_values_is_theirs() -> None:
    """Second formulation: scipy's exact survival function."""
    values = np.random.default_rng(1).exponential(3.0, 4_000)
    quantiles = score_quantiles(values, 0.01)
    for x in (15.0, 25.0, 40.0):
        wanted = stats.norm.isf(stats.expon.sf(x, scale=3.0))
        assert np.interp(x, quantiles, _scores(quantiles)) == pytest.approx(wanted, abs=0.15)


def _scores(quantiles: np.ndarray) -> np.ndarray:
    from eyas_host.bundle import ood_thresholds

    assert len(quantiles) == len(ood_thresholds._SCORES)
    return np.asarray(ood_thresholds._SCORES)


@pytest.mark.parametrize("values", [np.zeros(50), np.ones(1), np.array([0.0] * 99 + [1.0]), np.arange(5.0)])
def test_constant_few_and_lumped_values_have_ascending_quantiles(values: np.ndarray) -> None:
    quantiles = score_quantiles(values, 0.5)
    assert (np.diff(quantiles) >= 0).all() and np.isfinite(quantiles).all()
    assert np.interp(np.median(values) + 0.5, quantiles, _scores(quantiles)) <= 1.0 + 1e-9, "finer than its resolution"


def test_rare_values_are_extrapolated() -> None:
    values = np.random.default_rng(2).exponential(1.0, 3_000)
    assert exceeded_by(values, 0.05) == pytest.approx(-np.log(0.05), rel=0.05)
    assert exceeded_by(values[:150], 0.001) == pytest.approx(-np.log(0.001), rel=0.25)
    assert exceeded_by(np.ones(10), 0.003) == 1.0


def test_scenes_are_counted_by_the_nearest_earlier_image() -> None:
    """Second formulation: the loops."""
    scores = np.random.default_rng(3).normal(size=(30, len(NAMES)))
    scores[10:20] = scores[3] + 1e-3
    distances, distinct = scene_distances(scores, NAMES), 5.0
    derived = ("layout", "details", "certainty")
    pixels = [n for n, name in enumerate(NAMES) if name not in derived and not name.endswith("_of_label")]
    count = 0.0
    for i in range(30):
        nearest = min(
            (sum((scores[i, n] - scores[j, n]) ** 2 for n in pixels) ** 0.5 for j in range(i)), default=np.inf
        )
        count += min(1.0, max(0.0, 2 * nearest / distinct - 1))
    assert novelty(distances, distinct).sum() == pytest.approx(count)
    assert novelty(distances, distinct)[10:20].sum() == 0


@pytest.mark.parametrize("scenes", [1, 2, 7, 30])
def test_streams_have_the_scenes_and_runs_that_were_asked_for(scenes: int) -> None:
    streams = draw_streams([np.arange(100), np.arange(100, 200)], scenes, 50, np.random.default_rng(0))
    assert streams.shape == (50, 30)
    for stream in streams:
        assert len(set(stream.tolist())) == scenes == 1 + (np.diff(stream) != 0).sum()
        assert (stream < 100).all() or (stream >= 100).all(), "from two pools"


@pytest.fixture(scope="module")
def unseen(reference: Reference) -> np.ndarray:
    """Scores [200, names] of images that were neither trained nor calibrated on, the kinds in turns."""
    images, kinds = parts(200, 3)
    table = reference.table
    assert table is not None
    scores = []
    for image, probabilities in zip(images, certain(images, kinds, 5), strict=True):
        prepared = prepare(image, SPEC)
        values = all_statistics(image_statistics(prepared), describe(prepared), reference, probabilities)
        scores.append(normal_scores(values, table))
    return np.stack(scores)


@pytest.mark.parametrize("scenes", [1, 2, 5, 30])
@pytest.mark.parametrize("pure", [False, True], ids=["mixed", "one kind"])
def test_unseen_images_are_in_distribution(scenes: int, pure: bool, unseen: np.ndarray, reference: Reference) -> None:
    """At most one per cent of streams are flagged at any moment."""
    table = reference.table
    assert table is not None
    pools = [np.arange(0, 200, 2), np.arange(1, 200, 2)] if pure else [np.arange(200)]
    streams = draw_streams(pools, scenes, 1000, np.random.default_rng(scenes))
    seen = observe(streams, unseen[streams], scene_distances(unseen, table.names), table)
    assert flagged_fraction(seen, table.thresholds.astype(np.float64)) <= 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("light x0.5", "darker than"),
        ("light x0.3", "darker than"),
        ("light x0.05", "darker than"),
        ("light x2", "brighter than"),
        ("blur 8 px", "blurrier than"),
        ("blur 20 px", "blurrier than"),
        ("noise 30", "noisier than"),
        ("red tint", "redder than"),
        ("blue tint", "bluer than"),
        ("negative", "than"),
        ("half covered", "than"),
        ("flat grey", "than"),
        ("flat white", "brighter than"),
        ("text", "brighter than"),
        ("zoom x2", "than"),
    ],
)
def test_a_changed_camera_is_noticed_within_thirty_images_and_says_how(change: str, words: str, bundle: Bundle) -> None:
    images, _ = parts(30, 4)
    reason = flagged(bundle, [BY_NAME[change].apply(image) for image in images])
    assert words in reason and reason.endswith(" images")


def test_what_a_fixed_view_can_notice(bundle: Bundle) -> None:
    """One scene thirty times is one image: near darkness and a wall are seen, half the light is not."""
    image = part("bolt", 77)
    assert not flagged(bundle, [image] * 60)
    assert "darker than" in flagged(bundle, [BY_NAME["light x0.05"].apply(image)] * 30)
    assert flagged(bundle, [np.full_like(image, 250)] * 30)


def test_a_model_that_guesses_is_noticed(bundle: Bundle) -> None:
    images, kinds = parts(30, 4)
    uncertain = 0.5 + 0.002 * (certain(images, kinds) - 0.5)
    reason = flagged(bundle, images, uncertain)
    assert reason.startswith("with less certain predictions than 9") and reason.endswith("% of the validation images")


def test_the_judgement_does_not_flap_and_comes_back(bundle: Bundle) -> None:
    """Light that falls slowly and returns: two changes of the judgement, not more."""
    images, _ = parts(200, 6)
    judge, judged = OodJudge(bundle), []
    for number, image in enumerate(images):
        light = 1.0 - 0.6 * np.sin(np.pi * number / 200) ** 2 * (number < 150)
        judge.measure((image * light).astype(np.uint8))
        judgement = judge.judgement()
        assert judgement is not None
        judged.append(judgement.ood)
        assert bool(judgement.reason) == judgement.ood
    turns = np.flatnonzero(np.diff(np.asarray(judged, dtype=int)))
    assert len(turns) == 2 and not judged[-1], turns


def test_statistics_of_tomorrow_and_missing_ones_are_ignored(
    reference: Reference, bundle: Bundle, tmp_path: Path
) -> None:
    import msgspec

    table = reference.table
    assert table is not None
    keep = [n for n, name in enumerate(table.names) if name in ("brightness", "sharpness")]
    other = msgspec.structs.replace(
        table,
        names=("brightness", "smell", "sharpness"),
        quantiles=table.quantiles[[keep[0], 3, keep[1]]],
        low=table.low[[keep[0], 3, keep[1]]],
        high=table.high[[keep[0], 3, keep[1]]],
    )
    with (tmp_path / REFERENCE).open("wb") as stream:
        np.savez(stream, **reference_arrays(msgspec.structs.replace(reference, table=other)))
    changed = Bundle(tmp_path, bundle.manifest)
    images, _ = parts(30, 4)
    assert not flagged(changed, images)
    assert "darker than" in flagged(changed, [BY_NAME["light x0.3"].apply(image) for image in images])


@pytest.mark.parametrize(
    "over",
    [
        {"table.names": None},
        {"table.names": np.array(["x"])},
        {"table.names": np.zeros(len(NAMES))},
        {"table.scores": np.zeros(33)},
        {"table.quantiles": np.full((len(NAMES), 33), np.nan)},
        {"table.quantiles": -np.arange(33.0)[None] * np.ones((len(NAMES), 1))},
        {"table.distinct": 0.0},
        {"table.thresholds": np.zeros(12)},
        {"table.effective": np.arange(3.0)},
        {"table.low": np.full(len(NAMES), 50.0)},
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(
    over: dict[str, object], reference: Reference, bundle: Bundle, tmp_path: Path
) -> None:
    from eyas_device.errors import BundleError

    arrays = {name: value for name, value in {**reference_arrays(reference), **over}.items() if value is not None}
    with (tmp_path / REFERENCE).open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"reference\.npz"):
        Bundle(tmp_path, bundle.manifest).reference()


@pytest.mark.parametrize(("train", "validation"), [(12, 4), (40, 20), (3, 2)])
def test_small_sets_are_calibrated_too(train: int, validation: int, tmp_path: Path, bundle: Bundle) -> None:
    fitted = fit_reference(parts(train, 1)[0], parts(validation, 2)[0], SPEC)
    assert fitted.table is not None and np.isfinite(fitted.table.thresholds).all()
    write_reference(fitted, tmp_path / REFERENCE)
    small = Bundle(tmp_path, bundle.manifest)
    assert "darker than" in flagged(small, [BY_NAME["light x0.05"].apply(p) for p in parts(30, 4)[0]])
