"""Pruning: channels, single weights, plans, latency model, importance and the closed-loop search."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eyas_device.bench.blocks import Block, BlockTimes
from eyas_device.bench.result import Quantiles
from eyas_host.compress.prune.channels import channel_groups, least_important_cuts, magnitude_importance
from eyas_host.compress.prune.importance import Step, cheapest_cuts, taylor_importance
from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes, read_table
from eyas_host.compress.prune.magnitude import ZeroKeeper, channel_plan, prune_channels, prune_evenly, prune_weights
from eyas_host.compress.prune.rounds import TOLERANCE, FrontPoint, search_step
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.models.pruned import PrunePlan, cut_channels, rebuild_channels
from eyas_host.quant.fold import fold_for_deployment, fold_norms
from eyas_host.report.plots import front
from eyas_host.support.errors import CompressError
from tests.support.block_times import block_times

SIZE = 64
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)


@pytest.fixture(scope="module")
def pixels(shape_frames: np.ndarray) -> Tensor:
    return torch.from_numpy(shape_frames).permute(0, 3, 1, 2).float()


@torch.inference_mode()
def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixels)


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# Targets and plans


@pytest.fixture(scope="module")
def pruned(network: PixelClassifier) -> tuple[PixelClassifier, PrunePlan]:
    return prune_channels(network, mac_ratio=0.6, size=SIZE)


def costs(model: PixelClassifier) -> list[tuple[str, float, int]]:
    """Name, multiply-accumulates and outputs of each convolution and linear layer, counted by hooks."""
    found = []
    names = {module: name for name, module in model.backbone.named_modules()}

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        found.append((names[module], float(output.numel() * module.weight[0].numel()), output.numel()))

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    logits_of(model, EXAMPLE)
    for handle in handles:
        handle.remove()
    return found


def multiply_accumulates(model: PixelClassifier) -> float:
    return sum(macs for _, macs, _ in costs(model))


def test_channels_are_pruned_to_the_ratio(
    network: PixelClassifier, pruned: tuple[PixelClassifier, PrunePlan], pixels: Tensor
) -> None:
    model, plan = pruned
    assert plan.macs_after / plan.macs_before == multiply_accumulates(model) / multiply_accumulates(network)
    assert logits_of(model, pixels).shape == (20, 5)
    assert all(width % 8 == 0 for width in widths(model).values())
    assert sum(widths(model).values()) < sum(widths(network).values())
    assert plan.parameters_before == sum(int((p != 0).sum()) for p in network.backbone.parameters())
    assert plan.parameters_after == sum(int((p != 0).sum()) for p in model.backbone.parameters())
    assert plan.parameters_after < plan.parameters_before


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"])
def test_the_target_is_met_within_three_points(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 5, "random")[0].eval()
    dense, before = multiply_accumulates(model), widths(model)
    for keep in (0.9, 0.8, 0.5):
        pruned, plan = prune_channels(model, mac_ratio=keep, size=SIZE)
        assert keep - 0.03 <= multiply_accumulates(pruned) / dense <= keep, (name, keep)
        assert (plan.macs_before, plan.macs_after) == (dense, multiply_accumulates(pruned))
        fractions = [width / before[layer] for layer, width in widths(pruned).items() if before[layer] >= 96]
        assert max(fractions) - min(fractions) < 0.2, "wide layers lose about the same fraction"
        assert all(width % 8 == 0 for width in widths(pruned).values())


def rescaled(network: PixelClassifier) -> PixelClassifier:
    """The same function, with every filter in front of a batch normalisation scaled by .2 to 5."""
    model = copy.deepcopy(network)
    written: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def convolution(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        written[id(output)] = module
        outputs.append(output)

    def norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        pairs.append((written[id(args[0])], module))

    handles = [m.register_forward_hook(convolution) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(norm) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    logits_of(model, EXAMPLE)
    for handle in handles:
        handle.remove()
    assert len(pairs) == 34, "mobilenetv3_small_100 has 34 batch normalisations"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv, bn in pairs:
            scale = 0.2 + 4.8 * torch.rand(conv.out_channels, generator=generator)
            conv.weight.mul_(scale.reshape(-1, 1, 1, 1))
            assert bn.running_mean is not None and bn.running_var is not None
            bn.running_mean.mul_(scale)
            bn.running_var.copy_((bn.running_var + bn.eps) * scale.square() - bn.eps)
    return model


def test_pruning_does_not_depend_on_the_scale_of_filters_before_a_norm(
    network: PixelClassifier, pixels: Tensor
) -> None:
    other = rescaled(network)
    expected = logits_of(network, pixels)
    assert float((logits_of(other, pixels) - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    groups = channel_groups(network, size=SIZE)
    one, two = (magnitude_importance(model, groups) for model in (network, other))
    for left, right in zip(one, two, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3)
    for prune in (prune_channels, prune_evenly):
        asked = {"mac_ratio": 0.6} if prune is prune_channels else {"keep": 0.6}
        first, second = (prune(model, size=SIZE, **asked)[1].cuts for model in (network, other))  # type: ignore[operator]
        differing = sum(len({*a[2]} ^ {*b[2]}) for a, b in zip(first, second, strict=True))
        assert differing <= 4, "but for ties"
    sparse = [prune_weights(model, sparsity=0.5, size=SIZE)[0] for model in (network, other)]
    zeros = [torch.cat([(p == 0).flatten() for p in model.parameters() if p.ndim > 1]) for model in sparse]
    assert int((zeros[0] != zeros[1]).sum()) < 1e-3 * int(zeros[0].sum())


def test_importance_by_the_loss_does_not_depend_on_it_either(network: PixelClassifier, pixels: Tensor) -> None:
    targets = torch.arange(5).repeat_interleave(4)
    found = []
    for model in (copy.deepcopy(network), rescaled(network)):
        groups = channel_groups(model, size=SIZE)
        found.append(taylor_importance(model, groups, iter([nn.functional.cross_entropy(model(pixels), targets)])))
    for left, right in zip(*found, strict=True):
        np.testing.assert_allclose(left, right, rtol=0.02, atol=2e-3 * float(np.abs(left).max()))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_every_layer_keeps_the_same_fraction_of_its_channels(
    network: PixelClassifier, pixels: Tensor, keep: float
) -> None:
    model, plan = prune_evenly(network, keep=keep, size=SIZE)
    dense = widths(network)
    for name, width in widths(model).items():
        assert width % 8 == 0 and abs(width - keep * dense[name]) <= max(4.0, 8 - keep * dense[name]), name
    assert logits_of(model, pixels).shape == (20, 5)
    assert plan.macs_after == pytest.approx(multiply_accumulates(model), rel=0.1)


def test_a_fraction_that_rounding_undoes(network: PixelClassifier) -> None:
    with pytest.raises(CompressError, match=r"keep = 0.999: rounded to multiples of 8, every layer keeps all"):
        prune_evenly(network, keep=0.999, size=SIZE)


@pytest.mark.parametrize("how", ["macs", "ratio"])
def test_the_plan_rebuilds_the_network(
    network: PixelClassifier, pruned: tuple[PixelClassifier, PrunePlan], pixels: Tensor, how: str
) -> None:
    model, plan = pruned if how == "macs" else prune_evenly(network, keep=0.6, size=SIZE)
    restored = msgspec.json.decode(msgspec.json.encode(plan), type=PrunePlan)
    assert restored == plan
    rebuilt = rebuild_channels(build("mobilenetv3_small_100", 5, "random")[0], restored, size=SIZE)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits_of(rebuilt.eval(), pixels), logits_of(model, pixels))


def test_a_pruned_network_folds(pruned: tuple[PixelClassifier, PrunePlan], pixels: Tensor) -> None:
    expected = logits_of(pruned[0], pixels)
    folded = logits_of(fold_for_deployment(pruned[0]), pixels)
    assert float((folded - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_ratio_that_cannot_be_reached(network: PixelClassifier) -> None:
    with pytest.raises(CompressError, match=r"keep = 0.01: only 0\.\d\d of the multiply-accumulates is reached"):
        prune_channels(network, mac_ratio=0.01, size=SIZE)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "tf_efficientnet_lite0", "regnetx_002"])
def test_other_networks_are_pruned(name: str) -> None:
    model = build(name, 3, "random")[0].eval()
    groups = channel_groups(model, size=SIZE)
    halves = [max(group.min_kept, group.below(group.channels // 2 + 1)) for group in groups]
    smaller = cut_channels(model, least_important_cuts(groups, magnitude_importance(model, groups), halves), size=SIZE)
    assert logits_of(smaller, EXAMPLE).shape == (1, 3)
    assert layer_shapes(smaller, size=SIZE).macs.sum() < 0.9 * layer_shapes(model, size=SIZE).macs.sum()


# Zeros among the weights


def zero_share(model: nn.Module) -> float:
    """Fraction of zeros among the convolution and linear weights."""
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return float(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))


def test_pruned_weights_stay_zero_in_training(network: PixelClassifier, pixels: Tensor) -> None:
    sparse, plan = prune_weights(network, sparsity=0.5, size=SIZE)
    assert zero_share(network) < 0.001
    assert 0.45 < zero_share(sparse) <= 0.5
    assert plan.parameters_after < 0.6 * plan.parameters_before
    for name, module in sparse.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            fraction = float((module.weight == 0).float().mean())
            assert fraction == pytest.approx(0.5, abs=0.02), name
            folded = fold_norms(network.backbone).get_submodule(name).weight.detach().abs()
            assert folded[module.weight == 0].max() <= folded[module.weight != 0].min()
    assert not (sparse.classifier.weight == 0).any()

    keeper = ZeroKeeper(sparse)
    zeros = {n: p == 0 for n, p in sparse.named_parameters() if p.ndim > 1}
    start = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sparse.train()(pixels[:8]).square().mean().backward()
        optimizer.step()
        assert any((dict(sparse.named_parameters())[n][mask] != 0).any() for n, mask in zeros.items())
        keeper()
        for name, parameter in sparse.named_parameters():
            if name in zeros:
                assert not parameter[zeros[name]].any()
                assert not torch.equal(parameter, start[name]) or not parameter.requires_grad


# The cost model


def table(model: PixelClassifier, split: tuple[int, ...] = (), seed: int = 0) -> BlockTimes:
    """Block times of a network as a board might write them; `split` is the number of layers in each block."""
    rng = np.random.default_rng(seed)
    layers = layer_shapes(model, size=SIZE)
    sizes = split or (1,) * len(layers.names)
    assert sum(sizes) == len(layers.names)
    blocks, end = [], 0
    for number, count in enumerate(sizes):
        end += count
        side, channels = int(layers.positions[end - 1] ** 0.5), int(layers.outputs[end - 1])
        kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
        blocks.append(
            Block(
                name=f"block-{number:02d}",
                operators=("PAD", *(kinds[row % 3] for row in range(count)), "HARD_SWISH"),
                inputs=(),
                outputs=((1, side, side, channels),),
                ms=float(rng.uniform(0.01, 0.1)),
                p10=0.0,
                p90=1.0,
            )
        )
    total = sum(block.ms for block in blocks)
    whole = Quantiles(count=9, p10=total, p50=1.1 * total, p90=1.3 * total, p99=1.4 * total, max=2 * total)
    return block_times(blocks, whole)


SPLIT = (1, 5, 3, 3, *(5,) * 8, 1, 1)
"""MobileNetV3-small's blocks."""


