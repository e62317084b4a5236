"""Loading of the networks that finished stages wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from eyas_host.models.factory import PixelClassifier, build
from eyas_host.models.pruned import PrunePlan, rebuild_channels
from eyas_host.models.weights import UNREADABLE
from eyas_host.pipeline.runner import RunContext
from eyas_host.support.errors import StageError

TEACHER = Path("teach") / "teacher.pt"
STUDENT = Path("distill") / "student.pt"
LABELS_ONLY = Path("distill") / "labels-only.pt"
PRUNED = Path("prune") / "student.pt"
PLAN = Path("prune") / "plan.json"


def load_state(path: Path) -> dict[str, Any]:
    """State dict of a file. Raises `StageError` if it is missing or damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise StageError(f"{path}: cannot be read ({why}); run that stage again") from None
    return state


def load_teacher(context: RunContext, classes: int) -> PixelClassifier:
    """The trained teacher."""
    return _loaded(build(context.recipe.teacher.model, classes, "random")[0], context.root / TEACHER)


def load_student(context: RunContext, classes: int, path: Path = STUDENT) -> PixelClassifier:
    """The distilled student, or with `LABELS_ONLY` the one trained without a teacher."""
    return _loaded(blank_student(context, classes), context.root / path)


def load_pruned(context: RunContext, classes: int) -> PixelClassifier:
    """The pruned student."""
    plan = msgspec.json.decode((context.root / PLAN).read_bytes(), type=PrunePlan)
    model = blank_student(context, classes)
    if plan.method == "channel":
        model = rebuild_channels(model, plan, size=context.recipe.image.size)
    return _loaded(model, context.root / PRUNED)


def blank_student(context: RunContext, classes: int) -> PixelClassifier:
    """An untrained student."""
    student = context.recipe.student
    return build(student.model, classes, "random", activation=student.activation)[0]


def _loaded(model: PixelClassifier, path: Path) -> PixelClassifier:
    model.load_state_dict(load_state(path))
    return model.eval()


def size_bytes(model: nn.Module) -> int:
    """Bytes of a network's float parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
