"""BatchNorm of several processes: outputs, statistics and gradients are those of one process with the whole batch."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from eyas_host.pipeline import distributed
from eyas_host.train.batch_norm import _statistics, whole_batch_norms

ROWS, SIZE = 5, 32


def network() -> nn.Module:
    """A small student in double precision, so that a wrong term shows; channels of three means in its last layers."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("mobilenetv3_small_050", num_classes=3, drop_rate=0.0)
    return model.double().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    # shards that have nothing in common
    images += torch.arange(ROWS).view(-1, 1, 1, 1)
    return images.to(memory_format=torch.channels_last), torch.randn(ROWS, 3, generator=generator).double()


def state_after_a_step(model: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Gradients and buffers after one batch; the loss is a sum over its rows."""
    (model(images) * weights).sum().backward()
    distributed.sum_gradients(model.parameters())
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return gradients | {name: value.clone() for name, value in model.named_buffers()}


def one_of_two(rank: int, place: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    distributed.join_team(rank, 2, Path(place))
    model, (images, weights) = network(), batch()
    evaluated = copy.deepcopy(model)
    with whole_batch_norms(model):
        found = state_after_a_step(model, distributed.local_shard(images), distributed.local_shard(weights))
        model.eval()
        same = torch.equal(model(images), evaluated_like(evaluated, model)(images))
    assert "forward" not in vars(next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)))
    pipe.send(({name: value.numpy() for name, value in found.items()}, same))
    distributed.leave()


def evaluated_like(other: nn.Module, model: nn.Module) -> nn.Module:
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_two_processes_have_the_gradients_and_statistics_of_one() -> None:
    model, (images, weights) = network(), batch()
    expected = state_after_a_step(model, images, weights)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [context.Process(target=one_of_two, args=(rank, place, pipes[rank][1])) for rank in range(2)]
        for process in processes:
            process.start()
        try:
            assert all(pipe.poll(120) for pipe, _ in pipes)
            results: list[tuple[dict[str, Any], bool]] = [pipe.recv() for pipe, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for found, same in results:
        assert same, "evaluation is that of any other network"
        assert set(found) == set(expected)
        for name, value in expected.items():
            scale = max(float(value.abs().max()), 1e-3)  # gradients of biases before a norm are zero
            assert torch.allclose(torch.from_numpy(found[name]), value, rtol=0, atol=1e-9 * scale), name


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 7, 1, 1), (1, 2, 1, 1), (3, 4)])
def test_statistics_are_mean_and_biased_variance(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double() * 3 + 2
    mean, variance = _statistics(images)
    channels = images.transpose(0, 1).flatten(1).numpy()
    assert mean.numpy() == pytest.approx(channels.mean(axis=1))
    assert variance.numpy() == pytest.approx(channels.var(axis=1))


def test_half_precision_is_as_near_as_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 16 bits have statistics of 32; one process that takes itself for one of several."""
    monkeypatch.setattr(distributed, "sum_numbers", Tensor.double)
    images, weights = (value.float() for value in batch())

    def gradients(*, whole: bool, enabled: bool) -> Tensor:
        model = network().float()
        monkeypatch.setattr(distributed, "world_size", lambda: 2 if whole else 1)
        with whole_batch_norms(model), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(images)
        (output.float() * weights).sum().backward()
        return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])

    exact = gradients(whole=False, enabled=False)
    torches, ours = (gradients(whole=whole, enabled=True) for whole in (False, True))
    assert (gradients(whole=True, enabled=False) - exact).norm() < 1e-4 * exact.norm()
    assert 0 < (ours - exact).norm() < 1.2 * (torches - exact).norm()