def plain_cost(times: BlockTimes, dense: PixelClassifier, model: PixelClassifier, sizes: tuple[int, ...]) -> float:
    """A second formulation: block by block, from what hooks counted."""
    whole, total, row = times.whole.p50, 0.0, 0
    before, after = costs(dense), costs(model)
    for block, count in zip(times.blocks, sizes, strict=True):
        was = sum(macs + 24 * outputs for _, macs, outputs in before[row : row + count])
        now = sum(macs + 24 * outputs for _, macs, outputs in after[row : row + count])
        total += block.ms * (0.06 + 0.94 * now / was)
        row += count
    return total * whole / times.sum_ms


def test_the_latency_model_agrees_with_a_plain_one(
    network: PixelClassifier, pruned: tuple[PixelClassifier, PrunePlan]
) -> None:
    times = table(network, SPLIT)
    dense = layer_shapes(network, size=SIZE)
    assert [name for name, _, _ in costs(network)] == list(dense.names)
    assert dense.macs.sum() == multiply_accumulates(network)
    model = LatencyModel(times, dense)
    assert model.ms(dense) == pytest.approx(times.whole.p50)
    for smaller in (pruned[0], prune_evenly(network, keep=0.3, size=SIZE)[0]):
        expected = plain_cost(times, network, smaller, SPLIT)
        assert model.ms(layer_shapes(smaller, size=SIZE)) == pytest.approx(expected, rel=1e-9)


