"""The parts of `benchmarks/loop.py`: its reference bounds are what they say, and a killed run goes on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binomtest

from tests.support.paths import ROOT


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_mixture_is_the_mean_of_likelihood_ratios(part: Any) -> None:
    """Excluded where bets on all rates below the limit, evenly mixed, have won 20 for 1."""
    wrong, limit = (np.random.default_rng(2).random((1, 400)) < 0.1).astype(float), 0.17
    excluded = part("loop_accuracy")._mixture(wrong, limit)[0]
    assert 5 < excluded.argmax() < 399 and excluded.any()
    for labels in (10, excluded.argmax(), excluded.argmax() + 1, 250):
        k, n = wrong[0, :labels].sum(), labels

        def ratio(q: float, k: float = k, n: int = n) -> float:
            return float((q / limit) ** k * ((1 - q) / (1 - limit)) ** (n - k) / limit)

        assert excluded[labels - 1] == (quad(ratio, 0, limit, points=[k / n])[0] >= 20), labels


def test_clopper_pearson_is_scipys_interval(part: Any) -> None:
    loop = part("loop_accuracy")
    wrong = (np.random.default_rng(3).random((1, 300)) < 0.1).astype(float)
    reached = loop._clopper_pearson(loop.Streams(wrong, wrong, 0.1, 0.1), union=False)[0]
    assert reached.any() and not reached.all()
    for labels in range(5, 301, 5):
        exact = binomtest(int(wrong[0, :labels].sum()), labels, alternative="less").proportion_ci(0.95, "exact").high
        assert reached[labels - 1] == (exact <= 0.15), labels


def test_labels_until_a_gain_between_two_sizes(part: Any) -> None:
    needed = part("loop_choice")._needed
    assert needed((25, 100, 400), np.array([0.2, 0.6, 1.0])) == pytest.approx(200)
    assert needed((25, 100, 400), np.array([0.9, 0.7, 1.0])) == 25
    assert needed((25, 100, 400), np.array([0.1, 0.2, 0.79])) == 400


def test_a_killed_run_goes_on_and_what_is_missing_is_shown(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop: ModuleType = part("loop")
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def section(name: str, ends: bool = True) -> Any:
        def run(quick: bool, root: Path) -> dict[str, Any]:
            calls.append(name)
            if not ends:
                raise KeyboardInterrupt
            return {"a": loop.Figure(value=float(len(calls)), unit="")}

        return run

    def figures(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["loop.py", "--json", "loop.json", *words])
        loop.main()
        tree = msgspec.json.decode(Path("loop.json").read_bytes())
        return {key: figure["value"] for key, figure in tree["figures"].items()}

    monkeypatch.setattr(loop, "SECTIONS", {"one": section("one"), "two": section("two", ends=False)})
    with pytest.raises(KeyboardInterrupt):
        figures()
    loop.SECTIONS["two"] = section("two")
    with monkeypatch.context() as other:
        other.setattr(loop, "code_of", lambda _: 64 * "0")
        other.setitem(loop.SECTIONS, "one", section("one of other code", ends=False))
        with pytest.raises(KeyboardInterrupt):
            figures()
        assert calls.pop() == "one of other code", "what other code found is not taken over"
    assert figures() == {"one: a": 1.0, "two: a": 3.0}
    assert calls == ["one", "two", "two"]
    assert figures() == {"one: a": 4.0, "two: a": 5.0}, "a finished run is not gone on with"
    loop.SECTIONS["three"] = section("three")
    assert figures("--section", "one") == {"one: a": 6.0, "two: a": 5.0, "three: figures": None}
