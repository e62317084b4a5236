"""Mixed precision: switch layers of a QAT model between int8 and float, and measure the degradation.

A layer kept in float has a float weight, and tensors that only float layers read are not quantized either. The rule is
`quant.graph.required_placement`, so what is measured here is what `prepare_qat(keep_float=...)` builds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from eyas_host.data.transforms import Batch
from eyas_host.evaluation.bootstrap import Floats, Ints
from eyas_host.evaluation.calibration import fit_calibration
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.quant.graph import WeightedLayer, required_placement, weighted_layers
from eyas_host.quant.quantizers import activation_quantizers, float_layers, leave_float, weight_quantizers

MAX_SNR_DB = 144.0
"""20 log10 2^24: the resolution of float32."""


class Degradation(msgspec.Struct, frozen=True):
    """Degradation by quantization against the same network in float, on the same images."""

    drop: float
    """Balanced accuracy lost (negative: gained)."""
    nll_increase: float
    """Increase of the mean negative log likelihood, nats per image, at the temperature that fits the float network
    best: otherwise logits that merely shrink would count as a gain of an overconfident network."""
    snr_db: float
    """Output signal-to-noise ratio, 10 log10(sum |float logits|^2 / sum |difference|^2), at most `MAX_SNR_DB`."""


def degradation(reference: Floats, logits: Floats, targets: Ints, temperature: float) -> Degradation:
    """Degradation of `logits` [n, classes] against those of the float network, for labels [n]."""
    before = validation_metrics(reference / temperature, targets)
    after = validation_metrics(logits / temperature, targets)
    return Degradation(
        drop=before["balanced_accuracy"] - after["balanced_accuracy"],
        nll_increase=after["loss"] - before["loss"],
        snr_db=signal_to_noise(reference, logits),
    )


def signal_to_noise(reference: Floats, logits: Floats) -> float:
    """Signal-to-noise ratio of `logits` against `reference` in decibels, at most `MAX_SNR_DB`."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, logits, dtype=np.float64)).sum())
    return 10 * float(np.log10(signal / max(noise, signal * 10 ** (-MAX_SNR_DB / 10))))


class MixedPrecision:
    """A copy of a QAT model whose layers can be switched between int8 and float, with its evaluation images.

    Attributes:
        layers: int8 layers by name, in order of execution.
        reference: float32 logits [n, classes] that all others are compared with.

    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Batch,
        targets: Ints,
        *,
        device: torch.device,
        reference: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Evaluate on prepared pixels uint8 [n, size, size, 3] with labels [n].

        `reference` defaults to the model's own logits with all of its quantizers off.
        """
        self._model = copy.deepcopy(model).to(device).eval()
        self._pixels, self._targets, self._device = pixels, targets, device
        self._example = torch.zeros(1, 3, *pixels.shape[1:3], device=device)
        self._activations, self._weights = activation_quantizers(self._model), weight_quantizers(self._model)
        self._float = float_layers(self._model, self._example)
        weighted = weighted_layers(self._model, self._example)
        self.layers: dict[str, WeightedLayer] = {
            layer.name: layer for layer in weighted if layer.name not in self._float
        }
        self.reference = self._logits((), ()) if reference is None else reference
        self._temperature = fit_calibration(self.reference, targets, bias=False).temperature

    def only_int8(self, name: str) -> Degradation:
        """Degradation with only this layer in int8: its weight, its input and its output."""
        layer = self.layers[name]
        return self._degradation(self._logits((layer.reads, layer.writes), (layer.operation,)))

    def all_but(self, names: Collection[str]) -> Degradation:
        """Degradation with all layers in int8 but these. Raises `CompressError` for an unknown layer."""
        placement = required_placement(self._model, self._example, (*self._float, *names))
        return self._degradation(self._logits(placement.activations, placement.weights))

    def _degradation(self, logits: npt.NDArray[np.float32]) -> Degradation:
        return degradation(self.reference, logits, self._targets, self._temperature)

    def _logits(self, activations: Collection[str], weights: Collection[str]) -> npt.NDArray[np.float32]:
        """Logits with only the quantizers of these operations enabled."""
        for quantizers, enabled in ((self._activations, set(activations)), (self._weights, set(weights))):
            for operation, quantizer in quantizers.items():
                if operation in enabled:
                    quantizer.enable_quantization()
                else:
                    quantizer.disable_quantization()
        return logits_of(self._model, self._pixels, self._device)


def drop_layers(model: nn.Module, names: Collection[str], *, input_size: int) -> nn.Module:
    """A copy of a QAT model with these layers in float; all other learned ranges and all weights are unchanged.

    Layers already in float stay so. Raises `CompressError` for an unknown layer.
    """
    mixed = copy.deepcopy(model)
    example = torch.zeros(1, 3, input_size, input_size, device=next(mixed.parameters()).device)
    leave_float(mixed, example, names)
    return mixed
