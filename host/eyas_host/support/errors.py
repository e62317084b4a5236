"""What can go wrong on the workstation; the root is the device's `EyasError`.

- `RecipeError`: a recipe has unknown keys, wrong types or an impossible combination.
- `DataError`: images or labels cannot be used.
- `WeightsError`: weights cannot be had or do not fit the model.
- `TrainError`: training went wrong (not a number, no steps).
- `CompressError`: a model cannot be folded, pruned or quantized.
- `CompileError`: a model cannot be turned into an artefact.
- `StageError`: a stage cannot run (its inputs are missing, its disk is full, another run holds it).
- `RunError`: a folder is not a run that this version can read, or a stage has no such name.
- `TuneError`: a search cannot run (its study is of another recipe or cannot be opened).
- `GateError`: what was made is below the recipe's bounds and is not packed.
- `MissingExtra`: an optional part is not installed; the message is the line that installs it.
"""

from eyas_device.errors import EyasError


class RecipeError(EyasError, ValueError):
    """A recipe has unknown keys, wrong types or an impossible combination."""


class DataError(EyasError, ValueError):
    """Images or labels cannot be used."""


class WeightsError(EyasError, RuntimeError):
    """Weights cannot be had or do not fit the model."""


class TrainError(EyasError, RuntimeError):
    """Training went wrong."""


class CompressError(EyasError, RuntimeError):
    """A model cannot be folded, pruned or quantized."""


class CompileError(EyasError, RuntimeError):
    """A model cannot be turned into an artefact."""


class StageError(EyasError, RuntimeError):
    """A stage cannot run."""


class RunError(EyasError, ValueError):
    """A folder is not a run that this version can read, or a stage has no such name."""


class GateError(EyasError, RuntimeError):
    """What was made is below the recipe's bounds and is not packed."""


class MissingExtra(EyasError, ImportError):  # noqa: N818 - reads as the state it reports
    """An optional part is not installed; the message is the line that installs it."""


class TuneError(EyasError, ValueError):
    """A search cannot run: its study is of another recipe or cannot be opened."""
