"""`[run]`: the name of the run and how it uses the machine."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.types import Count

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RunSection(Section, frozen=True):
    """`[run]`: the name of the run and how it uses the machine."""

    name: Annotated[str, Meta(pattern=NAME)]
    """Results go to runs/<name>."""
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Seeds the split, initial weights, data order and augmentation."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; `auto` uses a GPU if there is one."""
    threads: Count = 0
    """Torch threads per training process; 0: automatic (1 up to 160 px, else all cores)."""
    processes: Annotated[int, Meta(ge=1, le=16)] | Literal["auto"] = "auto"
    """Training processes that share each batch on a processor; `auto`: one a core up to 160 px, where the batch has 16
    images for each and the training takes more than a minute; one on a GPU (`torchrun` starts one a GPU)."""
    amp: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of all trainings except QAT. `auto`: bf16 on a GPU that has it, else none; fp16 needs a GPU, bf16
    works on CPUs too, where it is seldom faster."""
    compile: bool = False
    """Compile teacher and student with torch.compile for their training: a minute or more at the start of each, then
    faster steps on a GPU. Needs a C++ compiler; not for the head alone, QAT and students with `feature_layers`."""
    selection_metric: Literal["combined", "balanced_accuracy", "accuracy", "f1", "auc", "loss"] = "combined"
    """Validation metric that selects the best epoch, stops training early and unfreezes blocks; `combined` is balanced
    accuracy + AUC / 2."""
    checkpoint_minutes: Annotated[float, Meta(ge=0.0, le=1440.0)] = 5.0
    """Minutes between checkpoints inside an epoch, besides the one at its end (0: after every step)."""
    trackers: tuple[Literal["auto", "tensorboard", "wandb", "mlflow"], ...] = ("auto",)
    """Where live curves are logged; `auto`: TensorBoard if it is installed, in runs/<name>/curves. `wandb` sends
    metrics to a server."""
    workers: Annotated[int, Meta(ge=0, le=64)] | Literal["auto"] = "auto"
    """Loader processes per training process; 0: load in the training process. `auto` depends on the cores."""
