"""Parity, gates, and the choice of the artefact that each runtime runs."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import Artefact, Confidence
from eyas_host.evaluation.parity import Parity, compare, refusal
from eyas_host.evaluation.verdict import Latency, choose
from eyas_host.recipe.export import GateSection
from eyas_host.support.errors import GateError

GOOD = Parity(
    reference="qat",
    agreement=0.99,
    class_agreement=(0.99, 0.99),
    mean_dp=0.005,
    max_dp=0.1,
    mean_dlogit=0.05,
    max_dlogit=0.5,
    drop=0.0,
    drop_interval=(-0.01, 0.01),
    drop_bound=0.01,
    class_drop=(0.0, 0.0),
)


def artefact(name: str) -> Artefact:
    runtime, precision = name.split("-")
    return Artefact(name=name, runtime=runtime, precision=precision, files=())  # type: ignore[arg-type]


def chosen(refused: dict[str, str], **latency: float | np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
    """The artefact that LiteRT runs at these milliseconds (of each turn), and why."""
    turns = {f"litert-{precision}": np.broadcast_to(ms, 30).tolist() for precision, ms in latency.items()}
    times = {name: Latency(float(np.median(ms)), max(ms), tuple(ms)) for name, ms in turns.items()}
    return choose([artefact(name) for name in times], {f"litert-{p}": why for p, why in refused.items()}, times)


def test_parity_compares_with_the_right_network() -> None:
    targets = np.array([0, 0, 1, 1])
    pruned = np.log([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    qat = np.log([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.4, 0.6]])
    int8 = np.log([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]])
    logits = {"pruned": pruned, "qat": qat, "litert-int8": int8, "litert-fp32": pruned}
    parity = compare(logits, "litert-int8", targets, confidence=Confidence())
    assert (parity.reference, parity.agreement, parity.class_agreement) == ("qat", 0.75, (1.0, 0.5))
    assert parity.mean_dp == pytest.approx((0.1 + 0.0 + 0.0 + 0.2) / 4)
    assert parity.max_dp == pytest.approx(0.2)
    steps = [np.log(9 / 8), np.log(2), np.log(3 / 2), np.log(3 / 2)]
    assert parity.mean_dlogit == pytest.approx(sum(steps) / 8)
    assert parity.max_dlogit == pytest.approx(np.log(2))
    assert parity.drop == pytest.approx(0.5)  # from 1.0 to (0.5 + 0.5) / 2
    assert parity.class_drop == (0.5, 0.5)
    assert parity.drop_bound >= parity.drop and parity.drop_interval[0] <= 0.5 <= parity.drop_interval[1]
    softer = compare(logits, "litert-int8", targets, confidence=Confidence(temperature=10.0))
    assert softer.max_dp < parity.max_dp and softer.max_dlogit == parity.max_dlogit
    own = compare(logits, "litert-fp32", targets, confidence=Confidence())
    assert (own.reference, own.agreement, own.drop) == ("pruned", 1.0, 0.0)


def test_a_label_without_images_has_no_parity_of_its_own() -> None:
    logits = np.log([[0.9, 0.1], [0.8, 0.2]])
    parity = compare({"pruned": logits, "onnx-fp32": logits}, "onnx-fp32", np.array([0, 0]), confidence=Confidence())
    assert (parity.class_agreement, parity.class_drop) == ((1.0, None), (0.0, None))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"agreement": 0.94}, "agreement"),
        ({"mean_dp": 0.021}, "mean |dp|"),
        ({"drop": 0.031}, "drop"),
        ({"mean_dp": float("nan")}, "mean |dp|"),
    ],
)
def test_each_bound_refuses(change: dict[str, float], word: str) -> None:
    assert refusal("litert-int8", GOOD, GateSection()) == ""
    assert word in refusal("litert-int8", msgspec.structs.replace(GOOD, **change), GateSection())


def test_int8_runs_only_where_it_is_faster() -> None:
    assert chosen({}, int8=1.0, fp32=2.0)[0] == {"litert": "litert-int8"}
    use, reasons = chosen({}, int8=2.0, fp32=1.0)
    assert use == {"litert": "litert-fp32"}
    assert "not faster" in reasons["litert"] and "0.50 x" in reasons["litert"]


def measured(rng: np.random.Generator, speedup: float, scatter: float) -> dict[str, np.ndarray]:
    """Milliseconds of 30 turns: a drifting machine slows both variants alike, and each has a scatter of its own."""
    drift = np.exp(np.cumsum(0.02 * rng.standard_normal(30)))
    own = np.exp(scatter * rng.standard_normal((2, 30)))
    return {"fp32": speedup * drift * own[0], "int8": drift * own[1]}


def share_of_int8(speedup: float, scatter: float) -> float:
    """The fraction of 200 simulated measurements after which int8 is what runs."""
    rng = np.random.default_rng(0)
    return float(
        np.mean([chosen({}, **measured(rng, speedup, scatter))[0] == {"litert": "litert-int8"} for _ in range(200)])
    )


@pytest.mark.parametrize("scatter", [0.001, 0.01, 0.05])
def test_a_difference_within_the_scatter_is_none(scatter: float) -> None:
    assert share_of_int8(1.0, scatter) == 0.0
    assert share_of_int8(1.03, scatter) <= 0.05, "as much as the place in memory changes"
    assert share_of_int8(1.3, scatter) == 1.0


def test_a_fast_median_of_a_third_of_slow_turns_is_not_enough() -> None:
    int8 = np.where(np.arange(30) % 3 == 0, 1.2, 0.8)
    use, reasons = chosen({}, fp32=1.0, int8=int8)
    assert use == {"litert": "litert-fp32"}
    assert "int8 not faster beyond the scatter" in reasons["litert"]
    assert "int8 1.25 x, 0.83 to 1.25 in the middle eight tenths; faster counts from 1.05 x" in reasons["litert"]


def test_a_refused_artefact_is_not_run() -> None:
    use, reasons = chosen({"int8": "why"}, int8=1.0, fp32=2.0)
    assert use == {"litert": "litert-fp32"} and "refused: int8" in reasons["litert"]
    assert chosen({"fp32": "why"}, int8=2.0, fp32=1.0)[0] == {"litert": "litert-int8"}
    assert chosen({"int8": "why"}, int8=1.0, fp32=4.0, int16=3.0)[0] == {"litert": "litert-int16"}
    with pytest.raises(GateError, match="no artefact passes the gates: fp32: this; int8: that"):
        chosen({"fp32": "this", "int8": "that"}, fp32=2.0, int8=1.0)
