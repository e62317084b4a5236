"""Features of frozen networks: the same from OpenVINO as from torch, and torch's where OpenVINO is of no use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eyas_host.models import frozen_features as module
from eyas_host.models.factory import PixelClassifier, build, move
from eyas_host.models.frozen_features import WORTHWHILE, frozen_features, with_frozen_blocks
from eyas_host.pipeline import distributed
from eyas_host.recipe.training import TeacherSection
from eyas_host.train.batch_norm import whole_batch_norms
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze


def pixels(count: int, size: int) -> Tensor:
    """Views as they come: uint8, channels last in memory."""
    shape = (count, size, size, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8).permute(
        0, 3, 1, 2
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [("tf_efficientnet_lite0", 96), ("mobilenetv3_small_050", 64), ("resnet18", 64), ("vit_tiny_patch16_224", 224)],
)
def test_both_compute_the_same_in_batches_of_any_size(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = move(build(name, 3, "random")[0], torch.device("cpu")).eval()
    fast = frozen_features(model, size, WORTHWHILE)
    for count in (1, 7, 3):
        with torch.inference_mode():
            expected = model.pooled(pixels(count, size))
        found = fast(pixels(count, size))
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_later_training_does_not_change_them_and_earlier_results_stay() -> None:
    model = build("mobilenetv3_small_050", 3, "random")[0].eval()
    fast = frozen_features(model, 64, WORTHWHILE)
    before, first = fast(pixels(2, 64)).clone(), fast(pixels(2, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    fast(pixels(2, 64).flip(0))
    assert torch.equal(first, before)
    assert torch.equal(fast(pixels(2, 64)), before)


@pytest.mark.parametrize("images", [WORTHWHILE - 1, WORTHWHILE])
def test_few_images_and_a_wrong_conversion_are_torch_s(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """A conversion that computes something else is found on the probe."""
    model = build("mobilenetv3_small_050", 3, "random")[0].eval()
    asked: list[int] = []

    def wrong(network: nn.Module, probe: Tensor) -> module.Pooled:
        asked.append(len(probe))
        return lambda batch: network(batch) * 1.01

    monkeypatch.setattr(module, "_converted", wrong)
    with torch.inference_mode():
        assert torch.equal(frozen_features(model, 64, images)(pixels(2, 64)), model.pooled(pixels(2, 64)))
    assert bool(asked) == (images >= WORTHWHILE)


def half_frozen(name: str, unfrozen: str) -> PixelClassifier:
    """A network of which the last blocks are trained, in the mode for that."""
    torch.manual_seed(0)
    model = move(build(name, 3, "random")[0], torch.device("cpu"))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
    unfreeze(model, TeacherSection(model=name, unfreeze=unfrozen))
    freeze_batch_norm(model)
    return model


def trained(model: PixelClassifier, forward: Callable[[Tensor], Tensor], sides: list[int]) -> dict[str, Tensor]:
    """The weights after a step on images of each of these sides."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for side in sides:
        optimizer.zero_grad()
        forward(pixels(4, side)).square().mean().backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "unfrozen"), [("tf_efficientnet_lite0", "13"), ("mobilenetv3_small_050", "2"), ("resnet18", "3")]
)
def test_a_network_trains_above_its_frozen_blocks_as_before(name: str, unfrozen: str) -> None:
    model = half_frozen(name, unfrozen)
    before = copy.deepcopy(model)
    fast = with_frozen_blocks(model, 64, WORTHWHILE)
    assert fast is not model, "resnet18's pooling lies between its frozen layers and is passed over with them"
    modes = [layer.training for layer in model.modules()]
    assert modes == [layer.training for layer in before.modules()]
    first = {name: value.clone() for name, value in model.state_dict().items()}
    wanted, found = trained(before, before, [64, 48, 64]), trained(model, fast, [64, 48, 64])
    assert found.keys() == first.keys(), "what it is saved as stays the same"
    moved = [name for name in found if not torch.equal(found[name], first[name])]
    assert len(moved) > 10
    for key, value in found.items():
        scale = float((wanted[key].float() - first[key].float()).abs().max())
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-2 * scale + 1e-7, msg=key)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(pixels(2, 64)), fast(pixels(2, 64)), atol=1e-4), "and it predicts by itself"


def test_several_processes_train_above_frozen_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give BatchNorm layers another `forward` while they train, which is taken back at the end."""
    model = half_frozen("mobilenetv3_small_050", "2")
    before = copy.deepcopy(model)
    fast = with_frozen_blocks(model, 64, WORTHWHILE)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with whole_batch_norms(model):
        found = trained(model, fast, [64, 48])
    assert all("forward" not in vars(layer) for layer in model.modules())
    monkeypatch.undo()
    for key, value in trained(before, before, [64, 48]).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_a_step_that_fails_leaves_the_network_whole() -> None:
    model = half_frozen("mobilenetv3_small_050", "2")
    fast = with_frozen_blocks(model, 64, WORTHWHILE)
    with pytest.raises(ZeroDivisionError):
        handle = model.classifier.register_forward_pre_hook(lambda *_: 1 // 0)
        fast(pixels(2, 64))
    handle.remove()
    assert all("forward" not in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("name", "unfrozen", "size"),
    [("vit_tiny_patch16_224", "3", 224), ("densenet121", "2", 64), ("mobilenetv3_small_050", "all", 64)],
)
def test_a_network_that_is_no_chain_or_trains_whole_stays_as_it_is(name: str, unfrozen: str, size: int) -> None:
    """Positions are added between the modules of a transformer; a block of DenseNet reads all before it."""
    model = half_frozen(name, unfrozen)
    fast = with_frozen_blocks(model, size, WORTHWHILE)
    with torch.no_grad():
        model.eval()
        assert torch.allclose(fast(pixels(2, size)), model(pixels(2, size)), atol=1e-4)


def test_few_images_are_not_worth_a_conversion_and_chance_is_not_passed_over() -> None:
    model = half_frozen("mobilenetv3_small_050", "2")
    assert with_frozen_blocks(model, 64, WORTHWHILE - 1) is model
    model.backbone.blocks[0][0].drop_path.drop_prob = 0.1  # type: ignore[union-attr, index]
    assert with_frozen_blocks(model, 64, WORTHWHILE) is model
