"""Expected cost: the recipe's table, and the chosen decision rule against a brute-force search."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.simulations import threshold_regret
from eyas_device.decision import Decision, decide, find_problem
from eyas_host.evaluation.cost import (
    bayes_threshold,
    cheapest_constant,
    choose_decision,
    cost_matrix,
    mean_cost,
    split_cost,
    threshold_costs,
)
from eyas_host.evaluation.metrics import softmax
from eyas_host.recipe.cost import CostSection
from eyas_host.recipe.load import load_recipe
from eyas_host.support.errors import RecipeError
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, draw_folder

LABELS = ("defective", "ok")
TABLE = {"defective": {"ok": 50_000.0}, "ok": {"defective": 5_000.0}}


def costs_of(table: dict[str, dict[str, float]], labels: tuple[str, ...] = LABELS, **more: float) -> np.ndarray:
    matrix = cost_matrix(CostSection(table=table, **more), labels)
    assert matrix is not None
    return matrix


def images(classes: int = 2, n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exact probabilities, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    p = softmax(1.5 * rng.normal(size=(n, classes)))
    return p, np.array([rng.choice(classes, p=row) for row in p])


def test_the_table_becomes_a_matrix() -> None:
    assert cost_matrix(CostSection(), LABELS) is None
    assert costs_of(TABLE).tolist() == [[0, 50_000], [5_000, 0]]
    three = costs_of({"a": {"a": 2.0, "b": 9.0}}, ("a", "b", "c"), other=7.0)
    assert three.tolist() == [[2, 9, 7], [7, 0, 7], [7, 7, 0]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"defect": {"ok": 1.0}}, "no label 'defect' in the data; allowed: defective, ok"),
        ({"ok": {"broken": 1.0}}, "no label 'broken'"),
        ({"defective": {"ok": 1.0}}, "'ok' predicted as 'defective' has no cost; add it, or set"),
        (
            {"defective": {"ok": 1.0, "defective": 2.0}, "ok": {"defective": 1.0}},
            "less than the correct prediction",
        ),
        ({"defective": {"ok": 1.0}, "ok": {"defective": 0.0}}, "no mistake on 'ok' costs more"),
    ],
)
def test_tables_that_are_refused(table: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        costs_of(table)


def test_the_recipe_takes_a_table_and_refuses_negative_costs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = '[run]\nname = "x"\n[data]\npath = "."\n[cost]\ncurrency = "EUR"\n'
    path.write_text(text + "table = { defective = { ok = 50000 }, ok = { defective = 5e3 } }\n")
    section = load_recipe(path).cost
    assert (section.table, section.currency) == (TABLE, "EUR")
    path.write_text(text + "table = { defective = { ok = -1 } }\nothers = 3\n")
    with pytest.raises(RecipeError, match=r"(?s)others: unknown key.*must be .* >= 0"):
        load_recipe(path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("table", [TABLE, {"defective": {"ok": 2.0, "defective": 1.0}, "ok": {"defective": 30.0}}])
def test_no_threshold_is_cheaper_for_labels_shrunk_towards_their_probabilities(
    table: dict[str, dict[str, float]], seed: int
) -> None:
    p, targets = images(seed=seed)
    costs = costs_of(table)
    decision = choose_decision(costs, LABELS, p, targets, currency="EUR")
    assert decision is not None and decision.threshold is not None and decision.label is not None
    assert decision.label == ("defective" if table is TABLE else "ok")
    column = LABELS.index(decision.label)

    def brute(threshold: float, shrinkage: float = 0.0) -> float:
        paid = 0.0
        for row, target in zip(p, targets, strict=True):
            predicted = column if row[column] >= threshold else 1 - column
            paid += (1 - shrinkage) * costs[target, predicted] + shrinkage * row @ costs[:, predicted]
        return paid / len(targets)

    own = mean_cost(decide(p, p, LABELS, decision), targets, costs)
    assert own == pytest.approx(brute(decision.threshold))
    grid = np.linspace(0, 1, 401)
    weight = 100 / (100 + (targets == column).sum())
    assert brute(decision.threshold, weight) <= min(brute(t, weight) for t in grid) + 1e-9
    positives = (targets == column).astype(float)
    assert threshold_costs(p[:, column], positives, costs, grid) == pytest.approx([brute(t) for t in grid])


def test_few_images_leave_the_bayes_threshold_and_many_move_it() -> None:
    costs = costs_of(TABLE)
    assert bayes_threshold(costs) == pytest.approx(5 / 55)
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.03, 0.97], [0.01, 0.99]])
    decision = choose_decision(costs, LABELS, p, np.array([0, 0, 1, 1]))
    assert decision is not None and decision.threshold == pytest.approx(5 / 55)
    even = choose_decision(
        costs_of({"defective": {"ok": 6.0}, "ok": {"defective": 5.0}}), LABELS, p, np.array([0, 0, 1, 1])
    )
    assert even is not None and even.threshold == pytest.approx(5 / 11)
    p[2] = [0.3, 0.7]
    decision = choose_decision(costs, LABELS, p, np.array([0, 0, 1, 1]))
    assert decision is not None and decision.threshold == pytest.approx(5 / 55), "one false alarm proves little"
    decision = choose_decision(costs, LABELS, np.tile(p, (1000, 1)), np.tile([0, 0, 1, 1], 1000))
    assert decision is not None and decision.threshold == pytest.approx((0.3 + 0.8) / 2)


@pytest.mark.parametrize("distance", [1.0, 2.0, 3.0])
def test_the_threshold_of_20_defects_in_400_costs_no_more_than_3_percent_more(distance: float) -> None:
    assert 0.0 <= threshold_regret(repetitions=80, distance=distance) <= 0.015


def test_exact_probabilities_lead_to_the_theoretical_threshold() -> None:
    p, targets = images(n=60_000, seed=9)
    decision = choose_decision(costs_of(TABLE), LABELS, p, targets)
    assert decision is not None and decision.threshold == pytest.approx(5 / 55, abs=0.02)


def test_more_labels_get_the_bayes_decision() -> None:
    labels = ("a", "b", "c")
    p, targets = images(classes=3, n=5_000)
    costs = np.array([[0.0, 20.0, 4.0], [1.0, 0.0, 1.0], [2.0, 6.0, 0.5]])
    decision = choose_decision(costs, labels, p, targets)
    assert decision is not None and decision.threshold is None
    predicted = decide(p, p, labels, decision)
    for row, label in zip(p[:200], predicted, strict=False):
        expected = [sum(row[t] * costs[t, a] for t in range(3)) for a in range(3)]
        assert expected[label] == min(expected)
    own = mean_cost(predicted, targets, costs)
    assert own < mean_cost(p.argmax(axis=1), targets, costs)
    assert own < min(mean_cost(np.full(len(targets), a), targets, costs) for a in range(3))


def test_two_labels_with_a_theoretical_threshold_decide_as_the_bayes_rule() -> None:
    p, targets = images(n=500)
    costs = costs_of(TABLE)
    rows = tuple(map(tuple, costs.tolist()))
    by_cost = decide(p, p, LABELS, Decision(costs=rows))
    by_threshold = decide(p, p, LABELS, Decision(costs=rows, label="defective", threshold=bayes_threshold(costs)))
    assert (by_cost == by_threshold).all() and (by_cost != p.argmax(axis=1)).any()
    assert (decide(p, p, LABELS) == p.argmax(axis=1)).all() and len(targets)


def test_the_cost_on_a_split_against_simpler_rules() -> None:
    p, targets = images(n=400)
    costs = costs_of(TABLE)
    decision = choose_decision(costs, LABELS, p, targets)
    assert decision is not None
    constant = cheapest_constant(costs, targets)
    found = split_cost("validation", decision, LABELS, p, targets, constant=constant)
    assert found.decided < found.likeliest and found.decided < found.constant
    assert found.constant == pytest.approx(min(mean_cost(np.full(400, a), targets, costs) for a in range(2)))
    assert (found.curve[0].threshold, found.curve[-1].threshold) == (0.0, 1.0)
    assert found.curve[0].cost == pytest.approx(mean_cost(np.zeros(400, dtype=np.int64), targets, costs))
    assert found.decided <= 1.1 * min(point.cost for point in found.curve)


def test_a_decision_survives_json_and_errors_are_found() -> None:
    decision = Decision(costs=((0.0, 5.0), (1.0, 0.0)), label="ok", threshold=0.25)
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision
    assert find_problem(decision, LABELS) == ""
    replace = msgspec.structs.replace
    assert "a row and a column for each of the 3" in find_problem(decision, ("a", "b", "c"))
    assert "not negative" in find_problem(replace(decision, costs=((0.0, -5.0), (1.0, 0.0))), LABELS)
    assert "finite" in find_problem(replace(decision, costs=((0.0, float("nan")), (1.0, 0.0))), LABELS)
    assert "belong together" in find_problem(replace(decision, label=None), LABELS)
    assert "two labels" in find_problem(replace(decision, label="cracked"), LABELS)
    assert "0 to 1" in find_problem(replace(decision, threshold=1.5), LABELS)


def test_a_mistake_in_the_table_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", count=10, labels=SHAPES[:2])
    (tmp_path / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\npath = "images"\n')
    table = "cost.table={ circle = { square = 1 }, cross = { circle = 1 } }"
    done = eyas(tmp_path, "split", "recipe.toml", "--set", table)
    assert done.code == 2 and "Traceback" not in done.err
    assert "no label 'square' in the data; allowed: circle, cross" in " ".join(done.err.split())
    assert not (tmp_path / "runs/toy/split/manifest.json").exists()
