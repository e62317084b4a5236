"""Networks built and timed for real: only loose assertions, the machine may be busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eyas_host.compress.prune.latency_model import LatencyModel, layers_of
from eyas_host.compress.prune.magnitude import prune_evenly
from eyas_host.evaluate.latency import Stopwatch
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe.image import ImageSection


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.evaluate.latency._BLOCK_SECONDS", 1.0)
    monkeypatch.setattr("eyas_host.evaluate.latency._SECONDS", 0.3)


def test_a_smaller_network_is_faster_here(network: PixelClassifier, shape_frames: np.ndarray) -> None:
    spec = ImageSection(size=64).preprocessing()
    smaller, _ = prune_evenly(network, keep=0.4, size=64)
    with Stopwatch("litert", spec, shape_frames[:4]) as watch:
        dense, pruned = watch.build(network), watch.build(smaller)
        before, after = watch.medians([dense, pruned])
        measured = watch.blocks(dense)
    assert 0 < after < before
    assert (measured.runtime, measured.precision, measured.threads) == ("litert", "int8", 1)
    latency = LatencyModel(measured, layers_of(network, size=64))
    predicted = latency.ms(layers_of(smaller, size=64)) / latency.dense_ms
    assert predicted == pytest.approx(after / before, abs=0.25)
    assert not list(Path(dense.root.parent).parent.glob(f"{dense.root.parent.name}*"))


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_the_tables_of_other_runtimes_are_understood(
    network: PixelClassifier, shape_frames: np.ndarray, runtime: Any
) -> None:
    with Stopwatch(runtime, ImageSection(size=64).preprocessing(), shape_frames[:4]) as watch:
        measured = watch.blocks(watch.build(network, "fp32"))
    latency = LatencyModel(measured, layers_of(network, size=64))
    smaller, _ = prune_evenly(network, keep=0.5, size=64)
    assert 0.2 < latency.ms(layers_of(smaller, size=64)) / latency.dense_ms < 0.9
