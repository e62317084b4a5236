"""Real timings: turns, and networks built and measured; loose assertions, since the machine may be busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes
from eyas_host.compress.prune.magnitude import prune_evenly
from eyas_host.evaluation.latency import Stopwatch, take_turns
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


def test_a_smaller_network_is_faster_here(network: PixelClassifier, shape_frames: np.ndarray) -> None:
    spec = ImageSection(size=64).preprocessing()
    smaller, _ = prune_evenly(network, keep=0.4, size=64)
    with Stopwatch("litert", spec, shape_frames[:4]) as stopwatch:
        dense, pruned = stopwatch.build(network), stopwatch.build(smaller)
        before, after = stopwatch.medians([dense, pruned])
        measured = stopwatch.blocks(dense)
    assert 0 < after < before
    assert (measured.runtime, measured.precision, measured.threads) == ("litert", "int8", 1)
    latency = LatencyModel(measured, layer_shapes(network, size=64))
    predicted = latency.ms(layer_shapes(smaller, size=64)) / latency.dense_ms
    assert predicted == pytest.approx(after / before, abs=0.25)
    assert not list(Path(dense.root.parent).parent.glob(f"{dense.root.parent.name}*"))


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_block_times_of_other_runtimes_fit_the_latency_model(
    network: PixelClassifier, shape_frames: np.ndarray, runtime: Any
) -> None:
    with Stopwatch(runtime, ImageSection(size=64).preprocessing(), shape_frames[:4]) as stopwatch:
        measured = stopwatch.blocks(stopwatch.build(network, "fp32"))
    latency = LatencyModel(measured, layer_shapes(network, size=64))
    smaller, _ = prune_evenly(network, keep=0.5, size=64)
    assert 0.2 < latency.ms(layer_shapes(smaller, size=64)) / latency.dense_ms < 0.9
