"""`[run] compile`: a compiled network trains as the uncompiled one does."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_host.data.index import build_index
from eyas_host.data.split import Split, split_index
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection
from eyas_host.support.errors import TrainError
from eyas_host.train import compiled as compiled_module
from eyas_host.train.compiled import compiled
from eyas_host.train.student import DistillationTask
from eyas_host.train.view_cache import ViewCache


def test_a_compiled_network_trains_as_an_uncompiled_one(
    network: PixelClassifier, shape_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    monkeypatch.setattr(compiled_module, "BACKEND", backend)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    recipe = Recipe(
        run=RunSection(name="toy", device="cpu", workers=0),
        data=DataSection(path=str(shape_images), limit=30, split=(0.6, 0.2, 0.2)),
        image=ImageSection(size=32),
        student=StudentSection(views=1, batch=8),
    )
    split = Split(split_index(build_index(recipe.data), recipe.data, 0), tmp_path / "run")
    cache = ViewCache.make(tmp_path, recipe, split, copy.deepcopy(network))
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    first(torch.zeros(2, 3, 32, 32))
    states = []
    for enabled in (False, True):
        run = msgspec.structs.replace(recipe.run, compile=enabled)
        model, task = copy.deepcopy(first), DistillationTask(msgspec.structs.replace(recipe, run=run), split, cache)
        task.train(model, epochs=2, rate=1e-3, checkpoint=tmp_path / f"{enabled}.ckpt", title="toy")
        assert len(graphs) == (1 if enabled else 0)
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, atol=1e-6), name
    assert not np.allclose(states[0]["0.weight"], first.state_dict()["0.weight"], atol=1e-4)


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert compiled(torch.relu, enabled=False) is torch.relu
    with pytest.raises(TrainError, match=r"\[run\] compile = true needs a C\+\+ compiler"):
        compiled(torch.relu, enabled=True)
