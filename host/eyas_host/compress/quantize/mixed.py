"""Mixed precision: which layers of a QAT model run in int8 and which in float, and what that costs.

A layer kept float has a float weight, and what only float layers read is not rounded either: the rule is
`layers.required_placement`, so what is measured here is what `prepare_qat(keep_float=...)` builds.
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
from eyas_host.evaluate.inference import logits_of
from eyas_host.evaluate.metrics import Floats, Ints, fit_temperature
from eyas_host.quant.graph import Layer, layers, required_placement
from eyas_host.quant.quantizers import activation_quantizers, float_layers, leave_float, weight_quantizers
from eyas_host.train.engine import validation_figures

FINEST_DB = 144.0
"""20 log10 2^24: two float32 values that agree in every bit are no further apart than this."""


class Harm(msgspec.Struct, frozen=True):
    """What rounding costs against the same network in float, on the same images."""

    drop: float
    """Balanced accuracy lost (negative: gained)."""
    likelihood: float
    """Mean log likelihood of the labels lost, nats an image, at the temperature that fits the float network best:
    without it, logits that merely shrink would count as a gain of a network that is too sure."""
    snr_db: float
    """Output signal-to-noise ratio, 10 log10(sum |float logits|^2 / sum |difference|^2), at most `FINEST_DB`."""


def harm(reference: Floats, logits: Floats, targets: Ints, temperature: float) -> Harm:
    """What `logits` [n, classes] lost against those of the float network, for labels [n]."""
    before = validation_figures(reference / temperature, targets)
    after = validation_figures(logits / temperature, targets)
    return Harm(
        drop=before["balanced_accuracy"] - after["balanced_accuracy"],
        likelihood=after["loss"] - before["loss"],
        snr_db=signal_to_noise(reference, logits),
    )


def signal_to_noise(reference: Floats, logits: Floats) -> float:
    """Decibels by which the power of `reference` exceeds that of the difference, at most `FINEST_DB`."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, logits, dtype=np.float64)).sum())
    return 10 * float(np.log10(signal / max(noise, signal * 10 ** (-FINEST_DB / 10))))


class MixedPrecision:
    """A copy of a QAT model whose layers are switched between int8 and float, and the images it is judged on.

    Attributes:
        layers: its int8 layers by name, in order of execution.
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
        """Prepare to judge prepared pixels uint8 [n, size, size, 3] with labels [n].

        `reference` is compared with; without it, the model's own answers with all of its quantizers off.
        """
        self._model = copy.deepcopy(model).to(device).eval()
        self._pixels, self._targets, self._device = pixels, targets, device
        self._example = torch.zeros(1, 3, *pixels.shape[1:3], device=device)
        self._activations, self._weights = activation_quantizers(self._model), weight_quantizers(self._model)
        self._float = float_layers(self._model, self._example)
        found = layers(self._model, self._example)
        self.layers: dict[str, Layer] = {layer.name: layer for layer in found if layer.name not in self._float}
        self.reference = self._logits((), ()) if reference is None else reference
        self._temperature = fit_temperature(self.reference, targets)

    def alone(self, name: str) -> Harm:
        """Only this layer in int8: its weight, what it reads and what it writes."""
        layer = self.layers[name]
        return self._harm(self._logits((layer.reads, layer.writes), (layer.operation,)))

    def without(self, names: Collection[str]) -> Harm:
        """All layers in int8 but these. Raises `CompressError` for a name that no layer has."""
        placement = required_placement(self._model, self._example, (*self._float, *names))
        return self._harm(self._logits(placement.activations, placement.weights))

    def _harm(self, logits: npt.NDArray[np.float32]) -> Harm:
        return harm(self.reference, logits, self._targets, self._temperature)

    def _logits(self, activations: Collection[str], weights: Collection[str]) -> npt.NDArray[np.float32]:
        """Logits with just the quantizers of these operations on."""
        for quantizers, wanted in ((self._activations, set(activations)), (self._weights, set(weights))):
            for operation, quantizer in quantizers.items():
                if operation in wanted:
                    quantizer.enable_quantization()
                else:
                    quantizer.disable_quantization()
        return logits_of(self._model, self._pixels, self._device)


def drop_layers(model: nn.Module, names: Collection[str], *, input_size: int) -> nn.Module:
    """A copy of a QAT model in which these layers are float; all other learned ranges and all weights stay as they are.

    Layers that are float already stay so. Raises `CompressError` for a name that no layer has.
    """
    mixed = copy.deepcopy(model)
    example = torch.zeros(1, 3, input_size, input_size, device=next(mixed.parameters()).device)
    leave_float(mixed, example, names)
    return mixed