def test_the_time_of_blocks_without_layers_goes_to_their_neighbours(network: PixelClassifier) -> None:
    times = table(network, SPLIT)
    quiet = Block(name="q", operators=("QUANTIZE",), inputs=(), outputs=(), ms=0.05, p10=0.0, p90=0.1)
    first, second, *others = times.blocks
    padded = msgspec.structs.replace(times, blocks=(quiet, first, quiet, second, *others))
    joined = [msgspec.structs.replace(first, ms=first.ms + 0.1), second, *others]
    dense = layer_shapes(network, size=SIZE)
    smaller = layer_shapes(prune_evenly(network, keep=0.5, size=SIZE)[0], size=SIZE)
    one, other = (LatencyModel(t, dense) for t in (padded, msgspec.structs.replace(times, blocks=tuple(joined))))
    assert one.ms(smaller) == pytest.approx(other.ms(smaller))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("mobilenetv3_large_100", SIZE, "another network"),
        ("resnet18", SIZE, "another network"),
        ("mobilenetv3_small_050", SIZE, "block-01 puts out 1x16x16x72"),
        ("mobilenetv3_small_100", 96, "another network or image size"),
    ],
)
def test_a_table_of_another_network(network: PixelClassifier, name: str, size: int, words: str) -> None:
    other = layer_shapes(build(name, 5, "random")[0].eval(), size=size)
    with pytest.raises(CompressError, match=re.escape(words)):
        LatencyModel(table(network, SPLIT), other)


