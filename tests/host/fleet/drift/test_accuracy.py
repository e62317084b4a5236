"""Accuracy with few labels and without: bounds hold, estimates are right where they can be, and say where not."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import Bundle
from eyas_device.reference import PredictionStatistics, read_reference, reference_arrays
from eyas_device.telemetry.messages import CONFIDENCE_EDGES, encode
from eyas_host.bundle.reference import prediction_statistics
from eyas_host.fleet.drift.bundles import remember
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.estimate import CAVEAT, ModelReference, estimate
from eyas_host.fleet.drift.labelled import accuracies, describe, read_labels
from eyas_host.fleet.drift.measures import MEASURES, sums_of
from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.risk import RiskMonitor
from eyas_host.fleet.drift.rules import findings
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import MessageId, ValidMessage
from tests.support.drift_parts import BEGIN
from tests.support.fleet_parts import event, window
from tests.support.inside import eyas
from tests.support.tiny_bundle import write_tiny_bundle

LABELS = ("a", "b")
SPOOL = str(uuid.UUID(int=9))


def images(rng: np.random.Generator, count: int, hardness: float, *, concept: float = 0.0) -> dict[str, Any]:
    """Predictions that are as right as they claim, but for a share `concept` whose labels mean something else."""
    logits = np.abs(rng.normal(3.0 - hardness, 1.5, count))
    confidence = 1 / (1 + np.exp(-logits))
    predicted = rng.integers(0, 2, count)
    right = (rng.random(count) < confidence) & (rng.random(count) >= concept)
    return {"confidence": confidence, "predicted": predicted, "right": right}


def reference_of(found: dict[str, Any]) -> ModelReference:
    p = np.where(
        np.eye(2, dtype=bool)[found["predicted"]], found["confidence"][:, None], 1 - found["confidence"][:, None]
    )
    targets = np.where(found["right"], found["predicted"], 1 - found["predicted"])
    statistics = prediction_statistics(found["predicted"], targets, p)
    assert isinstance(statistics, PredictionStatistics)
    return ModelReference(
        labels=LABELS,
        bins=tuple(map(tuple, statistics.bins.tolist())),
        right=tuple(map(tuple, statistics.right.tolist())),
        confidence_sum=tuple(statistics.confidence_sum.tolist()),
    )


def recent(found: dict[str, Any]) -> np.ndarray:
    bins = np.searchsorted(CONFIDENCE_EDGES, found["confidence"], side="right")
    counts, of_bins, sums = {}, {}, {}
    for number, label in enumerate(LABELS):
        own = found["predicted"] == number
        counts[label] = int(own.sum())
        of_bins[label] = tuple(np.bincount(bins[own], minlength=10).tolist())
        sums[label] = float(found["confidence"][own].sum())
    frames = len(bins)
    one = window("x", "s", 0, frames=frames, counts=counts, confidence_bins=of_bins, confidence_sum=sums)
    return np.array(sums_of(one, LABELS))


def test_estimates_follow_hard_images_and_miss_changed_labels() -> None:
    rng = np.random.default_rng(1)
    reference = reference_of(images(rng, 4000, 0.0))
    before = 1.0  # by threshold is a rough estimate here: it falls, and that is all
    for hardness in (0.0, 0.7, 1.5):
        now = images(rng, 20_000, hardness)
        found = estimate(recent(now), LABELS, reference)
        assert found is not None and found.by_bins is not None and found.by_threshold is not None
        truth = now["right"].mean()
        assert abs(found.average_confidence - truth) <= 0.02
        assert abs(found.by_bins - truth) <= 0.02
        assert found.by_threshold <= before + 0.01
        before = found.by_threshold
        assert abs(found.precision["a"] - now["right"][now["predicted"] == 0].mean()) <= 0.03
        assert found.caveat == CAVEAT
    changed = images(rng, 20_000, 0.0, concept=0.3)
    found = estimate(recent(changed), LABELS, reference)
    assert found is not None and found.by_bins is not None
    assert found.by_bins - changed["right"].mean() > 0.2  # what the caveat says


def test_without_a_reference_the_mean_confidence_is_left() -> None:
    found = estimate(recent(images(np.random.default_rng(2), 500, 0.0)), LABELS, None)
    assert found is not None
    assert (found.frames, found.by_bins, found.precision) == (500, None, {})
    assert estimate(np.zeros_like(recent(images(np.random.default_rng(2), 5, 0.0))), LABELS, None) is None


def test_statistics_of_predictions_by_hand() -> None:
    p = np.array([[0.99, 0.01], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    found = prediction_statistics(np.array([0, 0, 1, 0]), np.array([0, 1, 1, 1]), p)
    assert found.bins[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert found.right[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert found.bins[1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert found.confidence_sum.tolist() == pytest.approx([2.04, 0.7])


def test_the_rules_name_what_moved_by_three_points() -> None:
    rng = np.random.default_rng(3)
    reference = reference_of(images(rng, 4000, 0.0))
    usual = np.full(MEASURES, np.nan)
    same, hard = recent(images(rng, 2000, 0.0)), recent(images(rng, 2000, 1.2))
    assert findings(same, usual, LABELS, reference, estimate(same, LABELS, reference)) == ()
    found = findings(hard, usual, LABELS, reference, estimate(hard, LABELS, reference), min_confidence=0.88)
    assert [text.split(" ")[0] for text in found[:2]] == ["confidence", "confidence"]
    assert "is below 0.88" in found[0]
    assert any(text.startswith("estimated accuracy moved by -") for text in found)
    few = recent(images(rng, 100, 1.2))
    assert findings(few, usual, LABELS, reference, None) == ()


@pytest.mark.parametrize("announces", ["well", "wrongly", "nothing"])
def test_bounds_hold_at_all_times_whatever_the_confidences_say(announces: str) -> None:
    """40 streams, a look after every label: the bounds are ever wrong in no more than chance allows."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        confidence = 1 / (1 + np.exp(-np.abs(rng.normal(2.5, 1.6, 80))))
        announced = {"well": 1 - confidence, "wrongly": confidence, "nothing": np.full(80, 0.2)}[announces]
        mean = {"well": 0.1267, "wrongly": 0.8733, "nothing": 0.2}[announces]  # over the population: see below
        errors = rng.random(80) >= confidence
        monitor = RiskMonitor()
        ever = False
        for error, of_one in zip(errors, announced, strict=True):
            monitor.add(float(error), float(of_one), mean)
            bound = monitor.bound()
            ever |= not bound.lower <= 0.8733 <= bound.upper
        wrong += ever
    assert wrong <= 7  # two bounds at 5 % in 40 streams: 4 expected at most


