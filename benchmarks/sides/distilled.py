"""Students of one fold of a data set, each taught in a way of its own: teachers, cached views, trainings, predictions.

What is finished lies in the fold's folder and is not done again. Each step is a function of the fold and a name, for a
process of its own with one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.bootstrap import Ints
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.models.checkpoints import load_state
from eyas_host.models.factory import PixelClassifier, build_student, build_teacher, move
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.processes import end_with_parent
from eyas_host.support.progress import console
from eyas_host.support.quiet import quiet_libraries, quiet_warnings
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.losses import SoftLoss
from eyas_host.train.student import DistillationTask
from eyas_host.train.teacher import train_teacher
from eyas_host.train.view_cache import ViewCache
from sides.comparison import Logits
from sides.lessons import make_split

TeacherName = Literal["recipe", "whole", "progressive", "both", "turned"]
ALONE = ("run.processes=1", "run.threads=1", "run.workers=0", "run.device=cpu", "run.trackers=[]")
"""Each training in one process, so that two of them run beside each other."""
FULL_SIZE = ("teacher.progressive=0", "student.progressive=0")
"""Without progressive resizing, which is a way of its own here."""
_OWN: Mapping[str, tuple[str, ...]] = {
    "recipe": (),
    "whole": ("teacher.unfreeze=all",),
    "progressive": ("teacher.progressive=0.5",),
}
"""Teachers that are trained, and their settings; the others answer with these."""
NEEDED: Mapping[TeacherName, tuple[str, ...]] = {
    "recipe": ("recipe",),
    "whole": ("whole",),
    "progressive": ("progressive",),
    "both": ("recipe", "whole"),
    "turned": ("recipe",),
}
"""The trained teachers that each teacher needs."""


_MIXED = ("mixup", "cutmix")
"""Settings of `[augment]` that change the cached views."""


class Way(NamedTuple):
    """A way to train the student."""

    title: str
    settings: tuple[str, ...] = ()
    teacher: TeacherName | None = "recipe"
    """Who answers; None: labels alone."""
    standardised: bool = False
    """Logits are standardised before the KL divergence."""
    classes: int = 2
    """It makes sense from so many classes up."""


class Fold(NamedTuple):
    """A fold of a data set."""

    name: str
    recipe: Path
    settings: tuple[str, ...]
    root: Path

    def load(self, *more: str) -> Recipe:
        """The recipe with the settings of this fold and others."""
        return load_recipe(self.recipe, [*self.settings, f"run.name={self.name}", *ALONE, *FULL_SIZE, *more])


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came out of a training."""

    processor_s: float
    """Processor seconds of this step alone."""
    settings: tuple[str, ...] = ()


def prepare_process() -> None:
    """Set up a process that trains alone."""
    quiet_libraries()
    quiet_warnings()
    console.quiet = True
    end_with_parent()
    torch.set_num_threads(1)


def train_fold_teacher(fold: Fold, name: str) -> None:
    """Train a teacher and keep its predictions of the held-out images."""
    folder = fold.root / "teachers" / name
    if (folder / "outcome.json").exists():
        return
    recipe = fold.load(*_OWN[name])
    split = make_split(recipe, fold.root)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    model, _, _ = train_teacher(recipe, split, folder)
    spent = time.process_time() - started
    save_tensors(folder / "teacher.pt", model.cpu().state_dict())
    _finish(folder, recipe, split, model, Outcome(processor_s=spent))


def make_fold_views(fold: Fold, teacher: TeacherName, settings: tuple[str, ...]) -> None:
    """Make the cached views that students with these settings learn from, with this teacher's answers."""
    recipe = fold.load(*settings)
    folder = views_folder(fold, teacher, settings)
    if (folder / "outcome.json").exists():
        return
    split = make_split(recipe, fold.root)
    members = [_trained(fold, len(split.labels), own) for own in NEEDED[teacher]]
    if teacher == "both":
        model: PixelClassifier = BothTeachers(*members).eval()
    elif teacher == "turned":
        model = TurnedTeacher(members[0], _turns(recipe)).eval()
    else:
        model = members[0]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    ViewCache.make(folder, recipe, split, model)
    write_bytes(folder / "outcome.json", msgspec.json.encode(Outcome(processor_s=time.process_time() - started)))


def views_folder(fold: Fold, teacher: TeacherName, settings: tuple[str, ...]) -> Path:
    """Where these views lie: students that need the same share them."""
    recipe = fold.load(*settings)
    mixed = "".join(f"-{kind}{getattr(recipe.augment, kind):g}" for kind in _MIXED if getattr(recipe.augment, kind))
    return fold.root / "views" / f"{teacher}-{recipe.image.size}-{recipe.student.views}{mixed}"


