"""The loop against uninterrupted runs, plain second formulations and known answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_host.errors import TrainError
from eyas_host.train.loop import Epoch, Schedule, fit, pick_device, validation_figures
from eyas_host.train.schedule import rate_factor

CPU = torch.device("cpu")


class Toy:
    """A small net with everything that has a state: BatchNorm, dropout, two groups."""

    def __init__(self, checkpoint: Path, **schedule: object) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(48, 4)).astype(np.float32))
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0.5).long()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
        self.checkpoint = checkpoint
        self.schedule = Schedule(**({"epochs": 5, "rate": 0.05, "seed": 3} | schedule))  # type: ignore[arg-type]
        self.stop_at: tuple[int, int] | None = None

    def steps(self, epoch: int) -> Iterator[Tensor]:
        order = np.random.default_rng((9, epoch)).permutation(48)
        for number in range(4):
            if (epoch, number) == self.stop_at:
                raise KeyboardInterrupt
            rows = torch.from_numpy(order[12 * number : 12 * number + 12])
            yield nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return validation_figures(model(self.x).numpy(), self.y.numpy())

    def fit(self, **options: object) -> list[Epoch]:
        groups = [
            {"params": list(self.model[0].parameters()), "lr_scale": 0.5},
            {"params": [p for layer in self.model[1:] for p in layer.parameters()]},
        ]
        settings = {"steps": self.steps, "evaluate": self.evaluate} | options
        return fit(
            self.model,
            groups,
            schedule=self.schedule,
            steps_an_epoch=4,
            checkpoint=self.checkpoint,
            title="toy",
            **settings,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, ema: float) -> None:
    whole = Toy(tmp_path / "whole.ckpt", ema=ema)
    expected = whole.fit()
    killed = Toy(tmp_path / "killed.ckpt", ema=ema)
    killed.stop_at = (2, 2)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    torch.manual_seed(99)  # another process would not know the random state either
    resumed = Toy(tmp_path / "killed.ckpt", ema=ema)
    for parameter in resumed.model.parameters():
        parameter.data.normal_()
    got = resumed.fit()
    assert [e.epoch for e in got] == [1, 2, 3, 4, 5]
    assert [e.loss for e in got] == pytest.approx([e.loss for e in expected], abs=1e-6)
    assert got[-1].metrics == pytest.approx(expected[-1].metrics, abs=1e-6)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], value, atol=1e-6), name


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = Toy(tmp_path / "a.ckpt")
    history = first.fit()
    again = Toy(tmp_path / "a.ckpt")
    again.stop_at = (0, 0)
    assert again.fit() == history
    assert torch.equal(again.model[0].weight, first.model[0].weight)


def test_training_learns_and_keeps_the_best_weights(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=6)
    seen: list[Tensor] = []
    scores = iter([0.1, 0.2, 0.9, 0.5, 0.9, 0.3])

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        seen.append(model[0].weight.detach().clone())  # type: ignore[index, operator]
        return {"objective": next(scores), "balanced_accuracy": 0.0, "auc": 0.0}

    history = toy.fit(evaluate=evaluate)
    assert history[-1].loss < history[0].loss
    assert torch.equal(toy.model[0].weight, seen[2])
    assert not torch.equal(seen[2], seen[4])
    assert not toy.model.training


def test_patience_ends_training(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=20, patience=2)
    scores = iter([0.1, 0.4, 0.3, 0.4, 0.9])
    history = toy.fit(evaluate=lambda _: {"objective": next(scores), "balanced_accuracy": 0.0, "auc": 0.0})
    assert len(history) == 4


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt")

    def steps(epoch: int) -> Iterable[Tensor]:
        for number, loss in enumerate(toy.steps(epoch)):
            yield loss * (math.nan if (epoch, number) == (1, 2) else 1.0)

    with pytest.raises(TrainError, match="toy, epoch 2, step 3: the loss is nan"):
        toy.fit(steps=steps)
    assert all(torch.isfinite(p).all() for p in toy.model.parameters())


def test_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1.0
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert [rate_factor(0, 1, w) for w in (0.0, 0.1, 1.0)] == [1.0] * 3
    assert all(0 < f <= 1 for f in factors)


def test_no_gpu_where_there_is_none() -> None:
    assert pick_device("cpu") == CPU
    if torch.cuda.is_available():
        assert pick_device("cuda").type == pick_device("auto").type == "cuda"
    else:
        assert pick_device("auto") == CPU
        with pytest.raises(TrainError, match="sees no GPU"):
            pick_device("cuda")
