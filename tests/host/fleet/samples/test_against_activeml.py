"""The choice of samples beside scikit-activeml's strategies on random predictions: the same picks, the same ranks."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skactiveml.pool import CoreSet, uncertainty_scores

from eyas_host.fleet.samples.choose import choose, uncertainty
from eyas_host.fleet.samples.records import Sample
from tests.support.fleet_parts import event

SPOOL = "0b7f9a1e-4a1c-4a41-9d11-2f6f7f3a1101"
TOP = ("ab", "bb", "cb", "db", "eb")
"""Labels whose places in the features differ: sums of their letters, modulo 16."""
Floats = npt.NDArray[np.float64]


def drawn(count: int, seed: int) -> Floats:
    """Probabilities of five labels, [count, 5]."""
    return np.random.default_rng(seed).dirichlet(np.full(len(TOP), 0.7), count)


def sent(probabilities: Floats, shades: Sequence[int] | None = None) -> list[Sample]:
    """A sample of each row, each from a device of its own, and of a label of its own, so that no quota binds."""
    found = []
    for number, row in enumerate(probabilities):
        ordered = np.sort(row)[::-1]
        one = event(
            f"cam-{number}",
            SPOOL,
            number,
            label=f"label-{number}",
            confidence=float(ordered[0]),
            margin=float(ordered[0] - ordered[1]),
            top=dict(zip(TOP, row.tolist(), strict=True)),
            image="" if shades is None else flat(shades[number]),
        )
        found.append(Sample(event=one, site="hall"))
    return found


def flat(shade: int) -> str:
    """An image of one grey level, which JPEG keeps."""
    data = cv2.imencode(".jpg", np.full((64, 64, 3), shade, np.uint8))[1]
    return base64.b64encode(data.tobytes()).decode()


def picks(chosen: Sequence[Sample]) -> list[int]:
    return [sample.event.sequence for sample in chosen]


@pytest.mark.parametrize("with_images", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_k_centre_picks_what_core_set_picks(seed: int, with_images: bool) -> None:
    """One sample in four is picked, so that all are candidates; the first is the least sure one for both."""
    count = 30
    probabilities = drawn(4 * count, seed)
    shades = np.random.default_rng(seed).integers(0, 256, len(probabilities))
    features = probabilities / 2
    if with_images:  # 192 values of one grey level, which together weigh as one dimension
        features = np.column_stack([features, shades / 255])
    first = int(uncertainty_scores(probabilities, method="margin_sampling").argmax())
    labels = np.full(len(features), np.nan)
    labels[first] = 0
    expected = CoreSet(random_state=0).query(features, labels, batch_size=count - 1)
    chosen = choose(sent(probabilities, shades.tolist() if with_images else None), count, random_share=0.0)
    assert picks(chosen) == [first, *expected.tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_only_the_least_sure_by_margin_are_candidates(seed: int) -> None:
    probabilities, count = drawn(400, seed), 20
    samples = sent(probabilities)
    scores = uncertainty_scores(probabilities, method="margin_sampling")
    assert [uncertainty(sample) for sample in samples] == pytest.approx(scores.tolist())
    least_sure = np.argsort(-scores)[: 4 * count]
    labels = np.full(len(probabilities), np.nan)
    labels[least_sure[0]] = 0
    expected = CoreSet(random_state=0).query(
        probabilities / 2, labels, candidates=np.sort(least_sure[1:]), batch_size=count - 1
    )
    assert picks(choose(samples, count, random_share=0.0)) == [int(least_sure[0]), *expected.tolist()]