def damaged(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        tree = msgspec.json.decode(data)
        change(tree)
        return msgspec.json.encode(tree)

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "no such file, or it is empty"),
        (lambda data: data[: len(data) // 2], "not a table of block times"),
        (lambda data: b"[1, 2]", "not a table of block times"),
        (lambda data: b'{"schema": 1, "results": []}', "not a table of block times"),
        (damaged(lambda t: t.update(schema=2)), "schema 2, not 1"),
        (damaged(lambda t: t.pop("schema")), "schema null, not 1"),
        (damaged(lambda t: t.update(runtime="openvino")), "runs none of [compile] runtimes (litert)"),
        (damaged(lambda t: t.update(runtime="abacus")), "runs none of"),
        (damaged(lambda t: t.update(precision="fp32")), "litert-int8 is fp32, but the device will run int8"),
        (damaged(lambda t: t.update(threads=4)), "4 threads, but latency targets are for one"),
        (damaged(lambda t: t["whole"].update(p50=0.0)), "not positive finite"),
    ],
)
def test_a_table_that_cannot_be_used(
    network: PixelClassifier, tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(msgspec.json.encode(table(network, SPLIT)))
    assert read_table(path, ("litert",)) == table(network, SPLIT)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CompressError, match=re.escape(words)) as caught:
        read_table(path, ("litert",))
    assert str(path) in str(caught.value) and "eyas-device bench --blocks" in str(caught.value)
    with pytest.raises(CompressError, match="no such file"):
        read_table(tmp_path, ("litert",))


