"""Does a model that is out of its depth say so? `python benchmarks/ood.py [--run RUN] [--quick] [--json FILE]`.

Two image sets: the demonstration (RUN, a finished `eyas distill`) and textures. Test images are shown as a camera would
show them, one a second for thirty seconds, unchanged and with each change of `eyas_host.evaluation.changes`. Both
detectors judge the same streams at each second from the fifth on: the former one (median distance farther than 95 % of
the validation images) and the present one. A stream is flagged if it is at any moment.

- False alarms: streams of thirty different images, of one kind alone, of a few scenes one after the other, of one.
- Detection: where a change costs ten points of balanced accuracy or more, at least 90 % of streams of thirty images
  are to be flagged.

`--quick` (minutes) takes fewer images and streams.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import balanced_accuracy_score

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_device.image_statistics import image_statistics
from eyas_device.ood import (
    HISTORY,
    MIN_IMAGES,
    OOD_THRESHOLD,
    all_statistics,
    describe,
    distance,
    judge_scores,
    normal_scores,
    scene_distances,
)
from eyas_device.preprocess import Pixels, prepare
from eyas_device.reference import Reference
from eyas_host.bundle.ood_thresholds import draw_streams
from eyas_host.bundle.reference import fit_reference
from eyas_host.evaluation.changes import CHANGES
from eyas_host.evaluation.ood_streams import observe
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.progress import track
from sides.camera_streams import ImageSet, other_photographs, solar_cells, textures

RUN = Path("runs/solar-cells")
HARMFUL = 0.10
_SCENES = {"thirty_scenes": HISTORY, "five_scenes": 5, "two_scenes": 2, "one_scene": 1}

Values = npt.NDArray[np.float64]


class Measured(NamedTuple):
    """What both detectors use of images."""

    scores: Values
    distances: Values
    """By the former distance, whose residual counts as one dimension."""


class Rates(NamedTuple):
    """Fraction of streams that are flagged."""

    former: float
    present: float


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help=f"finished run of the demonstration ({RUN})")
    parser.add_argument("--quick", action="store_true", help="fewer images and streams (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    before, quick = cpu_pressure(), arguments.quick
    limit, streams = (120, 100) if quick else (420, 1000)
    sets = [solar_cells(arguments.run, limit), textures(limit)]
    figures: dict[str, Figure] = {}
    for images in sets:
        figures |= detection_figures(images, streams)
    figures |= cost_figures(sets[0])
    finish(figures, before, arguments.json)


def detection_figures(images: ImageSet, count: int) -> dict[str, Figure]:
    """False alarms and detection of both detectors on one set."""
    reference = fit_reference(
        images.train,
        images.validation,
        images.spec,
        groups=images.groups,
        probabilities=images.predict(images.validation),
        labels=images.labels,
    )
    former = _former(reference, images)
    clean = _measure(images, images.test, reference, former)
    kinds = np.asarray(images.kinds)
    pools = [np.flatnonzero(kinds == kind) for kind in sorted(set(images.kinds))]
    pools = [pool for pool in pools if len(pool) >= 10]
    figures = {}
    for name, scenes in _SCENES.items():
        for kind, among in (("", [np.arange(len(kinds))]), ("_of_one_kind", pools)):
            rates = _rates(clean, reference, former, among, scenes, count)
            figures[f"{images.name}_false_alarms_{name}{kind}"] = _figure(
                rates.present, rates, 1.0, "lower", f"{len(kinds)} test images, {count} streams"
            )
    accuracy = balanced_accuracy_score(images.targets, images.predict(images.test).argmax(axis=1))
    changed = {change.name: [change.apply(image) for image in images.test] for change in CHANGES}
    for name, shown in track([*changed.items(), ("other photographs", other_photographs(len(kinds)))], images.name):
        measured = _measure(images, shown, reference, former)
        everything = [np.arange(len(shown))]
        different = _rates(measured, reference, former, everything, HISTORY, max(100, count // 5))
        fixed = _rates(measured, reference, former, everything, 1, max(100, count // 5))
        note = "no image of the set" if name == "other photographs" else ""
        if not note:
            drop = accuracy - balanced_accuracy_score(images.targets, images.predict(shown).argmax(axis=1))
            note = f"balanced accuracy {100 * accuracy:.1f} - {100 * drop:.1f} points"
        harmful = name == "other photographs" or drop >= HARMFUL
        why = judge_scores(measured.scores[:HISTORY], _table(reference))[1]
        figures[f"{images.name}: {name}"] = _figure(
            different.present, different, 90.0 if harmful else None, "higher", f"{note}; {why}", fixed=fixed
        )
    return figures


def _former(reference: Reference, images: ImageSet) -> Reference:
    """The former reference: the residual's total variance, and the validation images' distances by it."""
    dimensions = reference.components.shape[1] - reference.components.shape[0]
    total = msgspec.structs.replace(reference, residual=reference.residual * dimensions)
    distances = [distance(describe(prepare(image, images.spec)), total) for image in images.validation]
    return msgspec.structs.replace(total, distances=np.sort(np.asarray(distances, dtype=np.float32)))


def _measure(images: ImageSet, shown: Sequence[Pixels], reference: Reference, former: Reference) -> Measured:
    scores, distances = [], []
    for image, probabilities in zip(shown, images.predict(shown), strict=True):
        prepared = prepare(image, images.spec)
        described = describe(prepared)
        values = all_statistics(image_statistics(prepared), described, reference, probabilities)
        scores.append(normal_scores(values, _table(reference)))
        distances.append(distance(described, former))
    return Measured(np.stack(scores), np.asarray(distances))


def _rates(
    measured: Measured,
    reference: Reference,
    former: Reference,
    pools: Sequence[npt.NDArray[np.intp]],
    scenes: int,
    count: int,
) -> Rates:
    """Fraction of streams that each detector flags at any moment."""
    table = _table(reference)
    streams = draw_streams(pools, scenes, count, np.random.default_rng(7))
    seen = observe(streams, measured.scores[streams], scene_distances(measured.scores, table.names), table)
    allowed = np.interp(seen.scenes, table.effective, table.thresholds)
    limit = former.distances[int(OOD_THRESHOLD * len(former.distances))]  # the first with a quantile above it
    medians = np.stack(
        [np.median(measured.distances[streams[:, :n]], axis=1) for n in range(MIN_IMAGES, HISTORY + 1)], axis=1
    )
    return Rates(float((medians > limit).any(axis=1).mean()), float((seen.deviation > allowed).any(axis=1).mean()))


def _figure(
    value: float, rates: Rates, bound: float | None, better: Any, note: str, *, fixed: Rates | None = None
) -> Figure:
    spread = f"before: {100 * rates.former:.1f} %"
    if fixed is not None:
        spread += f"; of one scene: {100 * fixed.present:.1f} %, before {100 * fixed.former:.1f} %"
    return Figure(value=round(100 * value, 2), unit="%", bound=bound, better=better, spread=spread, note=note)


def _table(reference: Reference) -> Any:
    assert reference.table is not None
    return reference.table


def cost_figures(images: ImageSet) -> Mapping[str, Figure]:
    """Microseconds of a measured frame at one thread, beside what the former detector computed."""
    validation = [images.validation[n] for n in range(100)]
    probabilities = images.predict(validation)
    reference = fit_reference(
        [images.train[n] for n in range(200)],
        validation,
        images.spec,
        probabilities=probabilities,
        labels=images.labels[:200],
    )
    figures = {}
    for size in (128, 224):
        image = prepare(images.test[0], msgspec.structs.replace(images.spec, size=size))
        scores = np.random.default_rng(0).normal(size=(HISTORY, len(_table(reference).names)))
        former, present = [], []
        for _ in range(300):
            started = perf_counter()
            described = describe(image)
            distance(described, reference)
            former.append(perf_counter() - started)
            values = all_statistics(image_statistics(image), described, reference, probabilities[0])
            normal_scores(values, _table(reference))
            judge_scores(scores, _table(reference))
            present.append(perf_counter() - started)
        figures[f"measured_frame_{size}px"] = Figure(
            value=1e6 * float(np.median(present)),
            unit="us",
            spread=f"before: {1e6 * float(np.median(former)):.0f} us",
            note="once a second, one thread",
        )
    return figures


if __name__ == "__main__":
    main()
