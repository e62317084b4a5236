"""Which samples to label after a drift: labels until a retrained model has 80 % of what labelling everything gains.

Ours: what devices send (one in twenty at random, and of the others confidences below .6), of which
`eyas_host.fleet.samples.choose` takes some, as the alarm that such a drift raises asks for. Beside it: frames at
random, and those with the smallest margins.

A first version's features stay as they are; its last layer is a logistic regression that is fitted again, to the old
images and the new labels together.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import Figure
from eyas_device.bundle import Confidence
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import Pixels
from eyas_device.telemetry.messages import Event
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.fleet.drift.causes import DIRTY, NEW_CLASS, SEASON
from eyas_host.fleet.samples.choose import choose, share_at_random
from eyas_host.fleet.samples.records import Sample
from sides.garments import LABELS, Floats, Ints, Network, features, first_version, garments, trained

SIZES = (25, 50, 100, 200, 400, 800, 1600)
CAMERAS, DIRTY_CAMERA = 8, 0
BAG = LABELS.index("bag")
BAND, RATE = 0.6, 0.05
"""Of the devices: confidences below which a prediction is sent, and the share of the others that is."""
GAIN = 0.8
_SHOWN = 112
_TESTED = 4000
_DRAWS = 3
"""Random choices that are averaged."""


class Scene(NamedTuple):
    """What a fleet sees after a drift, and the version that it runs."""

    known: Floats
    """Features of the images that the version was trained on, [n, channels]."""
    known_targets: Ints
    validation: Floats
    validation_targets: Ints
    images: Pixels
    """What cameras see, uint8 [frames, 28, 28]."""
    seen: Floats
    """Its features."""
    targets: Ints
    cameras: Ints
    test: Floats
    """Features of later frames of what drifted."""
    test_targets: Ints
    cause: str
    """What the alarms say of it."""


Rule = Callable[[int, int], Ints]
"""Labels, number of the draw -> rows of frames."""


def choices(make: Callable[[Path, int], Scene], root: Path, seeds: int, sizes: Sequence[int]) -> dict[str, Figure]:
    """Labels that each rule needs after a drift."""
    curves: dict[str, list[Floats]] = {}
    ends = []
    for seed in range(seeds):
        scene = make(root, seed)
        start, full = _accuracy(scene, np.zeros(0, np.int64)), _accuracy(scene, np.arange(len(scene.targets)))
        ends.append((start, full))
        for name, rule in _rules(scene, seed).items():
            draws = range(_DRAWS if name == RANDOM else 1)
            found = [np.mean([_accuracy(scene, rule(size, draw)) for draw in draws]) for size in sizes]
            curves.setdefault(name, []).append((np.array(found) - start) / (full - start))
    middle = {name: np.mean(some, axis=0) for name, some in curves.items()}
    needed = {name: _needed(sizes, gains) for name, gains in middle.items()}
    start, full = np.mean(ends, axis=0)
    figures: dict[str, Figure] = {}
    for name, gains in middle.items():
        figures[f"labels, {name}"] = Figure(
            value=needed[name],
            unit="",
            spread="gain " + ", ".join(f"{100 * gain:.0f} % ({size})" for size, gain in zip(sizes, gains, strict=True)),
            note=f"for {GAIN:.0%} of the gain, accuracy {start:.3f} to {full:.3f}, {seeds} seeds"
            + ("" if needed[name] < sizes[-1] else "; not reached with these"),
        )
    for name in (RANDOM, UNCERTAIN):
        pairs = zip(curves[OURS], curves[name], strict=True)
        each = [_needed(sizes, ours) / _needed(sizes, other) for ours, other in pairs]
        figures[f"labels, eyas / {name}"] = Figure(
            value=needed[OURS] / needed[name],
            unit="x",
            bound=1.0,
            better="lower",
            spread=", ".join(f"{one:.2f}" for one in each),
        )
    return figures


def season(root: Path, seed: int) -> Scene:
    """All cameras see another season."""
    learned = first_version(root, seed)
    test = garments(root, "t10k").take(slice(0, _TESTED))
    return _scene(learned.network, learned, learned.later.seen("season"), test.seen("season"), test.targets, SEASON)


def dirty_camera(root: Path, seed: int) -> Scene:
    """One of eight cameras has dirt on its lens; its accuracy counts."""
    learned = first_version(root, seed)
    usual, dirty = learned.later.seen("usual"), learned.later.seen("dirt")
    own = np.arange(len(usual)) % CAMERAS == DIRTY_CAMERA
    test = garments(root, "t10k").take(slice(0, _TESTED))
    seen = np.where(own[:, None, None], dirty, usual)
    return _scene(learned.network, learned, seen, test.seen("dirt"), test.targets, DIRTY)


def new_kind(root: Path, seed: int) -> Scene:
    """A kind of object that the version does not know is one in twenty."""
    learned = first_version(root, seed)
    train, validation = (one.take(one.targets != BAG) for one in (learned.train, learned.validation))
    network = trained(train.seen("usual"), train.targets, seed)
    bags = np.flatnonzero(learned.later.targets == BAG)
    later = learned.later.take(np.setdiff1d(np.arange(len(learned.later.targets)), bags[len(bags) // 2 :]))
    test = garments(root, "t10k").take(slice(0, _TESTED))
    known = learned._replace(train=train, validation=validation, later=later)
    return _scene(network, known, later.seen("usual"), test.seen("usual"), test.targets, NEW_CLASS)


OURS, RANDOM, UNCERTAIN = "eyas", "at random", "smallest margins"


def _scene(network: Network, learned: Any, seen: Pixels, test: Pixels, test_targets: Ints, cause: str) -> Scene:
    parts = (learned.train.seen("usual"), learned.validation.seen("usual"), seen, test)
    known, validation, sent, later = (features(network, part) for part in parts)
    return Scene(
        known,
        learned.train.targets,
        validation,
        learned.validation.targets,
        seen,
        sent,
        learned.later.targets,
        np.arange(len(seen)) % CAMERAS,
        later,
        test_targets,
        cause,
    )


def fitted(scene: Scene, rows: Ints) -> Any:
    """The last layer, fitted to the old images and these frames."""
    last = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=400, tol=1e-3))
    return last.fit(
        np.concatenate([scene.known, scene.seen[rows]]), np.concatenate([scene.known_targets, scene.targets[rows]])
    )


def _accuracy(scene: Scene, rows: Ints) -> float:
    return float(fitted(scene, rows).score(scene.test, scene.test_targets))


def _rules(scene: Scene, seed: int) -> dict[str, Rule]:
    """Ours and what it is compared with."""
    first = fitted(scene, np.zeros(0, np.int64))
    labels = [LABELS[number] for number in first.classes_]
    places = np.searchsorted(first.classes_, scene.validation_targets)
    calibration = fit_calibration(first.decision_function(scene.validation), places)
    sent = events(first.decision_function(scene.seen), calibration, labels, scene.images, scene.cameras, seed)
    found = calibrated_probabilities(first.decision_function(scene.seen), calibration)
    margins = np.diff(np.sort(found, axis=1)[:, -2:], axis=1)[:, 0]

    def at_random(count: int, draw: int) -> Ints:
        return np.random.default_rng((seed, draw)).permutation(len(scene.targets))[:count]

    def chosen(count: int, draw: int) -> Ints:
        share = share_at_random([scene.cause])
        rows = [sample.event.sequence for sample in choose(sent, count, random_share=share, seed=seed)]
        more = [row for row in at_random(len(scene.targets), draw).tolist() if row not in set(rows)]
        return np.array((rows + more)[:count], np.int64)

    return {OURS: chosen, RANDOM: at_random, UNCERTAIN: lambda count, _: np.argsort(margins, kind="stable")[:count]}


def events(
    values: Floats, calibration: Confidence, labels: Sequence[str], images: Pixels, cameras: Ints, seed: int
) -> list[Sample]:
    """What devices send of predictions, as the store has it; `sequence` is the row.

    Args:
        values: Logits [frames, classes].
        calibration: Of the model.
        labels: Its classes.
        images: uint8 [frames, 28, 28].
        cameras: Number of each frame's camera.
        seed: Of the devices' dice.

    """
    dice = np.random.default_rng(seed)
    found = []
    for row, own in enumerate(calibrated_probabilities(values, calibration)):
        order = np.argsort(own)[::-1][:5].tolist()
        why = "sampled" if dice.random() < RATE else "uncertain" if own[order[0]] < BAND else ""
        if why:
            event = Event(
                device=f"cam-{cameras[row]}",
                sequence=row,
                label=labels[order[0]],
                confidence=float(own[order[0]]),
                margin=float(own[order[0]] - own[order[1]]),
                top={labels[place]: float(own[place]) for place in order},
                why=why,
                image=_jpeg(images[row]),
            )
            found.append(Sample(event=event, site="hall"))
    return found


def _jpeg(image: Pixels) -> str:
    large = cv2.resize(image, (_SHOWN, _SHOWN), interpolation=cv2.INTER_NEAREST)
    return base64.b64encode(cv2.imencode(".jpg", large)[1].tobytes()).decode()


def _needed(sizes: Sequence[int], gains: Floats) -> float:
    """Labels at which the gain is reached first, between sizes on a logarithmic scale; all where it is not."""
    reached = np.flatnonzero(gains >= GAIN)
    if not len(reached):
        return float(sizes[-1])
    place = int(reached[0])
    if place == 0:
        return float(sizes[0])
    low, high = gains[place - 1], gains[place]
    share = (GAIN - low) / (high - low)
    return float(sizes[place - 1] * (sizes[place] / sizes[place - 1]) ** share)
