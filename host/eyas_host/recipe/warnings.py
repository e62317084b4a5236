"""Warnings about settings that are allowed but seldom sensible: each names the setting, the reason and a better value.

They never stop a run. Warnings about the images' counts and labels come from `data.class_balance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection

MAX_RATE = 1e-3
"""Learning rate above which pretrained layers forget faster than they adapt (AdamW)."""
MIN_BATCH = 8
MAX_PATIENCE = 10
TEMPERATURES = (1.0, 10.0)
MAX_SMOOTHING = 0.1
MIN_DIST_BATCH = 16
"""Batch size below which a correlation over its images is mostly chance."""

_LATERAL = {"left", "right", "clockwise", "counterclockwise", "anticlockwise", "mirrored", "flipped"}
_UPRIGHT = {"up", "down", "top", "bottom", "upright", "upsidedown", "inverted"}
_WRITTEN = {"text", "letter", "letters", "digit", "digits", "number", "sign", "signs", "arrow", "xray", "chest"}


def recipe_warnings(recipe: Recipe) -> list[str]:
    """All warnings that need no images."""
    return teacher_warnings(recipe) + student_warnings(recipe)


def teacher_warnings(recipe: Recipe) -> list[str]:
    """Warnings about the teacher's training; none where a student's checkpoint replaces it."""
    return [] if recipe.student.checkpoint else list(_teacher_warnings(recipe.teacher))


def student_warnings(recipe: Recipe, classes: int | None = None) -> list[str]:
    """Warnings about the student's training; those that need the number of classes are skipped without it."""
    return [] if recipe.student.checkpoint else list(_student_warnings(recipe.student, classes))


def label_warnings(recipe: Recipe, labels: Sequence[str]) -> list[str]:
    """Warnings about labels whose meaning an augmentation may change."""
    augment = recipe.augment
    risky = [
        name
        for name, keywords in (
            ("horizontal_flip", _LATERAL | _WRITTEN),
            ("vertical_flip", _UPRIGHT | _WRITTEN),
            ("quarter_turns", _LATERAL | _UPRIGHT | _WRITTEN),
        )
        if getattr(augment, name)
        and (_mostly_characters(labels) or any(keywords & _words_of(label) for label in labels))
    ]
    if not risky:
        return []
    return [
        f"[augment] {', '.join(risky)}: a flip or rotation may change the class ({', '.join(labels[:4])}"
        f"{', ...' * (len(labels) > 4)}); if so, set forbid = {risky}".replace("'", '"')
    ]


def _teacher_warnings(teacher: TeacherSection) -> Iterator[str]:
    unfrozen = teacher.epochs > 0 and teacher.weights != "random"
    rate = teacher.rate * (teacher.block_rate if teacher.unfreeze_by == "plateau" else 1.0)
    if unfrozen and rate > MAX_RATE:
        yield (
            f"[teacher] rate = {rate:g} on unfrozen blocks: above {MAX_RATE:g} pretrained layers forget faster "
            "than they adapt; take 1e-3 to 1e-5"
        )
    if unfrozen and teacher.layer_decay == 1.0 and teacher.unfreeze != "0":
        yield (
            "[teacher] layer_decay = 1.0, one rate for all blocks: the lowest ones hold general features and "
            "are overwritten as fast as the head learns; take 0.65 to 0.9, or freeze them (unfreeze)"
        )
    if teacher.patience > MAX_PATIENCE:
        yield (
            f"[teacher] patience = {teacher.patience}: that many epochs without improvement are mostly "
            "overfitting; take 3 to 5"
        )
    if teacher.batch * teacher.accumulate < MIN_BATCH:
        yield (
            f"[teacher] batch = {teacher.batch}: a gradient of fewer than {MIN_BATCH} images is mostly noise; "
            "take 16 or more, or accumulate = 4 where memory is short"
        )
    if teacher.label_smoothing > MAX_SMOOTHING:
        yield (
            f"[teacher] label_smoothing = {teacher.label_smoothing:g}: above {MAX_SMOOTHING:g} a teacher loses "
            "the similarities between classes that the student learns from (Mueller et al., 2019); take 0 to 0.1"
        )


def _student_warnings(student: StudentSection, classes: int | None) -> Iterator[str]:
    low, high = TEMPERATURES
    if student.kd_ratio and not low <= student.temperature <= high:
        effect = (
            "sharpens the teacher's predictions to labels" if student.temperature < low else "makes them nearly uniform"
        )
        yield f"[student] temperature = {student.temperature:g} {effect}; take {low:g} to {high:g} (2 to 4 is usual)"
    if student.batch < MIN_BATCH:
        yield (
            f"[student] batch = {student.batch}: BatchNorm statistics of fewer than {MIN_BATCH} images are "
            "mostly noise; take 16 or more"
        )
    elif student.kd == "dist" and student.batch < MIN_DIST_BATCH:
        yield (
            f"[student] kd = 'dist' with batch = {student.batch}: it correlates over the images of a batch, which "
            f"is mostly chance below {MIN_DIST_BATCH}; take 32 or more, or kd = 'kl'"
        )
    if student.rate > 10 * MAX_RATE:
        yield (
            f"[student] rate = {student.rate:g}: above {10 * MAX_RATE:g} AdamW seldom converges; take 3e-3 to 1e-3, "
            "or a tenth of it for a student already trained for this task"
        )
    if not student.kd_ratio and not student.feature_loss and not student.feature_layers:
        yield (
            "[student] kd_ratio = 0 without feature distillation: nothing is learned from the teacher; take "
            "kd_ratio = 0.5 to 0.9"
        )
    if student.kd == "dist" and classes == 2:
        yield (
            "[student] kd = 'dist' with two classes: over two classes a correlation only says which is more likely, "
            "so half of the loss teaches nothing; take 'kl'"
        )


def _words_of(label: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"x-?ray", "xray", label.lower())))


def _mostly_characters(labels: Sequence[str]) -> bool:
    """Whether the labels are mostly single characters or numbers."""
    return 2 * sum(len(label) == 1 or label.isdigit() for label in labels) > len(labels)
