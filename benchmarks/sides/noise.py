"""What the cached and the plain student reach on validation, and whether they differ by more than their seeds do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from common import Figure
from eyas_host.data.split import Split
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import PixelClassifier, build_student, build_teacher, move
from eyas_host.recipe import Recipe
from eyas_host.support.files import write_bytes
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.student import DistillationTask
from eyas_host.train.teacher import train_teacher
from eyas_host.train.view_cache import ViewCache
from sides.lessons import OnlineLesson, make_split


def gap(recipe: Recipe, root: Path, *, seeds: int, teacher_epochs: int = 3, epochs: int = 15) -> dict[str, Figure]:
    """Train both students with each seed from the same teacher and split; resumable."""
    short = msgspec.structs.replace(recipe.teacher, epochs=teacher_epochs)
    recipe = msgspec.structs.replace(recipe, teacher=short)
    split = make_split(recipe, root)
    teacher = _teacher(recipe, split, root / "teacher")
    cache = ViewCache.make(root / "views", recipe, split, teacher)
    reached: dict[str, list[float]] = {"cached": [], "plain": []}
    for seed in range(seeds):
        seeded = msgspec.structs.replace(recipe, run=msgspec.structs.replace(recipe.run, seed=seed))
        for name, values in reached.items():
            place = root / f"{name}-{seed}"
            if not (place / "reached.json").exists():
                task = DistillationTask(seeded, split, cache)
                if name == "plain":
                    task = OnlineLesson(seeded, split, cache, teacher)
                _write(place, _trained(task, split, place, epochs))
            values.append(msgspec.json.decode((place / "reached.json").read_bytes(), type=float))
    deviation = np.sqrt(sum(np.var(values, ddof=1) / seeds for values in reached.values()))
    cached, plain = (100 * float(np.mean(reached[name])) for name in ("cached", "plain"))
    words = " / ".join(", ".join(f"{100 * value:.1f}" for value in reached[name]) for name in ("cached", "plain"))
    return {
        "validation_gap": Figure(
            value=plain - cached,
            unit="points",
            bound=float(200 * deviation),
            better="lower",
            spread=words,
            note=f"balanced accuracy, plain minus cached; {seeds} seeds, {epochs} epochs, {recipe.student.views} "
            f"cached views, {teacher_epochs} epochs of the teacher; the bound: two standard errors of the difference",
        )
    }


def _teacher(recipe: Recipe, split: Split, place: Path) -> PixelClassifier:
    """The teacher, trained once."""
    saved = place / "teacher.pt"
    if not saved.exists():
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(saved, train_teacher(recipe, split, place)[0].cpu().state_dict())
    model = build_teacher(recipe.teacher, len(split.labels))[0]
    model.load_state_dict(torch.load(saved, weights_only=True))
    return model.eval()


def _trained(task: DistillationTask, split: Split, place: Path, epochs: int) -> float:
    """Balanced accuracy on validation of a student that learnt from `task`."""
    settings = task.recipe.student
    torch.manual_seed(task.recipe.run.seed)
    model = move(build_student(settings, len(split.labels))[0], task.device)
    place.mkdir(parents=True, exist_ok=True)
    task.train(
        model,
        epochs=epochs,
        rate=settings.rate,
        ema=settings.ema,
        checkpoint=place / "student.ckpt",
        title=place.name,
    )
    logits = logits_of(model, task.validation, task.device)
    return validation_metrics(logits, split.validation.targets)["balanced_accuracy"]


def _write(place: Path, value: float) -> None:
    write_bytes(place / "reached.json", msgspec.json.encode(value))
