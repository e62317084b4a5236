"""`[run]`: the name of the run and how it uses the machine."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from eyas_device.support.toml import Section
from eyas_host.recipe.cost import CostSection as CostSection
from eyas_host.recipe.training import StudentSection as StudentSection
from eyas_host.recipe.training import TeacherSection as TeacherSection
from eyas_host.recipe.tune import TuneSection as TuneSection
from eyas_host.recipe.types import Count


class RunSection(Section, frozen=True):
    """`[run]`: the name of the run and how it uses the machine."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Results go to runs/<name>."""
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Split, first weights, order and augmentation follow from it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    threads: Count = 0
    """Torch threads a training process; 0 chooses (1 a process up to 160 px, else all cores)."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of all trainings but int8's; fp16 needs a GPU, bf16 runs on processors too."""
    metric: Literal["objective", "balanced_accuracy", "accuracy", "f1", "auc", "loss"] = "objective"
    """The validation figure that chooses the best epoch, ends a training early and opens blocks; `objective` is
    balanced accuracy + AUC / 2."""
    checkpoint_minutes: Annotated[float, Meta(ge=0.0, le=1440.0)] = 5.0
    """How often training is saved inside an epoch, beside its end (0: after every step)."""
    trackers: tuple[Literal["auto", "tensorboard", "wandb", "mlflow"], ...] = ("auto",)
    """Who draws live curves; `auto`: TensorBoard where it is installed, in runs/<name>/curves. `wandb` sends figures to
    a server."""
    workers: Annotated[int, Meta(ge=0, le=64)] | Literal["auto"] = "auto"
    """Processes that draw views ahead of a training process; 0: it draws them itself. `auto` goes by the cores."""