def train_fold_student(fold: Fold, name: str, way: Way) -> None:
    """Train a student and keep its predictions of the held-out images."""
    folder = fold.root / "students" / name
    if student_is_done(fold, name, way):
        return
    recipe = fold.load(*way.settings)
    split = make_split(recipe, fold.root)
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()  # of other settings, maybe
    started = time.process_time()
    cache = ViewCache(views_folder(fold, way.teacher or "recipe", way.settings))
    task = DistillationTask(recipe, split, cache, teacher=way.teacher is not None)
    if way.standardised:
        task.loss.soft = StandardisedLoss(temperature=recipe.student.temperature)
    torch.manual_seed(recipe.run.seed)
    model = move(build_student(recipe.student, len(split.labels))[0], task.device)
    task.train(
        model,
        epochs=recipe.student.epochs,
        rate=recipe.student.rate,
        ema=recipe.student.ema,
        progressive=True,
        checkpoint=folder / "student.ckpt",
        title=name,
    )
    outcome = Outcome(processor_s=time.process_time() - started, settings=way.settings)
    _finish(folder, recipe, split, model, outcome)


def student_is_done(fold: Fold, name: str, way: Way) -> bool:
    """Whether this training is finished, with these settings."""
    found = outcome_of(fold, "students", name)
    return found is not None and found.settings == way.settings


def outcome_of(fold: Fold, kind: Literal["teachers", "students"], name: str) -> Outcome | None:
    """What came out, or None while it is not finished."""
    file = fold.root / kind / name / "outcome.json"
    return msgspec.json.decode(file.read_bytes(), type=Outcome) if file.exists() else None


def predictions(fold: Fold, kind: Literal["teachers", "students"], name: str) -> tuple[Logits, Ints]:
    """Logits of the fold's held-out images and their labels."""
    with np.load(fold.root / kind / name / "held-out.npz") as data:
        return data["logits"], data["targets"]


class StandardisedLoss(SoftLoss):
    """KL divergence of standardised logits: each image's logits have mean 0 and deviation 1 before the temperature.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", 2024. With two classes standardised logits
    are 1 and -1, whatever the network says.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of logits [n, classes]."""
        return super().forward(_standardised(student), _standardised(teacher))


class BothTeachers(PixelClassifier):
    """Two teachers as one: their features side by side, and the mean of their logits."""

    def __init__(self, first: PixelClassifier, second: PixelClassifier) -> None:
        super().__init__(first.backbone, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.members = torch.nn.ModuleList([first, second])
        self._widths = [first.pooled_channels, second.pooled_channels]

    def pooled(self, pixels: Tensor) -> Tensor:
        """Features of both, [n, channels of both]."""
        return torch.cat([member.pooled(pixels) for member in self.members], dim=1)  # type: ignore[operator]

    def classify(self, pooled: Tensor) -> Tensor:
        """Mean of both logits."""
        parts = pooled.split(self._widths, dim=1)
        answers = [member.classify(part) for member, part in zip(self.members, parts, strict=True)]  # type: ignore[operator]
        return torch.stack(answers).mean(0)

    @property
    def pooled_channels(self) -> int:
        """Channels of both."""
        return sum(self._widths)


class TurnedTeacher(PixelClassifier):
    """A teacher that answers with the mean over an image's mirror images and turns, as far as the recipe allows them.

    Its classifier is linear: that of the mean of the features is the mean of the logits.
    """

    def __init__(self, teacher: PixelClassifier, turns: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__(teacher.backbone, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.teacher = teacher
        self._turns = turns

    def pooled(self, pixels: Tensor) -> Tensor:
        """Mean features, [n, channels]."""
        return torch.stack([self.teacher.pooled(turn(pixels)) for turn in self._turns]).mean(0)


def _turns(recipe: Recipe) -> list[Callable[[Tensor], Tensor]]:
    """The image itself, and up to three others that the recipe's augmentation takes for the same."""
    turns: list[Callable[[Tensor], Tensor]] = [lambda image: image]
    if recipe.augment.horizontal_flip:
        turns.append(lambda image: image.flip(3))
    if recipe.augment.quarter_turns:
        turns += [lambda image: image.rot90(1, (2, 3)), lambda image: image.rot90(3, (2, 3)).flip(3)]
    return turns


def _standardised(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (centred.std(1, keepdim=True, correction=0) + 1e-7)


def _trained(fold: Fold, classes: int, name: str) -> PixelClassifier:
    model = build_teacher(fold.load(*_OWN[name]).teacher, classes)[0]
    model.load_state_dict(load_state(fold.root / "teachers" / name / "teacher.pt"))
    return model.eval()


def _finish(folder: Path, recipe: Recipe, split: Split, model: PixelClassifier, outcome: Outcome) -> None:
    """Write predictions, and last the outcome: it says that all is there."""
    test = split.open_test("benchmarks/distillation.py", early=True)
    logits = logits_of(model, prepared(test.pixels, recipe.image.preprocessing()), pick_device("cpu"))
    with atomic_write(folder / "held-out.npz") as temporary, temporary.open("wb") as stream:
        np.savez(stream, logits=logits, targets=test.targets)
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    write_bytes(folder / "outcome.json", msgspec.json.encode(outcome))
