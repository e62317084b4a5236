"""`reference.npz`: what a bundle's training images look like, for out-of-distribution detection.

Arrays are read by name and others are ignored, so that older agents read newer references and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_TABLE = "table."
"""Prefix of the arrays of a `ScoreTable`."""
_PREDICTIONS = "predictions."
"""Prefix of the arrays of `PredictionStatistics`."""
_LABELS = "labels."
"""Prefix of the arrays of `LabelStatistics`."""
_MAX_NAME = 64


class ScoreTable(msgspec.Struct, frozen=True):
    """What is usual for each named statistic of an image, and how far a camera's images may be from it.

    A statistic's value becomes a normal score: the quantile of a standard normal distribution at the fraction of images
    with a lower value. m statistics, s scores, k numbers of images.
    """

    names: tuple[str, ...]
    """[m]; an agent ignores those that it does not know."""
    scores: Floats
    """float32 [s], ascending: the normal scores of `quantiles`."""
    quantiles: Floats
    """float32 [m, s], ascending: the value of each statistic at each score."""
    low: Floats
    """float32 [m]: lowest mean score of a known sub-population (label, stratum, group)."""
    high: Floats
    """float32 [m]: highest one."""
    distinct: float
    """Distance in scores from which two images show different scenes."""
    effective: Floats
    """float32 [k], ascending: numbers of different scenes among a camera's images."""
    thresholds: Floats
    """float32 [k], above 0: largest distance of a mean score from `low`..`high` for that many scenes."""


class LabelStatistics(msgspec.Struct, frozen=True):
    """What the training images of each label look like: c labels, m statistics of `image_statistics`, descriptors d."""

    mean: Floats
    """float32 [c, m]: mean of each statistic."""
    scale: Floats
    """float32 [c, m], above 0: its standard deviation."""
    whitening: Floats
    """float32 [m, m]: makes the standardized statistics of the images of a label uncorrelated."""
    centre: Floats
    """float32 [c, d]: mean of the standardized descriptors."""
    components: Floats
    """float32 [k, d]: principal directions about the labels' means."""
    spread: Floats
    """float32 [k], above 0: standard deviation along each."""
    residual: Floats
    """float32 [c], above 0: mean squared residual outside the principal directions, per dimension."""


class PredictionStatistics(msgspec.Struct, frozen=True):
    """What the model predicted for the validation images: c labels, in bins of confidence as those of a window."""

    bins: Floats
    """float32 [c, 10]: predictions of each label, per bin of confidence between `CONFIDENCE_EDGES`."""
    right: Floats
    """float32 [c, 10]: those of them that are right."""
    confidence_sum: Floats
    """float32 [c]: sum of the calibrated confidences of the predictions of each label."""


class Reference(msgspec.Struct, frozen=True):
    """Gaussian model of the training images' descriptors (length d), for `eyas_device.ood`."""

    mean: Floats
    """float32 [d]"""
    scale: Floats
    """float32 [d], above 0: standard deviation of each element; descriptors are divided by it first."""
    components: Floats
    """float32 [k, d]: principal directions."""
    spread: Floats
    """float32 [k], above 0: standard deviation along each."""
    residual: float
    """Mean squared residual outside the principal directions, above 0: per dimension, in older bundles their sum."""
    distances: Floats
    """float32 [n], ascending: distances of the validation images."""
    table: ScoreTable | None = None
    """None in bundles of before: the distances alone judge a camera."""
    labels: LabelStatistics | None = None
    """None in bundles of before: no image is compared with those of its predicted label."""
    predictions: PredictionStatistics | None = None
    """None in bundles of before: nobody knows then what was usual on the validation images."""