def test_the_mean_of_the_simulated_confidences() -> None:
    rng = np.random.default_rng(0)
    assert (1 / (1 + np.exp(-np.abs(rng.normal(2.5, 1.6, 400_000))))).mean() == pytest.approx(0.8733, abs=2e-3)


def test_confidences_that_say_something_save_labels() -> None:
    """Against the same bets without them, and against exact binomial bounds at alpha / (n (n + 1))."""
    from scipy.stats import beta

    rng = np.random.default_rng(11)
    confidence = np.where(rng.random(3000) < 0.25, 0.55, 0.99)
    errors = rng.random(3000) >= confidence
    mean, bounds = 1 - (0.25 * 0.55 + 0.75 * 0.99), {}
    powered, plain = RiskMonitor(), RiskMonitor()
    for number, (error, of_one) in enumerate(zip(errors, 1 - confidence, strict=True), start=1):
        powered.add(float(error), float(of_one), mean)
        plain.add(float(error))
        bounds[number] = powered.bound().lower, plain.bound().lower
        if min(bounds[number]) >= 1 - mean - 0.05:
            break
    needed = [next(n for n, both in bounds.items() if both[side] >= 1 - mean - 0.05) for side in (0, 1)]
    wrong = np.cumsum(errors)
    n = np.arange(1, 3001)
    exact = int(np.argmax(beta.ppf(1 - 0.05 / n / (n + 1), wrong + 1, n - wrong) <= mean + 0.05)) + 1
    assert needed[0] < needed[1]
    assert needed[0] <= exact / 2


