"""What a device's judge of unusual images sees of many streams of images at once, at each moment.

The same arithmetic as `eyas_device.ood.judge_scores`, for calibration and for reports.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eyas_device.ood import HISTORY, MIN_IMAGES, deviations, novelty
from eyas_device.reference import ScoreTable

Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]


class Streams(NamedTuple):
    """Deviation and number of different scenes of each stream at each moment, both float64 [streams, moments]."""

    scenes: Values
    deviation: Values


def observe(streams: Rows, scores: Values, distances: Values, table: ScoreTable) -> Streams:
    """What a device sees at each moment from the fifth image on.

    `streams` are images [streams, 30], `scores` their scores [streams, 30, names], `distances` those of all images.
    """
    among = distances[streams[:, :, None], streams[:, None, :]]
    scenes = np.cumsum(novelty(among, table.distinct), axis=1)
    means = np.cumsum(scores, axis=1) / np.arange(1, HISTORY + 1)[None, :, None]
    return Streams(scenes[:, MIN_IMAGES - 1 :], deviations(means, table).max(axis=-1)[:, MIN_IMAGES - 1 :])
