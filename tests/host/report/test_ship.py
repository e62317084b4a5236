"""Whether to ship: bounds of `[accept]` against intervals, with right values from scipy's own intervals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from eyas_device.decision import Decision
from eyas_host.evaluation.cost import CostFigures, SplitCost, accepted_class
from eyas_host.evaluation.metrics import PairedLoss, paired_loss, score
from eyas_host.evaluation.robustness import Robustness, RobustnessRow
from eyas_host.recipe.accept import AcceptSection
from eyas_host.recipe.load import load_recipe
from eyas_host.report.model import Report, Ship
from eyas_host.report.ship import decide
from eyas_host.support.errors import RecipeError
from tests.support.report_parts import make_report

SHIPPED = "litert-int8"
NONE = {"min_worst_recall": 0.0, "max_int8_loss": 1.0}
"""Settings that ask for nothing by default."""


def judged(right: list[int], images: list[int], units: Any = None, **changes: Any) -> Report:
    """A report whose shipped variant gets `right` of `images` of each label right, the others as the next label."""
    labels = tuple(f"label {n}" for n in range(len(images)))
    targets = np.repeat(np.arange(len(images)), images)
    predicted = np.concatenate(
        [
            np.where(np.arange(n) < k, c, (c + 1) % len(images))
            for c, (k, n) in enumerate(zip(right, images, strict=True))
        ]
    ).astype(np.int64)
    own = score(0.9 * np.eye(len(images))[predicted] + 0.1 / len(images), targets, units=units)
    return msgspec.structs.replace(make_report(labels), scores={SHIPPED: own}, positive_class=labels[0], **changes)


def verdict(report: Report, **accept: Any) -> Ship:
    return decide(report, AcceptSection(**NONE | accept))


CASES = [(k, n) for n in (10, 35, 100, 1000) for k in sorted({n, n - 1, round(0.9 * n), round(0.6 * n)})]


@pytest.mark.parametrize("required", [0.5, 0.8, 0.95])
def test_the_recall_of_the_positive_class_is_judged_as_by_clopper_and_pearson(required: float) -> None:
    seen: dict[str, int] = {}
    for right, images in CASES:
        low, high = binomtest(right, images).proportion_ci(0.95, method="exact")
        if min(abs(low - required), abs(high - required)) < 0.035:
            continue  # the intervals differ by up to that
        expected = "ship" if low >= required else "do not ship" if high < required else "look"
        ship = verdict(judged([right, 400], [images, 400]), min_recall=required)
        assert ship.verdict == expected, (right, images, ship)
        seen[expected] = seen.get(expected, 0) + 1
        assert "recall of label 0" in ship.reasons[0] and f"{100 * required:.1f} %" in ship.reasons[0]
    assert len(seen) >= 2 and sum(seen.values()) >= 8, seen


def test_one_percent_of_positives_is_too_few_to_know_and_the_reason_says_how_many_would_do() -> None:
    report = judged([10, 990], [10, 990])
    ship = verdict(report, min_recall=0.9)
    assert ship.verdict == "look"
    (reason,) = ship.reasons
    assert "10 test images are too few to tell" in reason and "at least 35 independent images" in reason
    assert verdict(judged([35, 990], [35, 990]), min_recall=0.9).verdict == "ship"
    assert verdict(judged([34, 990], [34, 990]), min_recall=0.9).verdict == "look"
    assert verdict(report, min_balanced_accuracy=0.9).verdict == "look", "ten images carry half of it"
    assert verdict(judged([100, 9900], [100, 9900]), min_balanced_accuracy=0.9).verdict == "ship"
    assert verdict(judged([1, 990], [10, 990]), min_recall=0.9).verdict == "do not ship"


def test_images_of_one_group_are_not_counted_as_independent() -> None:
    rng = np.random.default_rng(4)
    hits = np.repeat(rng.random(20) < 0.85, 10)  # 20 groups of ten equal images
    right = int(hits.sum())
    units = np.concatenate([np.repeat(np.arange(20), 10), 20 + np.arange(400)])
    order = np.argsort(~hits, kind="stable")  # `judged` puts the right ones first
    units[:200] = units[:200][order]
    grouped, single = judged([right, 400], [200, 400], units), judged([right, 400], [200, 400])
    of_groups = bootstrap((hits.reshape(20, 10).mean(axis=1),), np.mean, random_state=0).confidence_interval
    of_images = bootstrap((hits.astype(float),), np.mean, random_state=0).confidence_interval
    required = (of_groups.low + of_images.low) / 2
    assert of_groups.low + 0.02 < required < of_images.low - 0.02
    assert verdict(single, min_recall=required).verdict == "ship"
    assert verdict(grouped, min_recall=required).verdict == "look"
    assert verdict(grouped, min_recall=(of_groups.high + 1) / 2 + 0.02).verdict != "ship"


def test_the_worst_of_forty_classes_is_named_and_the_others_counted() -> None:
    right = [58] * 40
    right[17] = 12
    ship = verdict(judged(right, [60] * 40), min_worst_recall=0.5)
    assert ship.verdict == "do not ship"
    assert len(ship.reasons) == 2 and "recall of label 17 is 20.0 % (95 % interval" in ship.reasons[0]
    low, high = binomtest(12, 60).proportion_ci(0.95, method="exact")
    assert high < 0.5
    assert verdict(judged([58] * 40, [60] * 40), min_worst_recall=0.5, min_balanced_accuracy=0.9).verdict == "ship"
    ship = verdict(judged([2] * 40, [3] * 40), min_worst_recall=0.5, min_balanced_accuracy=0.1)
    assert ship.verdict == "look"
    assert "likewise label 1, label 2" in ship.reasons[0] and "33 more" in ship.reasons[0] and low < 0.2


def test_a_class_without_test_images_is_not_known() -> None:
    ship = verdict(judged([0, 400], [0, 400]), min_recall=0.5)
    assert ship.verdict == "look" and "no image of it" in ship.reasons[0]


@pytest.mark.parametrize(
    ("right", "images", "expected", "words"),
    [
        (260, 500, "do not ship", "no better than chance (50.0 %)"),
        (6, 10, "look", "as far as can be told; 20 test images are too few"),
        (5, 10, "do not ship", "no better than chance"),
        (480, 500, "ship", "at least 80.0 % is asked for"),
    ],
)
def test_chance_has_to_be_beaten_whatever_is_asked(right: int, images: int, expected: str, words: str) -> None:
    asked = {"min_balanced_accuracy": 0.8} if expected == "ship" else {"min_balanced_accuracy": 0.0}
    ship = verdict(judged([right, right], [images, images]), **asked)
    assert ship.verdict == expected and words in " ".join(ship.reasons)


def test_without_a_word_on_what_is_enough_somebody_has_to_look() -> None:
    report = judged([990, 990], [1000, 1000])
    ship = verdict(report)
    assert ship.verdict == "look" and "set [accept] min_balanced_accuracy" in ship.reasons[0]
    assert verdict(report, min_balanced_accuracy=0.9).verdict == "ship"


def cost_report(decided: float, interval: tuple[float, float] | None, constant: float) -> Report:
    split = SplitCost(
        split="test", images=300, decided=decided, likeliest=decided, constant=constant, interval=interval
    )
    decision = Decision(costs=((0.0, 10.0), (1.0, 0.0)), currency="EUR", label="label 0", threshold=0.1)
    cost = CostFigures(decision=decision, bayes_threshold=0.09, constant_label="label 1", splits=(split,))
    return judged([380, 380], [400, 400], cost=cost)


@pytest.mark.parametrize(
    ("decided", "interval", "ratio", "expected"),
    [
        (0.3, (0.2, 0.4), 1.0, "ship"),
        (0.3, (0.2, 0.5), 1.0, "look"),
        (0.3, (0.2, 0.49), 0.8, "look"),
        (0.3, (0.2, 0.39), 0.8, "ship"),
        (0.55, (0.51, 0.6), 1.0, "do not ship"),
        (0.5, (0.5, 0.5), 1.0, "do not ship"),
        (0.3, None, 1.0, "look"),
    ],
)
def test_the_cost_is_judged_against_the_best_constant_prediction(
    decided: float, interval: tuple[float, float] | None, ratio: float, expected: str
) -> None:
    ship = verdict(cost_report(decided, interval, 0.5), max_cost_ratio=ratio)
    assert ship.verdict == expected
    assert "always predicting label 1 costs 0.5" in ship.reasons[0]


def test_int8_is_judged_on_the_test_set_as_by_scipys_bootstrap_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], 400)
    eye = np.eye(2)
    seen = set()
    for lost, required in itertools.product((0.0, 0.02, 0.1), (0.01, 0.05, 0.2)):
        before = np.where(rng.random(800) < 0.95, targets, 1 - targets)
        after = np.where(rng.random(800) < lost, 1 - before, before)
        loss = paired_loss(eye[before], eye[after], targets)
        gap = (before == targets).astype(float) - (after == targets)
        pair = (
            bootstrap(
                (gap[:400], gap[400:]),
                lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
                method="percentile",
                random_state=0,
            )
            if gap.any()
            else None
        )
        low, high = pair.confidence_interval if pair else (0.0, 0.0)
        if min(abs(low - required), abs(high - required)) < 0.008:
            continue
        expected = "ship" if high <= required else "do not ship" if low > required else "look"
        report = judged([400, 400], [400, 400], test_losses={SHIPPED: loss})
        ship = verdict(report, max_int8_loss=required, min_balanced_accuracy=0.5)
        assert ship.verdict == expected, (lost, required, ship)
        seen.add(expected)
    assert {"ship", "do not ship"} <= seen


def test_what_int8_lost_has_to_be_measured_and_fp32_loses_nothing() -> None:
    report = judged([400, 400], [400, 400])
    ask = {"max_int8_loss": 0.05, "min_balanced_accuracy": 0.5}
    assert "was not measured" in verdict(report, **ask).reasons[0]
    assert verdict(report, **ask).verdict == "look"
    fp32 = tuple(msgspec.structs.replace(v, precision="fp32") for v in report.variants)
    assert verdict(msgspec.structs.replace(report, variants=fp32), **ask).verdict == "ship"
    open_loss = PairedLoss(0.02, (-0.01, 0.06), 0.055)
    ship = verdict(msgspec.structs.replace(report, test_losses={SHIPPED: open_loss}), **ask)
    assert ship.verdict == "look" and "int8 lost 2.0 points" in ship.reasons[0]


def covered(*flagged: float | None, drop: float = 0.3) -> Robustness:
    rows = tuple(
        RobustnessRow(change=f"change {n}", balanced_accuracy=0.5, drop=drop, confidence=None, flagged=f)
        for n, f in enumerate(flagged)
    )
    return Robustness(
        images=200, windows=100, window_frames=30, balanced_accuracy=0.8, flagged=0.0 if rows else None, rows=rows
    )


@pytest.mark.parametrize(
    ("robustness", "required", "expected", "words"),
    [
        (covered(1.0, 1.0), 1.0, "ship", "notice 2 of 2"),
        (covered(1.0, 0.2), 1.0, "do not ship", "notice 1 of 2 changes that cost accuracy, but not change 1"),
        (covered(1.0, 0.2), 0.5, "ship", "notice 1 of 2"),
        (covered(1.0, 0.93), 1.0, "look", "100 windows are too few"),
        (covered(1.0, 0.88), 1.0, "look", "but not change 1"),
        (covered(0.0, None), 0.0, "ship", "notice 0 of 2"),
        (covered(0.0, drop=0.05), 1.0, "ship", "no change of light"),
        (None, 0.5, "look", "was not measured"),
        (covered(), 0.5, "look", "was not measured"),
    ],
)
def test_the_coverage_of_costly_changes(
    robustness: Robustness | None, required: float, expected: str, words: str
) -> None:
    report = judged([390, 390], [400, 400], robustness=robustness)
    ship = verdict(report, min_ood_coverage=required, min_balanced_accuracy=0.5)
    assert ship.verdict == expected and words in " ".join(ship.reasons)


def test_an_edited_test_log_or_missing_figures_are_no_reason_to_ship() -> None:
    report = judged([400, 400], [400, 400])
    edited = msgspec.structs.replace(report, test_log_problems=("line 3 was edited",))
    assert verdict(edited, min_balanced_accuracy=0.5).verdict == "do not ship"
    missing = verdict(msgspec.structs.replace(report, shipped="onnx-int8"), min_balanced_accuracy=0.5)
    assert missing.verdict == "do not ship" and "was not measured" in missing.reasons[0]


def test_all_that_is_missed_is_said_before_what_is_open() -> None:
    report = judged([5, 300], [10, 400], test_losses={SHIPPED: PairedLoss(0.2, (0.15, 0.25), 0.24)})
    ship = verdict(report, max_int8_loss=0.05, min_recall=0.6, min_balanced_accuracy=0.1, min_worst_recall=0.1)
    assert ship.verdict == "do not ship"
    assert "int8 lost" in ship.reasons[0] and ship.reasons[1].startswith("balanced accuracy")
    assert [check.outcome for check in ship.checks] == ["missed", "open", "open", "met", "met"]
    written = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(report, ship=ship)))["ship"]
    assert written["verdict"] == "do not ship" and written["reasons"] == list(ship.reasons)


LABELS = ("ok", "scratch", "crack")


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([[0, 1, 1], [2, 0, 1], [9, 9, 0]], "crack"),
        ([[0, 1, 1], [20, 0, 30], [9, 9, 0]], "scratch"),
        ([[5, 6, 6], [6, 0, 1], [1, 8, 0]], "crack"),  # net of the correct prediction
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], ""),
    ],
)
def test_the_costly_class_is_the_one_whose_miss_costs_most(costs: list[list[float]], expected: str) -> None:
    assert accepted_class(AcceptSection(), LABELS, np.array(costs, dtype=float)) == expected
    assert accepted_class(AcceptSection(positive_class="ok"), LABELS, np.array(costs, dtype=float)) == "ok"


def test_a_positive_class_that_cannot_be_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no label 'dent' in the data; allowed: ok, scratch, crack"):
        accepted_class(AcceptSection(positive_class="dent"), LABELS, None)
    with pytest.raises(RecipeError, match="no class costs most to miss"):
        accepted_class(AcceptSection(min_recall=0.9), LABELS, 1 - np.eye(3))
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "a"\n[data]\npath = "x"\n[accept]\nmin_recall = 0.9\nmax_cost_ratio = 0.5\n')
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert "name its class in [accept] positive_class" in str(refused.value)
    assert "max_cost_ratio: needs a [cost] table" in str(refused.value)
    path.write_text('[run]\nname = "a"\n[data]\npath = "x"\n[accept]\nmin_recall = 1.0\n')
    with pytest.raises(RecipeError, match="min_recall"):
        load_recipe(path)