def test_bounds_never_widen_and_bad_numbers_are_refused() -> None:
    monitor, before = RiskMonitor(), (0.0, 1.0)
    assert (monitor.bound().lower, monitor.bound().upper, monitor.bound().labels) == (0.0, 1.0, 0)
    for error in (0, 0, 1, 0, 0, 0, 1, 0) * 10:
        monitor.add(error, 0.2, 0.2)
        bound = monitor.bound()
        assert before[0] <= bound.lower <= bound.accuracy <= bound.upper <= before[1]
        before = bound.lower, bound.upper
    for bad in ((2.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, math.nan)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            monitor.add(*bad)


def stored(message: Any, kind: str, site: str) -> ValidMessage:
    return ValidMessage(
        kind, MessageId(site, message.device, SPOOL, message.sequence), message, encode(message).decode()
    )


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[str, Path]:
    """A store with events of two sites, and a table of labels."""
    url, path = f"sqlite:///{tmp_path / 'fleet.db'}", tmp_path / "labels.csv"
    rng, lines, messages = np.random.default_rng(4), ["device,spool,sequence,label"], []
    for number in range(80):
        device, site = (("cam-1", "north"), ("cam-2", "south"))[number % 2]
        label, why = ("ok", "crack")[int(rng.integers(2))], "sampled" if number < 70 else "uncertain"
        one = event(device, SPOOL, number, label=label, confidence=0.9, why=why, time=BEGIN + number)
        messages.append(stored(one, "event", site))
        lines.append(f"{device},{SPOOL},{number},{label if number % 10 else 'dent'}")
    for device, site in (("cam-1", "north"), ("cam-2", "south")):
        one = window(device, SPOOL, 500, frames=100, counts={"ok": 100}, confidence_sum={"ok": 90.0}, time=BEGIN)
        messages.append(stored(one, "window", site))
    with Store(url) as store:
        store.add(Batch(BEGIN, messages))
    lines.append(f"cam-9,{SPOOL},1,ok")
    path.write_text("\n".join(lines))
    return url, path


def test_accuracy_and_confusion_on_labelled_samples(labelled: tuple[str, Path]) -> None:
    with Store(labelled[0]) as store:
        fleet, north, south = accuracies(store, read_labels(labelled[1]))
    assert [one.where for one in (fleet, north, south)] == ["fleet", "north", "south"]
    assert fleet.bound.labels == 70 == north.bound.labels + south.bound.labels
    assert fleet.bound.accuracy == pytest.approx(0.9, abs=0.01)
    assert fleet.bound.lower < 0.9
    assert sum(fleet.confusion["dent"].values()) == 7
    assert fleet.left_out == {"not drawn at random": 10, "not in the store": 1}
    text = "\n".join(describe(fleet))
    assert "on 70 labelled samples, at least" in text and "10 not drawn at random" in text


def test_the_verb_prints_the_accuracy(tmp_path: Path, labelled: tuple[str, Path]) -> None:
    done = eyas(tmp_path, "drift", "--store", labelled[0], "--labels", labelled[1])
    assert done.code == 0 and "fleet: accuracy 0.9" in done.out
    done = eyas(tmp_path, "drift", "--store", labelled[0], "--labels", labelled[1], "--json")
    assert json.loads(done.out.splitlines()[0])["bound"]["labels"] == 70


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("device,spool,label\n", "no column 'sequence'"),
        ("device,spool,sequence,label\ncam,s,x,ok\n", "line 2: sequence 'x'"),
        ("device,spool,sequence,label\ncam,s,1,\n", "line 2: no label"),
        ("device,spool,sequence,label\ncam,s,1,ok\ncam,s,1,crack\n", "line 3: 'crack', and 'ok' above"),
        ("\xff\xfe", "a CSV file is needed"),
        (None, "No such file"),
    ],
)
def test_bad_tables_of_labels(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DriftError, match=problem):
        read_labels(path)


def test_a_reference_survives_its_json() -> None:
    reference = reference_of(images(np.random.default_rng(6), 300, 0.0))
    assert msgspec.json.decode(msgspec.json.encode(reference), type=ModelReference) == reference
    assert reference.images == 300


def test_what_a_bundle_recorded_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bundle = write_tiny_bundle(tmp_path / "bundle")
    url, bundle = f"sqlite:///{tmp_path / 'fleet.db'}", Bundle.open(tiny_bundle)
    plain = bundle.reference()
    assert plain is not None
    with Store(url) as store:
        with pytest.raises(DriftError, match="pack it again"):
            remember(store, tiny_bundle)
        count = len(bundle.manifest.labels)
        sure = np.eye(count)[np.arange(30) % count] * 0.9 + 0.05
        statistics = prediction_statistics(np.arange(30) % count, np.zeros(30, int), sure)
        stored_again = read_reference(reference_arrays(msgspec.structs.replace(plain, predictions=statistics)))
        assert stored_again is not None and stored_again.predictions is not None
        assert stored_again.predictions.bins.tolist() == statistics.bins.tolist()
        lying = msgspec.structs.replace(statistics, right=statistics.bins + 1)
        assert read_reference(reference_arrays(msgspec.structs.replace(plain, predictions=lying))) is None
        monkeypatch.setattr(Bundle, "reference", lambda self: stored_again)
        assert "30 validation images" in remember(store, tiny_bundle)
        monitor = Monitor(store)
        monitor.load()
        reference = monitor.references[bundle.identity[:12]]
        assert (reference.images, reference.labels) == (30, bundle.manifest.labels)
