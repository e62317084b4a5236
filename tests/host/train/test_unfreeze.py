"""Which layers train, how fast, and that the others do not move."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_host.evaluation.inference import logits_of, to_tensor
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe.training import TeacherSection
from eyas_host.train.engine import Groups, Hooks, Plan, fit
from eyas_host.train.schedule import Epoch, Schedule
from eyas_host.train.unfreeze import GradualUnfreezing, freeze_batch_norm, unfreeze

CPU = torch.device("cpu")


def train(
    model: PixelClassifier, groups: Groups, shape_frames: np.ndarray, checkpoint: Path, **more: Any
) -> list[Epoch]:
    targets = torch.arange(5).repeat_interleave(4)
    count = len(shape_frames)
    schedule = more.pop("schedule", Schedule(epochs=2, rate=0.01, weight_decay=0.5))
    evaluate = more.pop("evaluate", lambda m: validation_metrics(logits_of(m, shape_frames, CPU), targets.numpy()))

    def steps(epoch: int, first: int) -> Iterator[Tensor]:
        return (nn.functional.cross_entropy(model(to_tensor(shape_frames, CPU)), targets) for _ in range(first, 2))

    plan = Plan(title="toy", schedule=schedule, images=2 * count, batch=count, checkpoint=checkpoint)
    return fit(model, groups, plan, steps=steps, evaluate=evaluate, hooks=Hooks(prepare=freeze_batch_norm, **more))


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_frozen_weights_do_not_move_by_one_bit(
    network: PixelClassifier, shape_frames: np.ndarray, tmp_path: Path, ema: float
) -> None:
    model = copy.deepcopy(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = unfreeze(model, TeacherSection(unfreeze="3"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "backbone.classifier.weight" in trained and "backbone.conv_stem.weight" not in trained
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for n, p in model.named_parameters() if n in trained}
    train(
        model,
        groups,
        shape_frames,
        tmp_path / "a.ckpt",
        schedule=Schedule(epochs=2, rate=0.01, weight_decay=0.5, ema=ema),
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert any("running_mean" in name for name in before) and len(trained) < len(before)


def scripted(scores: list[float], seen: list[dict[str, Tensor]]) -> Callable[[nn.Module], dict[str, float]]:
    """Figures that were written before; keeps the weights that it is shown."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"combined": scores[len(seen) - 1], "balanced_accuracy": 0.0, "auc": 0.0}

    return evaluate


STAGED = TeacherSection(unfreeze="5", unfreeze_by="plateau", open_blocks=2, plateau_epochs=2, patience=3, epochs=20)


def blocks_of(model: PixelClassifier) -> list[str]:
    """The prefix of each block from the head down to the stem."""
    names = [f"blocks.{s}.{n}." for s, stage in enumerate(model.backbone.blocks) for n in range(len(stage))]  # type: ignore[arg-type]
    return [f"backbone.{name}" for name in (*reversed(names), "conv_stem.")]


def test_blocks_open_from_the_top_where_validation_gets_no_better(
    network: PixelClassifier, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    model = copy.deepcopy(network)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []
    scores = [0.1, 0.2, 0.2, 0.1, 0.3, 0.2, 0.2, 0.3, 0.2, 0.2, 0.9]
    history = train(
        model,
        unfreeze(model, STAGED),
        shape_frames,
        tmp_path / "a.ckpt",
        schedule=Schedule(epochs=20, rate=1e-3, weight_decay=0.5, patience=3),
        evaluate=scripted(scores, seen),
        stages=GradualUnfreezing(model, STAGED, "combined"),
    )
    # better in epochs 2 and 5; the third stage ends the training three epochs after it began
    stages = 4 * ["2 of 5 blocks"] + 3 * ["4 of 5 blocks"] + 3 * ["5 of 5 blocks"]
    assert [epoch.stage for epoch in history] == stages
    opened = {"2 of 5 blocks": 2, "4 of 5 blocks": 4, "5 of 5 blocks": 5}
    blocks = blocks_of(model)
    assert len(blocks) > 8
    for before, after, stage in zip([first, *seen], seen, stages, strict=False):
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert not any("running" in name for name in moved)
        assert {block for block in blocks if any(name.startswith(block) for name in moved)} == set(
            blocks[: opened[stage]]
        )
        assert "backbone.classifier.weight" in moved


def test_a_resumed_training_has_the_same_blocks_open(
    network: PixelClassifier, shape_frames: np.ndarray, tmp_path: Path
) -> None:
    ends = []
    for stops in ([20], [3, 20]):
        model, seen = copy.deepcopy(network), []
        for epochs in stops:
            torch.manual_seed(len(stops))
            checkpoint = tmp_path / f"{len(stops)}.ckpt"
            train(
                model,
                unfreeze(model, STAGED),
                shape_frames,
                checkpoint,
                schedule=Schedule(epochs=epochs, rate=1e-3, patience=3, shape="plateau", warmup=0.0),
                evaluate=scripted([0.1, 0.2, 0.2, 0.1, 0.3, 0.2, 0.2, 0.3, 0.2, 0.2], seen),
                stages=GradualUnfreezing(model, STAGED, "combined"),
            )
        ends.append((len(seen), model.state_dict()))
    (one, state), (other, resumed) = ends
    assert one == other == 10
    assert all(torch.equal(value, resumed[name]) for name, value in state.items())


def test_opened_blocks_are_ten_times_slower_than_the_head(network: PixelClassifier) -> None:
    model = copy.deepcopy(network)
    groups = unfreeze(model, TeacherSection(layer_decay=0.5, unfreeze_by="plateau", block_rate=0.1))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert scale[id(parameters["backbone.classifier.weight"])] == 1.0
    tops = [next(p for name, p in parameters.items() if name.startswith(block)) for block in blocks_of(model)]
    assert [scale[id(p)] for p in tops] == pytest.approx([0.1 * 0.5**n for n in range(len(tops))])


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
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    backbone = model.backbone
    layers = [backbone.classifier, backbone.conv_head, *reversed(list(backbone.blocks)), backbone.conv_stem]
    scales = [scale[id(next(layer.parameters()))] for layer in layers]
    assert scales[0] == 1.0
    assert all(a >= b for a, b in pairwise(scales))
    for value in scales:
        power = math.log(value) / math.log(0.7)  # type: ignore[arg-type]
        assert power == pytest.approx(round(power), abs=1e-9)
    assert scales[-1] == min(scale.values()) < 0.7**5