# The search


@pytest.fixture(scope="module")
def found(network: PixelClassifier, pixels: Tensor) -> tuple[list[np.ndarray], list[Step]]:
    """Importance of all channels, and all steps for the network."""
    model = copy.deepcopy(network)
    groups = channel_groups(model, size=SIZE)
    targets = torch.arange(5).repeat_interleave(4)
    batches = (nn.functional.cross_entropy(model(pixels[row::2]), targets[row::2]) for row in range(2))
    losses = taylor_importance(model, groups, batches)
    latency = LatencyModel(table(network, SPLIT), layer_shapes(network, size=SIZE))
    return losses, list(cheapest_cuts(groups, losses, layer_shapes(network, size=SIZE), latency))


def test_steps_only_save_time_and_keep_multiples_of_eight(
    network: PixelClassifier, found: tuple[list[np.ndarray], list[Step]]
) -> None:
    groups, (_, steps) = channel_groups(network, size=SIZE), found
    assert steps[0].kept == tuple(group.channels for group in groups)
    assert steps[-1].kept == tuple(group.min_kept for group in groups)
    for before, after in pairwise(steps):
        changed = [(a, b) for a, b in zip(before.kept, after.kept, strict=True) if a != b]
        assert len(changed) == 1 and 0 < changed[0][0] - changed[0][1] <= 8 and changed[0][1] % 8 == 0
        assert after.ms < before.ms and after.loss >= before.loss
    assert all(group.min_kept >= group.channels / 4 for group in groups)


def test_the_prediction_of_a_step_is_that_of_its_network(
    network: PixelClassifier, found: tuple[list[np.ndarray], list[Step]], pixels: Tensor
) -> None:
    groups, (losses, steps) = channel_groups(network, size=SIZE), found
    times = table(network, SPLIT)
    for step in (steps[7], steps[len(steps) // 2], steps[-1]):
        cuts = least_important_cuts(groups, losses, step.kept)
        smaller = cut_channels(network, cuts, size=SIZE)
        assert step.ms == pytest.approx(plain_cost(times, network, smaller, SPLIT))
        plan = channel_plan(network, smaller, cuts, size=SIZE)
        restored = msgspec.json.decode(msgspec.json.encode(plan), type=PrunePlan)
        rebuilt = rebuild_channels(build("mobilenetv3_small_100", 5, "random")[0], restored, size=SIZE)
        rebuilt.load_state_dict(smaller.state_dict(), strict=True)
        assert torch.equal(logits_of(rebuilt, pixels), logits_of(smaller, pixels))


def test_the_first_step_has_the_lowest_loss_per_millisecond(
    network: PixelClassifier, found: tuple[list[np.ndarray], list[Step]]
) -> None:
    groups, (losses, steps) = channel_groups(network, size=SIZE), found
    times, price = table(network, SPLIT), {}
    for number, group in enumerate(groups):
        if group.channels > group.min_kept:
            kept = [g.channels - 8 * (g is group) for g in groups]
            smaller = cut_channels(network, least_important_cuts(groups, losses, kept), size=SIZE)
            saved = times.whole.p50 - plain_cost(times, network, smaller, SPLIT)
            price[number] = np.sort(losses[number])[:8].sum() / saved
    cheapest = min(price, key=lambda number: price[number])
    assert [n for n, (a, b) in enumerate(zip(steps[0].kept, steps[1].kept, strict=True)) if a != b] == [cheapest]


def test_importance_is_the_gradient_of_fading_a_channel_out(network: PixelClassifier, pixels: Tensor) -> None:
    model = copy.deepcopy(network)
    groups = channel_groups(model, size=SIZE)
    targets = torch.arange(5).repeat_interleave(4)
    losses = taylor_importance(model, groups, iter([nn.functional.cross_entropy(model(pixels), targets)]))
    exact = copy.deepcopy(model).backbone.double()
    normalised = model.normalise(pixels).double()
    before = float(nn.functional.cross_entropy(logits_of(exact, normalised), targets))
    group = next(g for g in groups if g.root == "blocks.2.0.conv_pwl")
    for channel in (0, 5, 17):
        fading = copy.deepcopy(exact)
        for reader in group.readers:
            fading.get_submodule(reader.layer).weight.data[:, reader.rows[reader.channels == channel]] *= 1 - 1e-5
        after = float(nn.functional.cross_entropy(logits_of(fading, normalised), targets))
        estimated = losses[groups.index(group)][channel]
        assert abs(after - before) / 1e-5 == pytest.approx(estimated, rel=0.01, abs=1e-5)


# The closed loop


def falling(fractions: list[float]) -> list[Step]:
    return [Step((index,), 2.0 * fraction, 0.0) for index, fraction in enumerate(fractions)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.002, 0.05), min_size=30, max_size=80),
    st.floats(0.75, 1.3),
    st.floats(0.85, 1.15),
    st.floats(0.3, 0.9),
)
def test_the_measured_latency_is_at_the_goal_or_just_below(
    savings: list[float], factor: float, bend: float, goal: float
) -> None:
    """The true latency is a function of the predicted one that the loop only sees through measurements."""
    predicted = [float(fraction) for fraction in np.cumprod([1.0, *(1 - s for s in savings)])]
    true = [factor * fraction**bend for fraction in predicted]
    steps, calls = falling(predicted), []

    def measure(step: Step) -> float:
        calls.append(step.kept[0])
        return true[step.kept[0]]

    if true[-1] > goal:
        with pytest.raises(CompressError, match="is out of reach"):
            search_step(steps, goal, 2.0, measure=measure)
        return
    reached = search_step(steps, goal, 2.0, measure=measure)
    index = reached.step.kept[0]
    assert reached.measured == true[index] <= goal
    near = true[index] >= goal * (1 - TOLERANCE)
    assert near or index == 0 or true[index - 1] > goal or len(calls) == 6
    assert len(set(calls)) == len(calls) <= 6
    assert reached.correction == pytest.approx(true[index] / predicted[index])


