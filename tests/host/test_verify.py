"""Gates and choices: what is refused, what each runtime runs, and how parity is counted."""

from __future__ import annotations

import numpy as np
import pytest

from eyas_host.cli import STAGES
from eyas_host.compile.bundle import golden_rows
from eyas_host.errors import GateError
from eyas_host.recipe import GateSection
from eyas_host.verify import Latency, Parity, choose, compare, refusal

GOOD = Parity(reference="qat", agreement=0.99, mean_dp=0.005, max_dp=0.1, drop=0.0, drop_bound=0.01)


def latencies(int8: float, fp32: float) -> dict[str, Latency]:
    return {"litert-int8": Latency(int8, int8), "litert-fp32": Latency(fp32, fp32)}


def test_parity_is_counted_against_the_right_network() -> None:
    targets = np.array([0, 0, 1, 1])
    pruned = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    qat = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.4, 0.6]])
    int8 = np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]])
    parity = compare({"pruned": pruned, "qat": qat, "litert-int8": int8, "litert-fp32": pruned}, "litert-int8", targets)
    assert (parity.reference, parity.agreement) == ("qat", 0.75)
    assert parity.mean_dp == pytest.approx((0.1 + 0.0 + 0.0 + 0.2) / 4)
    assert parity.max_dp == pytest.approx(0.2)
    assert parity.drop == pytest.approx(0.5)  # from 1.0 to (0.5 + 0.5) / 2
    assert parity.drop_bound >= parity.drop
    own = compare({"pruned": pruned, "qat": qat, "litert-fp32": pruned}, "litert-fp32", targets)
    assert (own.reference, own.agreement, own.drop) == ("pruned", 1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"agreement": 0.94}, "agreement"), ({"mean_dp": 0.021}, "mean |dp|"), ({"drop": 0.031}, "drop")],
)
def test_each_bound_refuses(change: dict[str, float], word: str) -> None:
    values = {name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | change
    assert refusal("litert-int8", GOOD, GateSection()) == ""
    assert word in refusal("litert-int8", Parity(**values), GateSection())


def test_int8_runs_only_where_it_is_faster() -> None:
    assert choose(["litert"], {}, latencies(1.0, 2.0))[0] == {"litert": "litert-int8"}
    use, reasons = choose(["litert"], {}, latencies(2.0, 1.0))
    assert use == {"litert": "litert-fp32"}
    assert "not faster" in reasons["litert"] and "0.50 x" in reasons["litert"]


def test_a_refused_artefact_is_not_run() -> None:
    assert choose(["litert"], {"litert-int8": "why"}, latencies(1.0, 2.0))[0] == {"litert": "litert-fp32"}
    assert choose(["litert"], {"litert-fp32": "why"}, latencies(2.0, 1.0))[0] == {"litert": "litert-int8"}
    with pytest.raises(GateError, match="nothing may be packed"):
        choose(["litert"], {"litert-fp32": "why", "litert-int8": "why"}, latencies(1.0, 2.0))


def test_golden_pictures_go_from_unsure_to_sure_without_the_closest_calls() -> None:
    sure = np.linspace(0.5, 1.0, 40)
    probabilities = np.stack([sure, 1 - sure], axis=1)[np.random.default_rng(0).permutation(40)]
    rows = golden_rows(probabilities, 6)
    confidence = probabilities.max(axis=1)[rows]
    assert len(set(rows)) == 6
    assert list(confidence) == sorted(confidence)
    assert confidence[0] > 0.54 and confidence[-1] == 1.0


def test_the_command_line_knows_the_chain() -> None:
    from eyas_host.chain import STAGES as CHAIN

    assert tuple(stage.name for stage in CHAIN) == STAGES
