"""Sensitivity: what int8 costs, layer by layer, on validation images prepared as the device prepares them.

The results are written after each layer, under fingerprints of the model and of the images: an interrupted
measurement goes on, that of another model or of other images starts afresh.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from eyas_host.compress.quantize.fallback import SAMPLE, Fallback, balanced_rows, choose_fallback, most_harmful
from eyas_host.compress.quantize.mixed import Harm, MixedPrecision
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluate.inference import pick_device
from eyas_host.pipeline.runner import RunContext
from eyas_host.quant.checkpoints import load_quantized
from eyas_host.support.errors import StageError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import meter

RESULT = Path("sensitivity") / "sensitivity.json"
"""Below the run's folder."""

_ADVISED = 5
"""Layers that the advice may keep float where the recipe's `quantize.fallback` is 0."""


class LayerHarm(msgspec.Struct, frozen=True):
    """One layer, against the same network with all quantizers off."""

    layer: str
    alone: Harm
    """Only this layer in int8: its weight, what it reads and what it writes."""
    without: Harm
    """All layers in int8 but this."""


class Sensitivity(msgspec.Struct, frozen=True):
    """`sensitivity/sensitivity.json`."""

    model: str
    """Fingerprint of the QAT model."""
    images: str
    """Fingerprint of the images and of how they were prepared."""
    count: int
    """Validation images."""
    whole: Harm
    """All layers in int8."""
    layers: tuple[LayerHarm, ...] = ()
    """Those measured so far, in order of execution."""
    advice: Fallback | None = None
    """What to keep float, measured on the same images; None while layers are missing."""

    @property
    def ranked(self) -> list[LayerHarm]:
        """The layers, the most harmful first."""
        by_name = {entry.layer: entry for entry in self.layers}
        return [by_name[name] for name in most_harmful({name: entry.alone for name, entry in by_name.items()})]


def measure_sensitivity(context: RunContext, *, images: int = SAMPLE) -> Sensitivity:
    """Measure each layer of a run's QAT model on at most `images` validation images, as many of each class.

    Raises `StageError` if the stage `qat` is not finished, `CompressError` if what it left is damaged, and `DataError`
    if an image changed.
    """
    recipe, spec = context.recipe, context.recipe.image.preprocessing()
    model = _model(context)
    if model is None:
        raise StageError(
            f"{context.folder('qat')}: not finished, so there is no int8 model to look into; run that stage"
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
    shown = _digest([msgspec.to_builtins(spec), [image.sha256 for image in sample.images]])
    found = _load(context)
    if found is None or (found.model, found.images) != (model, shown):
        found = Sensitivity(model, shown, len(sample), mixed.without(()))
    done = {entry.layer for entry in found.layers}
    with meter("layer by layer", len(mixed.layers), done=len(done)) as bar:
        for name in mixed.layers:
            if name not in done:
                entry = LayerHarm(name, mixed.alone(name), mixed.without((name,)))
                found = msgspec.structs.replace(found, layers=(*found.layers, entry), advice=None)
                _save(context, found)
                bar.advance(name)
    advice = choose_fallback(
        [entry.layer for entry in found.ranked],
        lambda names: mixed.without(names).drop,
        max_drop=recipe.gate.max_drop,
        most=recipe.quantize.fallback or _ADVISED,
    )
    found = msgspec.structs.replace(found, advice=advice)
    _save(context, found)
    return found


def load_sensitivity(context: RunContext) -> Sensitivity | None:
    """What was measured; None if that is missing, unfinished, or of another QAT model than the run has now."""
    found = _load(context)
    return found if found is not None and found.advice is not None and found.model == _model(context) else None


def _load(context: RunContext) -> Sensitivity | None:
    try:
        return msgspec.json.decode((context.root / RESULT).read_bytes(), type=Sensitivity)
    except (OSError, msgspec.DecodeError):
        return None


def _save(context: RunContext, found: Sensitivity) -> None:
    write_bytes(context.root / RESULT, msgspec.json.format(msgspec.json.encode(found), indent=1))


def _model(context: RunContext) -> str | None:
    """Fingerprint of the files of the finished stage `qat`."""
    record = context.record("qat")
    return None if record is None else _digest(record.outputs)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
