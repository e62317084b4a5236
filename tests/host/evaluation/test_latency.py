"""Real timings: turns, and networks built and measured; loose assertions, since the machine may be busy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes
from eyas_host.compress.prune.magnitude import prune_evenly
from eyas_host.evaluation.latency import Stopwatch
from eyas_host.evaluation.turns import take_turns
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe.image import ImageSection


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.evaluation.latency._BLOCK_SECONDS", 1.0)
    monkeypatch.setattr("eyas_host.evaluation.latency._SECONDS", 0.3)


def test_calls_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    times = take_turns(calls, 2, calls_per_turn=2, warm_up=1, clock=lambda: float(next(ticks)))
    assert "".join(order) == 3 * "aaabbb"
    assert times == {"a": [1000.0] * 4, "b": [1000.0] * 4}


@pytest.mark.parametrize(("runtime", "precision"), [("litert", "int8"), ("openvino", "fp32"), ("onnx", "fp32")])
def test_block_times_of_every_runtime_fit_the_latency_model(
    network: PixelClassifier, shape_frames: np.ndarray, runtime: Any, precision: Any
) -> None:
    with Stopwatch(runtime, ImageSection(size=64).preprocessing(), shape_frames[:4]) as stopwatch:
        dense = stopwatch.build(network, precision)
        measured = stopwatch.blocks(dense)
    assert (measured.runtime, measured.precision, measured.threads) == (runtime, precision, 1)
    assert not list(dense.root.parent.parent.glob(f"{dense.root.parent.name}*")), "its folder is left behind"
    latency = LatencyModel(measured, layer_shapes(network, size=64))
    smaller, _ = prune_evenly(network, keep=0.5, size=64)
    assert 0.2 < latency.ms(layer_shapes(smaller, size=64)) / latency.dense_ms < 0.9