def reference_arrays(reference: Reference) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `reference.npz`."""
    values = {field.name: getattr(reference, field.name) for field in msgspec.structs.fields(Reference)}
    parts = {_TABLE: "table", _LABELS: "labels", _PREDICTIONS: "predictions"}
    for prefix, part in [(prefix, values.pop(name)) for prefix, name in parts.items()]:
        if part is not None:
            values |= {prefix + name: value for name, value in msgspec.structs.asdict(part).items()}
    return {name: np.asarray(value) for name, value in values.items()}


def read_reference(data: Mapping[str, npt.NDArray[Any]]) -> Reference | None:
    """The reference that arrays hold; None if they are malformed."""
    arrays = _floats(data, Reference, "")
    if not {"mean", "scale", "components", "spread", "residual", "distances"} <= set(arrays) or not _is_gaussian(
        arrays
    ):
        return None
    table = None
    if any(name.startswith(_TABLE) for name in data):
        table = _read_table(data)
        if table is None:
            return None
    labels = None
    if any(name.startswith(_LABELS) for name in data):
        labels = _read_labels(data, len(arrays["mean"]))
        if labels is None:
            return None
    predictions = None
    if any(name.startswith(_PREDICTIONS) for name in data):
        predictions = _read_predictions(data)
        if predictions is None:
            return None
    more: dict[str, Any] = {"table": table, "labels": labels, "predictions": predictions}
    return Reference(**{**arrays, "residual": float(arrays["residual"]), **more})


def _floats(data: Mapping[str, npt.NDArray[Any]], kind: type[msgspec.Struct], prefix: str) -> dict[str, Floats]:
    """The arrays of floats for the fields of `kind`."""
    names = [field.name for field in msgspec.structs.fields(kind)]
    found = {name: data[prefix + name] for name in names if prefix + name in data}
    return {name: array.astype(np.float32) for name, array in found.items() if array.dtype.kind == "f"}


def _read_table(data: Mapping[str, npt.NDArray[Any]]) -> ScoreTable | None:
    arrays = _floats(data, ScoreTable, _TABLE)
    given = data.get(_TABLE + "names")
    if given is None or given.dtype.kind != "U" or given.ndim != 1 or len(arrays) != 7:
        return None
    names = tuple(str(name) for name in given)
    m, s, k = len(names), arrays["scores"].size, arrays["effective"].size
    shapes = {
        "scores": (s,),
        "quantiles": (m, s),
        "low": (m,),
        "high": (m,),
        "distinct": (),
        "effective": (k,),
        "thresholds": (k,),
    }
    if not (m and k and s >= 2) or any(arrays[name].shape != shape for name, shape in shapes.items()):
        return None
    if not all(np.isfinite(array).all() for array in arrays.values()) or any(len(name) > _MAX_NAME for name in names):
        return None
    ascending = all((np.diff(arrays[name]) > 0).all() for name in ("scores", "effective"))
    if not ascending or (np.diff(arrays["quantiles"]) < 0).any() or (arrays["low"] > arrays["high"]).any():
        return None
    if not (arrays["distinct"] > 0 and (arrays["thresholds"] > 0).all()):
        return None
    distinct = float(arrays.pop("distinct"))
    return ScoreTable(names=names, distinct=distinct, **arrays)


def _read_labels(data: Mapping[str, npt.NDArray[Any]], d: int) -> LabelStatistics | None:
    arrays = _floats(data, LabelStatistics, _LABELS)
    if len(arrays) != 7 or arrays["mean"].ndim != 2 or not all(np.isfinite(array).all() for array in arrays.values()):
        return None
    (c, m), k = arrays["mean"].shape, arrays["spread"].size
    shapes = {
        "mean": (c, m),
        "scale": (c, m),
        "whitening": (m, m),
        "centre": (c, d),
        "components": (k, d),
        "spread": (k,),
        "residual": (c,),
    }
    if not (c and m and k) or any(arrays[name].shape != shape for name, shape in shapes.items()):
        return None
    if not min(arrays[name].min() for name in ("scale", "spread", "residual")) > 0:
        return None
    return LabelStatistics(**arrays)


def _read_predictions(data: Mapping[str, npt.NDArray[Any]]) -> PredictionStatistics | None:
    arrays = _floats(data, PredictionStatistics, _PREDICTIONS)
    if len(arrays) != 3 or not all(np.isfinite(array).all() and (array >= 0).all() for array in arrays.values()):
        return None
    bins, right, sums = arrays["bins"], arrays["right"], arrays["confidence_sum"]
    if bins.ndim != 2 or bins.shape[1] != 10 or right.shape != bins.shape or sums.shape != bins.shape[:1]:
        return None
    return PredictionStatistics(**arrays) if (right <= bins).all() else None


def _is_gaussian(arrays: Mapping[str, Floats]) -> bool:
    """Whether the arrays of a `Reference` have matching shapes and finite values, positive where they must be."""
    if arrays["components"].ndim != 2 or not all(np.isfinite(array).all() for array in arrays.values()):
        return False
    k, d = arrays["components"].shape
    n = arrays["distances"].size
    shapes = {"mean": (d,), "scale": (d,), "spread": (k,), "distances": (n,), "residual": ()}
    if n == 0 or d == 0 or k == 0 or any(arrays[name].shape != shape for name, shape in shapes.items()):
        return False
    return bool(min(arrays[name].min() for name in ("scale", "spread", "residual")) > 0)
