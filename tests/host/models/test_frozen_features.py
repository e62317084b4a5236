"""Features of frozen networks: the same from OpenVINO as from torch, and torch's where OpenVINO is of no use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eyas_host.models import frozen_features as module
from eyas_host.models.factory import PixelClassifier, build, move
from eyas_host.models.frozen_features import WORTHWHILE, frozen_features


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

    def wrong(converted: PixelClassifier, probe: Tensor) -> module.Pooled:
        asked.append(len(probe))
        return lambda batch: converted.pooled(batch) * 1.01

    monkeypatch.setattr(module, "_converted", wrong)
    with torch.inference_mode():
        assert torch.equal(frozen_features(model, 64, images)(pixels(2, 64)), model.pooled(pixels(2, 64)))
    assert bool(asked) == (images >= WORTHWHILE)
