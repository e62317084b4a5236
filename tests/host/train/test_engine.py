"""The loop against uninterrupted runs, plain second formulations and known answers."""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_host.evaluation.inference import pick_device
from eyas_host.support.errors import TrainError
from eyas_host.train import engine
from eyas_host.train.losses import label_loss
from eyas_host.train.precision import resolve_amp
from eyas_host.train.schedule import (
    Epoch,
    Schedule,
    best_epoch,
    epochs_without_improvement,
    plateau_factor,
    rate_factor,
)
from tests.support.toy_training import Toy

CPU = torch.device("cpu")


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(("save_minutes", "again"), [(None, (2, 0)), (0.0, (2, 3))])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, ema: float, save_minutes: float | None, again: tuple[int, int]
) -> None:
    whole = Toy(tmp_path / "whole.ckpt", ema=ema)
    expected = whole.fit()
    killed = Toy(tmp_path / "killed.ckpt", ema=ema, save_minutes=save_minutes)
    killed.stop_at = (2, 3)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    torch.manual_seed(99)  # another process would not know the random state either
    resumed = Toy(tmp_path / "killed.ckpt", ema=ema, save_minutes=save_minutes)
    for parameter in resumed.model.parameters():
        parameter.data.normal_()
    got = resumed.fit()
    assert resumed.made[0] == again and resumed.made[-1] == (4, 3)
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
        return {"combined": next(scores), "balanced_accuracy": 0.0, "auc": 0.0}

    history = toy.fit(evaluate=evaluate)
    assert history[-1].loss < history[0].loss
    assert torch.equal(toy.model[0].weight, seen[2])
    assert not torch.equal(seen[2], seen[4])
    assert not toy.model.training


def test_patience_ends_training(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=20, patience=2)
    scores = iter([0.1, 0.4, 0.3, 0.4, 0.9])
    history = toy.fit(evaluate=lambda _: {"combined": next(scores), "balanced_accuracy": 0.0, "auc": 0.0})
    assert len(history) == 4


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt")

    def steps(epoch: int, first: int) -> Iterable[Tensor]:
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
        with pytest.raises(TrainError, match="finds no GPU"):
            pick_device("cuda")


def slowly(checkpoint: Path, sender: Connection) -> None:
    """Train until killed; reports each batch of the second epoch."""
    toy = Toy(checkpoint, ema=0.9, accumulate=2, save_minutes=0.0)

    def steps(epoch: int, first: int) -> Iterator[Tensor]:
        for loss in toy.steps(epoch, first):
            yield loss
            if epoch == 1:
                sender.send("a batch")
                time.sleep(0.2)

    toy.fit(steps=steps)


def test_a_run_killed_inside_an_epoch_ends_as_one_that_was_not(tmp_path: Path) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")  # nothing is imported again
    process = context.Process(target=slowly, args=(tmp_path / "killed.ckpt", sender))
    process.start()
    for _ in range(3):
        assert receiver.poll(60) and receiver.recv() == "a batch"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole, resumed = (Toy(tmp_path / f"{name}.ckpt", ema=0.9, accumulate=2) for name in ("whole", "killed"))
    expected, got = whole.fit(), resumed.fit()
    assert resumed.made[0] == (1, 2)
    assert [e.loss for e in got] == pytest.approx([e.loss for e in expected], abs=1e-6)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], value, atol=1e-6), name


