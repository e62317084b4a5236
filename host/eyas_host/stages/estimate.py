"""How much work each stage is: a rough model of images x epochs x seconds per image, for the plan of a run."""

from __future__ import annotations

from msgspec import Struct

from eyas_host.pipeline.clock import Step
from eyas_host.recipe import Recipe
from eyas_host.train.progressive import cost

_HASH_S = 0.002
"""Reading a file, its hashes and its perceptual hash, per image."""
_HEAD_VIEWS = 3
"""Views of each image whose features the teacher's head is trained on."""
_QAT_STEPS = 3.0
"""A step with simulated int8, and the float student's prediction beside it, in steps of the student."""
_ARTEFACT_PASSES = 6.0
"""Predictions of all artefacts, one image at a time, in forward passes of the student."""
_EXACT_PASSES = 60.0
"""Integer arithmetic in float64, likewise."""
_ROBUSTNESS_PASSES, _ROBUSTNESS_IMAGES = 20, 200
_LATENCY_CALLS = 150
LABELS_ONLY = "student from labels only"
"""Title of the meter while the distilled student waits for the other one."""
_LABELS_ONLY_LATER = 0.1
"""How much later it ends that runs beside, as a fraction of the distilled student's training."""
_TOGETHER = 0.87
"""Speed of a training process among several, as a fraction of that of one alone: they share memory and exchange
gradients."""
_FROZEN = 0.4
"""A forward pass of many images through a frozen network (`models.frozen_features`), in passes of torch."""
_START_S = 6.0
"""Importing the frameworks and loading the networks at the start of a stage."""
_COMPILE_S = {"litert": 16.0, "openvino": 6.0, "onnx": 4.0}
"""Runtime -> seconds for each precision."""


class Speed(Struct, frozen=True):
    """Seconds that an image costs on this machine."""

    read: float
    view: float
    teacher: float
    """A forward pass."""
    teacher_step: float
    """A step of training."""
    student: float
    student_step: float
    python: float = 1.0
    """Time of a loop in Python, in units of the machine that the constants were measured on when it was idle."""


class Counts(Struct, frozen=True):
    """Images of each split."""

    train: int
    validation: int
    test: int


def estimate_stages(
    recipe: Recipe, counts: Counts, speed: Speed, *, cores: int, processes: int = 1
) -> dict[str, tuple[Step, ...]]:
    """Stage -> its steps, with their estimated seconds; `processes` train together."""
    start = _START_S * speed.python
    train, validation, test = counts.train, counts.validation, counts.test
    teacher, student, prune, quantize = recipe.teacher, recipe.student, recipe.prune, recipe.quantize
    trained = not student.checkpoint
    labels_only = 2.0 if student.labels_only and cores < 2 * processes else 1.0
    together = 1.0 if processes == 1 else _TOGETHER * processes

    def epochs(count: int, step: float, check: float) -> float:
        return count * (train * step + validation * check) / together

    read_all = sum((train, validation, test)) * (speed.read + _HASH_S * speed.python)
    features = (_HEAD_VIEWS * train + validation) * (speed.view + _FROZEN * speed.teacher) / together
    teacher_step = speed.teacher_step * cost(teacher.progressive, teacher.epochs, recipe.image.size)
    teach = (
        Step(start + train * speed.read),
        Step(features, "teacher, features"),
        Step(teacher.head_epochs * (0.05 + train * 2e-5), "teacher, head"),
        Step(epochs(teacher.epochs, teacher_step + speed.view, speed.teacher), "teacher, blocks"),
    )
    student_step = speed.student_step * cost(student.progressive, student.epochs, recipe.image.size)
    student_epochs = epochs(student.epochs, student_step, speed.student) * labels_only
    distill = (
        Step(
            student.views * train * (speed.view + _FROZEN * speed.teacher) / together, "views and the teacher's outputs"
        ),
        Step(start),
        Step(student_epochs, "student"),
        *([Step(_LABELS_ONLY_LATER * student_epochs, LABELS_ONLY)] if student.labels_only else []),
    )
    size = 1.0 if prune.method == "none" else prune.keep**0.7
    recovery = epochs(prune.epochs, speed.student_step * size, speed.student * size)
    if prune.method == "none":
        pruned: tuple[Step, ...] = (Step(3.0),)
    elif (prune.method, prune.target) == ("channel", "latency"):
        between = 30 * speed.python + epochs(prune.round_epochs, speed.student_step, speed.student)
        seconds = [between] * (prune.rounds - 1) + [30 * speed.python + recovery]
        titles = [f"pruned student, round {number} of {prune.rounds}" for number in range(1, prune.rounds + 1)]
        pruned = (Step(start), *map(Step, seconds, titles))
    else:
        pruned = (Step(start), Step(recovery, "pruned student"))
    fine = epochs(quantize.epochs, speed.student_step * size * _QAT_STEPS, speed.student * 3 * size)
    calibration = Step(2 * start + quantize.calibration * speed.student * 5)
    qat: tuple[Step, ...] = (calibration, Step(fine, "int8 student")) if quantize.method == "qat" else (calibration,)
    seconds_of = {runtime: len(recipe.compile.precisions) * _COMPILE_S[runtime] for runtime in recipe.compile.runtimes}
    in_child = seconds_of.pop("litert", 0.0)  # beside the others, where there is a core
    here = sum(seconds_of.values())
    compiling = speed.python * (max(in_child, here) if cores > 1 else in_child + here)  # too uneven to follow its meter
    passes = speed.teacher * trained + speed.student * (3 + _ARTEFACT_PASSES + _EXACT_PASSES * size)
    calls = _LATENCY_CALLS * (speed.teacher * trained + speed.student * (2 + _ARTEFACT_PASSES))
    robust = min(validation, _ROBUSTNESS_IMAGES) * _ROBUSTNESS_PASSES * (speed.student + speed.view) / min(cores, 2)

    def predictions(images: int) -> Step:
        return Step(images * (speed.read + passes) / cores, "predictions of every variant")

    return {
        "split": (Step(speed.python + read_all, "reading images"),),
        "teach": teach if trained else (Step(1.0),),
        "distill": distill if trained else (Step(start),),
        "prune": pruned,
        "qat": qat,
        "compile": (Step(start + compiling),),
        "verify": (
            Step(start),
            predictions(validation),
            Step(3 * speed.python),
            Step(calls, "latency"),
            Step(2 * speed.python),
        ),
        "pack": (Step(2 * speed.python + train * (speed.read + speed.student) / cores),),
        "report": (Step(start), predictions(test), Step(robust, "robustness"), Step(10 * speed.python)),
    }