def test_an_intermediate_round_is_measured_once() -> None:
    steps = falling([1.0, 0.9, 0.8, 0.7, 0.6])
    reached = search_step(steps, 0.8, 2.0, measure=lambda step: 0.9, exact=False)
    assert (reached.step, reached.measured) == (steps[2], 0.9)
    assert reached.correction == pytest.approx(0.9 / 0.8)


def test_without_a_measurement_the_prediction_decides() -> None:
    steps = falling([1.0, 0.9, 0.8, 0.7, 0.6])
    reached = search_step(steps, 0.75, 2.0)
    assert (reached.step, reached.predicted, reached.measured) == (steps[3], pytest.approx(0.7), None)
    with pytest.raises(CompressError, match=r"0\.800 ms \(0\.40 of the dense student's 2\.000\)") as caught:
        search_step(steps, 0.4, 2.0)
    assert "1.200 ms (0.60)" in str(caught.value) and "smaller [student] model" in str(caught.value)


# The front


def test_the_plot_shows_measured_and_predicted_points() -> None:
    first = FrontPoint(
        round=0, predicted_ms=1.0, measured_ms=1.0, fraction=1.0, macs=2e7, balanced_accuracy=0.83, auc=0.9
    )
    second = replace_point(first, round=1, measured_ms=None, predicted_ms=0.7, fraction=0.7, balanced_accuracy=0.82)
    third = replace_point(first, round=2, measured_ms=0.5, fraction=0.5, balanced_accuracy=0.8)
    drawn = front(msgspec.to_builtins([first, second, third]))
    assert drawn.startswith("<svg") and "1.00 ms at 0.830 to 0.50 ms at 0.800" in drawn
    assert "dense" in drawn and "70%" in drawn and "50%" in drawn and "var(--litert)" in drawn
    assert front([]) == "" == front(msgspec.to_builtins([replace_point(first, balanced_accuracy=None)]))


def replace_point(point: FrontPoint, **changes: object) -> FrontPoint:
    return msgspec.structs.replace(point, **changes)
