"""What a companion does before it trains along."""

from __future__ import annotations

import os
import threading

import msgspec
import pytest

from eyas_host.quant import kernels
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.stages import companion
from eyas_host.support.errors import CompressError

RECIPE = Recipe(run=RunSection(name="toy"), data=DataSection(path="images"))


@pytest.mark.parametrize(("method", "times"), [("qat", 1), ("ptq", 0)])
def test_kernels_are_compiled_ahead_where_int8_training_needs_them(
    monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:
    """What cannot be compiled is left to the stage, which says why and goes on without."""
    calls = []

    def load() -> None:
        calls.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise CompressError("the folder cannot be written")

    monkeypatch.setattr(kernels, "load_kernels", load)
    quantize = msgspec.structs.replace(RECIPE.quantize, method=method)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(
        target=companion._compile_kernels, args=(msgspec.structs.replace(RECIPE, quantize=quantize),)
    )
    thread.start()
    thread.join()
    assert calls == [19] * times
    assert os.getpriority(os.PRIO_PROCESS, 0) == before, "the training keeps its own"
