"""The workstation side of Eyas: train, distill, compress, compile, verify, report, and serve a fleet.

The public names load at first use, so `import eyas_host` itself is quick.

>>> from eyas_host import distill
>>> run = distill("models/shapes/recipe.toml", until="split")
>>> run.stages["split"].facts["counts"]["test"]
{'circle': 1, 'cross': 2, 'ring': 1, 'square': 2, 'triangle': 2}
"""

from typing import TYPE_CHECKING

from eyas_device import __version__

__all__ = [
    "BrokerUnreachable",
    "CompileError",
    "CompressError",
    "DataError",
    "EyasError",
    "GateError",
    "MissingExtra",
    "RecipeError",
    "RunError",
    "StageError",
    "TrainError",
    "TuneError",
    "WeightsError",
    "__version__",
    "distill",
    "evaluate",
    "load_recipe",
    "open_run",
    "open_store",
]

if TYPE_CHECKING:
    from eyas_device.errors import EyasError
    from eyas_host.api import distill, evaluate, load_recipe, open_run, open_store
    from eyas_host.support.errors import (
        BrokerUnreachable,
        CompileError,
        CompressError,
        DataError,
        GateError,
        MissingExtra,
        RecipeError,
        RunError,
        StageError,
        TrainError,
        TuneError,
        WeightsError,
    )
else:
    from eyas_device.support.lazy import lazy_attributes

    __getattr__, __dir__ = lazy_attributes(
        __name__,
        dict.fromkeys(__all__, "eyas_host.support.errors")
        | dict.fromkeys(("distill", "evaluate", "load_recipe", "open_run", "open_store"), "eyas_host.api"),
    )
