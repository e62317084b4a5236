"""Placement on real networks: complete for int8 runtimes, and artefacts predict as the QAT model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_device.runtimes import load
from eyas_host.export.artefacts import artefact_files
from eyas_host.export.build import compile_artefact
from eyas_host.models.factory import build
from eyas_host.quant.exact import exact_int8
from eyas_host.quant.fold import DeployModel, fold_for_deployment
from eyas_host.quant.graph import required_placement, weighted_layers
from eyas_host.quant.qat import prepare_qat
from eyas_host.quant.quantizers import activation_quantizers, check_placement, weight_quantizers
from eyas_host.support.errors import CompressError
from tests.support.networks import take_steps
from tests.support.shapes import SHAPES, Pixels
from tests.support.xnnpack import partitions

SIZE, CLASSES = 64, len(SHAPES)
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)


@dataclass(frozen=True)
class Network:
    name: str
    activation: Literal["default", "relu"]
    activations: int
    """Activation quantizers, counted by hand from the network's table of blocks."""
    weights: int
    runtimes: tuple[str, ...]
    """The backends that this network is compiled for here; OpenVINO's kernels saturate on CPUs without VNNI."""


NETWORKS = [
    Network("mobilenetv3_small_100", "relu", 79, 53, ("onnx",)),
    Network("mobilenetv3_large_100", "default", 111, 63, ("litert",)),
    Network("mobilenetv4_conv_small", "default", 58, 46, ("litert",)),
    Network("tf_efficientnet_lite0", "default", 59, 49, ("onnx",)),
    Network("resnet18", "default", 28, 20, ("litert", "openvino")),
    Network("resnet50", "default", 69, 53, ("openvino",)),
]


@pytest.fixture(scope="module")
def frames(shape_frames: Pixels) -> Pixels:
    """Two images of each class."""
    return shape_frames[::2]


@pytest.fixture(scope="module")
def pixels(frames: Pixels) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def drawn(name: str, activation: Literal["default", "relu"], pixels: Tensor) -> DeployModel:
    """A folded network, trained for some steps so that its predictions vary."""
    torch.manual_seed(0)
    model, _ = build(name, CLASSES, "random", activation=activation)
    take_steps(model, pixels, steps=5, rate=2e-3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
        for _ in range(5):
            model(pixels)
        logits = model.eval()(pixels)
        head: Any = model.classifier
        head.bias.sub_(logits.mean(dim=0))
        for parameter in head.parameters():
            parameter.div_(logits.std(dim=0).mean())
    return fold_for_deployment(model)


@torch.inference_mode()
def probabilities_of(model: nn.Module, pixels: Tensor) -> np.ndarray:
    return torch.cat([model(one) for one in pixels.split(1)]).softmax(1).numpy()


def run(runtime: str, path: Path, frames: Pixels) -> np.ndarray:
    """Probabilities of the device's runtime."""
    loaded: Any = load(runtime)(path, size=SIZE, classes=CLASSES, threads=1)
    with loaded:
        return torch.tensor(np.stack([loaded.infer(frame).copy() for frame in frames])).softmax(1).numpy()


def compile_int8(runtime: str, model: nn.Module, folder: Path) -> Path:
    path = artefact_files(folder, runtime, "int8")[0]  # type: ignore[arg-type]
    compile_artefact(runtime, "int8", model, path, SIZE)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: f"{n.name}-{n.activation}")
def test_the_placement_is_complete_and_artefacts_predict_as_the_qat_model(
    network: Network, pixels: Tensor, frames: Pixels, tmp_path: Path
) -> None:
    deploy = drawn(network.name, network.activation, pixels)
    model = prepare_qat(deploy, pixels[:6].split(1), input_size=SIZE).eval()
    placement = check_placement(model, EXAMPLE)
    assert (len(placement.activations), len(placement.weights)) == (network.activations, network.weights)
    assert (len(activation_quantizers(model)), len(weight_quantizers(model))) == (network.activations, network.weights)
    expected = probabilities_of(model, pixels)
    assert expected.std(axis=0).max() > 0.1, "the predictions are the same for every image"
    floor = float(np.abs(probabilities_of(exact_int8(model, input_size=SIZE), pixels) - expected).mean())
    for runtime in network.runtimes:
        path = compile_int8(runtime, model, tmp_path)
        gap = float(np.abs(run(runtime, path, frames) - expected).mean())
        assert gap < 1.5 * floor + 0.01, f"{runtime} {gap:.4f}, exact arithmetic {floor:.4f}"
        if runtime == "litert":
            assert partitions(path) == 1


def test_layers_are_named_in_order_with_the_quantizers_around_them(pixels: Tensor) -> None:
    model, _ = build("resnet18", CLASSES, "random")
    deploy = fold_for_deployment(model.eval())
    found = weighted_layers(deploy, EXAMPLE)
    assert [layer.name for layer in found[:4]] == [
        "backbone.conv1",
        "backbone.layer1.0.conv1",
        "backbone.layer1.0.conv2",
        "backbone.layer1.1.conv1",
    ]
    assert all(isinstance(deploy.get_submodule(layer.name), nn.Conv2d) for layer in found)
    placed = required_placement(deploy, EXAMPLE)
    assert tuple(layer.operation for layer in found) == placed.weights
    assert {layer.reads for layer in found} | {layer.writes for layer in found} <= set(placed.activations)
    stem, first, second = found[:3]
    assert (stem.reads, stem.writes) == ("/sub/0", "backbone/act1/relu/0")
    assert (first.reads, first.writes) == ("backbone/act1/relu/0", "backbone/layer1/0/act1/relu/0")  # through the pool
    assert second.writes == "backbone/layer1/0/conv2/conv2d/0"


@pytest.mark.parametrize(
    ("name", "kind"), [("efficientnet_b0", "silu"), ("convnext_atto", "permute"), ("mobilevitv2_050", "silu")]
)
def test_an_operation_without_a_rule_is_refused_by_name(name: str, kind: str) -> None:
    deploy = fold_for_deployment(build(name, CLASSES, "random")[0].eval())
    with pytest.raises(CompressError, match=f"no quantization rule for operation '{kind}' at 'backbone/"):
        prepare_qat(deploy, torch.zeros(2, 3, SIZE, SIZE).split(1), input_size=SIZE)


def test_a_network_of_a_fixed_size_is_refused() -> None:
    with pytest.raises(CompressError, match="does not accept 64 x 64 pixels"):
        fold_for_deployment(build("mixer_s32_224", CLASSES, "random")[0].eval())