def plainly(toy: Toy) -> Toy:
    """The toy without what depends on the size of a batch."""
    toy.model[1] = nn.Identity()
    toy.model[3] = nn.Identity()
    return toy


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """With class weights of 60 : 1, windows without a rare image, and a last window of one full and one odd batch."""
    order = torch.randperm(47, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.1, 1.0, 6.0])
    ends, losses = [], []
    for accumulate in (3, 1):
        toy = plainly(
            Toy(tmp_path / f"{accumulate}.ckpt", epochs=2, warmup=0.0, shape="plateau", accumulate=accumulate)
        )
        toy.model.double()
        loss, batch = label_loss("cross_entropy", class_weights=weights, label_smoothing=0.1), 18 // accumulate

        def steps(
            epoch: int, first: int, toy: Toy = toy, loss: nn.Module = loss, batch: int = batch
        ) -> Iterator[Tensor]:
            return (loss(toy.model(toy.x[rows].double()), toy.y[rows]) for rows in order.split(batch))

        scores = iter((0.1, 0.2))
        history = toy.fit(
            steps=steps, images=47, batch=batch, evaluate=lambda _, scores=scores: {"combined": next(scores)}
        )
        losses.append([epoch.loss for epoch in history])
        ends.append(toy.model.state_dict())
    for name, value in ends[1].items():
        assert torch.allclose(ends[0][name], value, atol=1e-6, rtol=0), name
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_checks_every_third_batch_change_nothing_and_name_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where each check waits for the device: the step is exact, and no checkpoint has such numbers."""
    every = Toy(tmp_path / "every.ckpt", ema=0.9)
    expected = every.fit()
    monkeypatch.setattr(engine, "CHECK_STEPS", {"cpu": 3})
    third = Toy(tmp_path / "third.ckpt", ema=0.9)
    assert [epoch.loss for epoch in third.fit()] == [epoch.loss for epoch in expected]
    states = zip(every.model.state_dict().values(), third.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states)
    for save_minutes in (None, 0.0):
        toy = Toy(tmp_path / f"{save_minutes}.ckpt", save_minutes=save_minutes)

        def steps(epoch: int, first: int, toy: Toy = toy) -> Iterable[Tensor]:
            for number, loss in enumerate(toy.steps(epoch, first), first):
                yield loss * (math.nan if (epoch, number) == (1, 1) else 1.0)

        with pytest.raises(TrainError, match="toy, epoch 2, step 2: the loss is nan"):
            toy.fit(steps=steps)
        assert len(toy.made) == (7 if save_minutes is None else 6)
        saved = torch.load(toy.checkpoint, weights_only=True)
        assert all(torch.isfinite(value).all() for value in saved["model"].values())
        assert len(saved["history"]) == 1 and all(map(math.isfinite, saved["losses"]))


def test_a_start_that_no_epoch_beats_is_kept(tmp_path: Path) -> None:
    """Also where the training was interrupted in between; an epoch that is only as good does not replace it."""
    toy = Toy(tmp_path / "a.ckpt", ema=0.5, epochs=3)
    first = copy.deepcopy(toy.model.state_dict())
    toy.stop_at = (2, 1)
    scores = {"combined": 0.5}
    with pytest.raises(KeyboardInterrupt):
        toy.fit(evaluate=lambda _: scores, start={"combined": 0.5})
    again = Toy(tmp_path / "a.ckpt", ema=0.5, epochs=3)
    again.fit(evaluate=lambda _: scores, start={"combined": 0.5})
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.items())
    better = Toy(tmp_path / "b.ckpt", epochs=3)
    better.fit(evaluate=lambda _: scores, start={"combined": 0.4})
    assert not torch.equal(better.model[0].weight, first["0.weight"])


@pytest.mark.parametrize("native", [False, True])
def test_automatic_precision(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert resolve_amp("auto", torch.device("cuda")) == ("bf16" if native else "no")
    assert resolve_amp("auto", CPU) == "no" and resolve_amp("bf16", CPU) == "bf16"


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped(tmp_path: Path, clip: float) -> None:
    toy, norms = Toy(tmp_path / "a.ckpt", epochs=1, clip=clip), []

    def look() -> None:
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in toy.model.parameters() if p.grad is not None)))

    toy.fit(after_step=look)
    assert len(norms) == 4
    assert all(n == pytest.approx(clip, rel=1e-3) for n in norms) if clip else min(norms) > 0.01


def test_bfloat16_learns_and_leaves_float32_weights(tmp_path: Path) -> None:
    toy, kinds = Toy(tmp_path / "a.ckpt", amp="bf16"), set()
    toy.model[4].register_forward_hook(lambda module, inputs, output: kinds.add((module.training, output.dtype)))
    history = toy.fit()
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in toy.model.parameters()} == {torch.float32}
    assert history[-1].loss < history[0].loss - 0.1
    in_full = Toy(tmp_path / "b.ckpt").fit()
    assert history[-1].loss != in_full[-1].loss
    assert history[-1].loss == pytest.approx(in_full[-1].loss, abs=0.1)


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="amp = 'fp16' needs a GPU"):
        Toy(tmp_path / "a.ckpt", amp="fp16").fit()


def test_a_gradient_that_is_no_number(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt")

    def steps(epoch: int, first: int) -> Iterable[Tensor]:
        for number, loss in enumerate(toy.steps(epoch)):
            flat = 0.0 * toy.model[0].weight.sum() if (epoch, number) == (0, 1) else loss.detach() ** 2
            yield loss + flat.sqrt()

    with pytest.raises(TrainError, match="toy, epoch 1, step 2: the gradient's norm is nan"):
        toy.fit(steps=steps)
    assert all(torch.isfinite(p).all() for p in toy.model.parameters())


def test_the_metric_chooses_the_epoch(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=4, metric="loss")
    seen: list[Tensor] = []
    losses = iter([0.9, 0.3, 0.4, 0.8])

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model[0].weight.detach().clone())  # type: ignore[index, operator]
        return {"combined": float(len(seen)), "balanced_accuracy": 0.0, "auc": math.nan, "loss": next(losses)}

    toy.fit(evaluate=evaluate)
    assert torch.equal(toy.model[0].weight, seen[1])
    missing = Toy(tmp_path / "b.ckpt", metric="auc")
    with pytest.raises(TrainError, match="metric = 'auc' is nan on validation: a class may be missing"):
        missing.fit(evaluate=lambda _: {"balanced_accuracy": 0.0, "auc": math.nan})


def epochs(*values: float, stages: str = "") -> list[Epoch]:
    """A history of these figures; a letter of `stages` an epoch."""
    names = stages or "a" * len(values)
    return [
        Epoch(n + 1, 1.0, 1.0, {"combined": value}, stage)
        for n, (value, stage) in enumerate(zip(values, names, strict=True))
    ]


def plain_factor(history: list[Epoch], patience: int, following: str) -> float:
    factor, bad, best = 1.0, 0, -math.inf
    for epoch, after in zip(history, [*(e.stage for e in history[1:]), following], strict=True):
        value = epoch.metrics["combined"]
        bad = 0 if value > best else bad + 1
        best = max(best, value)
        if after != epoch.stage:
            bad = 0
        elif bad >= patience:
            factor, bad = factor / 10, 0
    return factor


def test_the_rate_falls_at_plateaus() -> None:
    schedule = Schedule(epochs=9, rate=0.1, shape="plateau", plateau_epochs=2)
    assert plateau_factor(schedule, [], "") == 1.0
    history = epochs(0.1, 0.3, 0.2, 0.3, 0.2, 0.2, 0.4)
    factors = [plateau_factor(schedule, history[:n], "a") for n in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    rng = np.random.default_rng(0)
    for _ in range(50):
        stages = "".join(sorted(rng.choice(list("abc"), 9)))
        history = epochs(*rng.integers(5, size=9).tolist(), stages=stages)
        for patience in (1, 2, 3):
            schedule = Schedule(epochs=9, rate=0.1, shape="plateau", plateau_epochs=patience)
            assert plateau_factor(schedule, history, "c") == pytest.approx(plain_factor(history, patience, "c"))


def test_a_plateau_lowers_the_rate_of_a_training(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a.ckpt", epochs=5, rate=0.04, shape="plateau", plateau_epochs=2, warmup=0.3)
    scores = iter([0.4, 0.5, 0.5, 0.1, 0.9])
    history = toy.fit(evaluate=lambda _: {"combined": next(scores), "balanced_accuracy": 0.0, "auc": 0.0})
    assert [e.rate for e in history] == pytest.approx([0.04 * 4 / 6, 0.04, 0.04, 0.04, 0.004])


def test_epochs_without_improvement_are_of_the_last_stage() -> None:
    assert epochs_without_improvement([], "combined") == 0
    assert epochs_without_improvement(epochs(0.5, 0.5, 0.4), "combined") == 2
    assert epochs_without_improvement(epochs(0.5, 0.4, 0.4, stages="aab"), "combined") == 1
    assert epochs_without_improvement(epochs(0.5, 0.4, 0.6, stages="aab"), "combined") == 0
    assert best_epoch(epochs(0.2, 0.5, 0.5), "combined") == 1
