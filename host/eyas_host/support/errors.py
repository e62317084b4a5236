"""Errors of the workstation; their root is the device's `EyasError`.

- `RecipeError`: a recipe has unknown keys, wrong types or an impossible combination.
- `DataError`: images or labels are unusable.
- `WeightsError`: weights are unavailable or do not match the model.
- `TrainError`: training failed (NaN, no steps).
- `CompressError`: a model cannot be folded, pruned or quantized.
- `CompileError`: a model cannot be exported to an artefact.
- `StageError`: a stage cannot run (its inputs are missing, its disk is full, another run holds it).
- `RunError`: a folder is not a run that this version can read, or a stage has no such name.
- `TuneError`: a search cannot run (its study is of another recipe or cannot be opened).
- `GateError`: an artefact is outside the recipe's bounds and is not packed.
- `BrokerUnreachable`: a broker cannot be reached or does not let this client in; exit code 1.
- `MissingExtra`: an optional package is not installed; the message is the install command.
"""

from eyas_device import errors as device_errors
from eyas_device.errors import EXIT_CHECK_FAILED, EyasError


class RecipeError(EyasError, ValueError):
    """A recipe has unknown keys, wrong types or an impossible combination."""


class DataError(EyasError, ValueError):
    """Images or labels are unusable."""


class WeightsError(EyasError, RuntimeError):
    """Weights are unavailable or do not match the model."""


class TrainError(EyasError, RuntimeError):
    """Training failed."""


class CompressError(EyasError, RuntimeError):
    """A model cannot be folded, pruned or quantized."""


class CompileError(EyasError, RuntimeError):
    """A model cannot be exported to an artefact."""


class StageError(EyasError, RuntimeError):
    """A stage cannot run."""


class RunError(EyasError, ValueError):
    """A folder is not a run that this version can read, or a stage has no such name."""


class GateError(EyasError, RuntimeError):
    """An artefact is outside the recipe's bounds and is not packed."""


class MissingExtra(EyasError, ImportError):  # noqa: N818 - reads as the state it reports
    """An optional package is not installed; the message is the install command."""


class TuneError(EyasError, ValueError):
    """A search cannot run: its study is of another recipe or cannot be opened."""


class BrokerUnreachable(device_errors.LinkError):
    """A broker cannot be reached or does not let this client in."""

    exit_code = EXIT_CHECK_FAILED
