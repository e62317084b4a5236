"""Sensitivity of each layer to int8, on validation images prepared as on the device.

Results are written after each layer with hashes of the model and of the images: an interrupted measurement resumes, one
of another model or of other images starts over.
"""

from __future__ import annotations

import hashlib

import msgspec

from eyas_host.compress.quantize.fallback import SAMPLE, Fallback, balanced_rows, choose_fallback, most_sensitive
from eyas_host.compress.quantize.mixed import Degradation, MixedPrecision
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.inference import pick_device
from eyas_host.pipeline.runner import SENSITIVITY, RunContext
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import meter

_MAX_ADVISED = 5
"""Layers that the advice may keep in float if the recipe's `quantize.fallback` is 0."""


class LayerSensitivity(msgspec.Struct, frozen=True):
    """Sensitivity of one layer, against the same network with all quantizers off."""

    layer: str
    only_int8: Degradation
    """With only this layer in int8: its weight, its input and its output."""
    only_float: Degradation
    """With only this layer in float."""


class Sensitivity(msgspec.Struct, frozen=True):
    """`sensitivity/sensitivity.json`."""

    model_sha256: str
    """Hash of the QAT model's files."""
    images_sha256: str
    """Hash of the images and their preprocessing."""
    images: int
    """Number of validation images."""
    all_int8: Degradation
    """With all layers in int8."""
    layers: tuple[LayerSensitivity, ...] = ()
    """Layers measured so far, in order of execution."""
    advice: Fallback | None = None
    """Layers to keep in float, measured on the same images; None until all layers are measured."""

    @property
    def ranked(self) -> list[LayerSensitivity]:
        """The layers, the most sensitive first."""
        by_name = {entry.layer: entry for entry in self.layers}
        return [by_name[name] for name in most_sensitive({name: entry.only_int8 for name, entry in by_name.items()})]


def measure_sensitivity(context: RunContext, *, images: int = SAMPLE) -> Sensitivity:
    """Measure each layer of a run's QAT model on at most `images` validation images, balanced over the classes.

    Raises `StageError` if the stage `qat` is not finished, `CompressError` if its files are damaged, and `DataError` if
    an image has changed.
    """
    recipe, spec = context.recipe, context.recipe.image.preprocessing()
    model_sha256 = _model_digest(context)
    if model_sha256 is None:
        raise StageError(
            f"{context.folder('qat')}: not finished, so there is no int8 model to measure; run that stage first"
        )
    split = Split.load(context.root, spec)
    rows = balanced_rows(split.validation.targets, images, recipe.run.seed)
    sample = ImageDataset([split.validation.images[row] for row in rows], split.labels, spec)
    mixed = MixedPrecision(
        load_quantized(context, len(split.labels)),
        prepared(sample.pixels, spec),
        sample.targets,
        device=pick_device(recipe.run.device),
    )
    images_sha256 = _digest([msgspec.to_builtins(spec), [image.sha256 for image in sample.images]])
    measured = _load(context)
    if measured is None or (measured.model_sha256, measured.images_sha256) != (model_sha256, images_sha256):
        measured = Sensitivity(model_sha256, images_sha256, len(sample), mixed.all_but(()))
    done = {entry.layer for entry in measured.layers}
    with meter("layer by layer", len(mixed.layers), done=len(done)) as bar:
        for name in mixed.layers:
            if name not in done:
                entry = LayerSensitivity(name, mixed.only_int8(name), mixed.all_but((name,)))
                measured = msgspec.structs.replace(measured, layers=(*measured.layers, entry), advice=None)
                _save(context, measured)
                bar.advance(name)
    advice = choose_fallback(
        [entry.layer for entry in measured.ranked],
        lambda names: mixed.all_but(names).drop,
        max_drop=recipe.gate.max_drop,
        max_layers=recipe.quantize.fallback or _MAX_ADVISED,
    )
    measured = msgspec.structs.replace(measured, advice=advice)
    _save(context, measured)
    return measured


def load_sensitivity(context: RunContext) -> Sensitivity | None:
    """Read the measurement; None if it is missing, unfinished, or of another QAT model than the run's."""
    stored = _load(context)
    if stored is None or stored.advice is None or stored.model_sha256 != _model_digest(context):
        return None
    return stored


def _load(context: RunContext) -> Sensitivity | None:
    try:
        return msgspec.json.decode((context.root / SENSITIVITY).read_bytes(), type=Sensitivity)
    except (OSError, msgspec.DecodeError):
        return None


def _save(context: RunContext, measured: Sensitivity) -> None:
    write_bytes(context.root / SENSITIVITY, msgspec.json.format(msgspec.json.encode(measured), indent=1))


def _model_digest(context: RunContext) -> str | None:
    """Hash of the files of the finished stage `qat`."""
    record = context.record("qat")
    return None if record is None else _digest(record.outputs)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
