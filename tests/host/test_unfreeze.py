"""Which layers train, how fast, and that the others do not move."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eyas_host.recipe import TeacherSection
from eyas_host.train.loop import Schedule, fit, logits_of, to_tensor, validation_figures
from eyas_host.train.models import PixelClassifier
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze

CPU = torch.device("cpu")


def test_frozen_weights_do_not_move_by_one_bit(
    network: PixelClassifier, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    model = copy.deepcopy(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = unfreeze(model, TeacherSection(unfreeze="3"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "backbone.classifier.weight" in trained and "backbone.conv_stem.weight" not in trained
    assert {id(p) for g in groups for p in g["params"]} == {  # type: ignore[attr-defined]
        id(p) for n, p in model.named_parameters() if n in trained
    }
    targets = torch.arange(5).repeat_interleave(4)
    fit(
        model,
        groups,
        steps=lambda epoch: (
            nn.functional.cross_entropy(model(to_tensor(shape_frames, CPU)), targets) for _ in range(2)
        ),
        evaluate=lambda m: validation_figures(logits_of(m, shape_frames, CPU), targets.numpy()),
        schedule=Schedule(epochs=2, rate=0.01, weight_decay=0.5),
        steps_an_epoch=2,
        checkpoint=tmp_path / "a.ckpt",
        title="toy",
        prepare=freeze_batch_norm,
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert any("running_mean" in name for name in before) and len(trained) < len(before)


def test_unfreezing_all_and_none(network: PixelClassifier) -> None:
    model = copy.deepcopy(network)
    blocks = dict(model.backbone.blocks.named_modules())

    def trained() -> set[str]:
        return {n.removeprefix("backbone.") for n, p in model.named_parameters() if p.requires_grad}

    unfreeze(model, TeacherSection(unfreeze="0"))
    assert trained() == {f"{layer}.{kind}" for layer in ("conv_head", "classifier") for kind in ("weight", "bias")}
    head = trained()
    unfreeze(model, TeacherSection(unfreeze="1"))
    assert trained() - head == {f"blocks.5.0.{n}" for n, _ in blocks["5.0"].named_parameters()}
    unfreeze(model, TeacherSection(unfreeze="all"))
    assert all(p.requires_grad for p in model.parameters())


def test_rates_fall_from_the_head_to_the_stem(network: PixelClassifier) -> None:
    model = copy.deepcopy(network)
    groups = unfreeze(model, TeacherSection(layer_decay=0.7))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    backbone = model.backbone
    layers = [backbone.classifier, backbone.conv_head, *reversed(list(backbone.blocks)), backbone.conv_stem]
    scales = [scale[id(next(layer.parameters()))] for layer in layers]
    assert scales[0] == 1.0
    assert all(a >= b for a, b in pairwise(scales))
    for value in scales:
        power = math.log(value) / math.log(0.7)  # type: ignore[arg-type]
        assert power == pytest.approx(round(power), abs=1e-9)
    assert scales[-1] == min(scale.values()) < 0.7**5
