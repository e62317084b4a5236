"""Settings that are allowed and seldom wise: each in one line with what, why, and what instead.

They never stop a run. What the images' counts and labels are to be feared for is said by `data.balance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection

FASTEST = 1e-3
"""Rate above which pretrained layers forget faster than they adapt (AdamW)."""
SMALLEST_BATCH = 8
LONGEST_PATIENCE = 10
TEMPERATURES = (1.0, 10.0)
MOST_SMOOTHING = 0.1
DIST_BATCH = 16
"""Images in a batch below which a correlation over them is mostly chance."""

_LATERAL = {"left", "right", "clockwise", "counterclockwise", "anticlockwise", "mirrored", "flipped"}
_UPRIGHT = {"up", "down", "top", "bottom", "upright", "upsidedown", "inverted"}
_WRITTEN = {"text", "letter", "letters", "digit", "digits", "number", "sign", "signs", "arrow", "xray", "chest"}


def recipe_warnings(recipe: Recipe) -> list[str]:
    """All that can be said before the images are looked at."""
    return teacher_warnings(recipe) + student_warnings(recipe)


def teacher_warnings(recipe: Recipe) -> list[str]:
    """About how the teacher is trained; none where a ready student needs no teacher."""
    return [] if recipe.student.ready else list(_of_teacher(recipe.teacher))


def student_warnings(recipe: Recipe, classes: int | None = None) -> list[str]:
    """About how the student is trained; none where it is ready. What needs the number of classes comes last."""
    return [] if recipe.student.ready else list(_of_student(recipe.student, classes))


def label_warnings(recipe: Recipe, labels: Sequence[str]) -> list[str]:
    """About labels whose meaning an augmentation changes."""
    found = []
    augment = recipe.augment
    turned = [
        name
        for name, words in (
            ("horizontal_flip", _LATERAL | _WRITTEN),
            ("vertical_flip", _UPRIGHT | _WRITTEN),
            ("quarter_turns", _LATERAL | _UPRIGHT | _WRITTEN),
        )
        if getattr(augment, name) and (_characters(labels) or any(words & _words(label) for label in labels))
    ]
    if turned:
        found.append(
            f"[augment] {', '.join(turned)}: the labels ({', '.join(labels[:4])}{', ...' * (len(labels) > 4)}) sound "
            f"like something that a flip or a turn makes another class of; if so, forbid = {turned}".replace("'", '"')
        )
    return found


def _of_teacher(teacher: TeacherSection) -> Iterator[str]:
    unfrozen = teacher.epochs > 0 and teacher.weights != "random"
    rate = teacher.rate * (teacher.block_rate if teacher.unfreeze_by == "plateau" else 1.0)
    if unfrozen and rate > FASTEST:
        yield (
            f"[teacher] rate = {rate:g} on unfrozen blocks: above {FASTEST:g} pretrained weights are forgotten faster "
            "than they adapt; take 1e-3 to 1e-5"
        )
    if unfrozen and teacher.layer_decay == 1.0 and teacher.unfreeze != "0":
        yield (
            "[teacher] layer_decay = 1.0, one rate for all blocks: the lowest ones hold what any image needs and are "
            "torn up as fast as the head learns; take 0.65 to 0.9, or freeze them (unfreeze)"
        )
    if teacher.patience > LONGEST_PATIENCE:
        yield (
            f"[teacher] patience = {teacher.patience}: so many epochs without a better validation are spent on "
            "overfitting; take 3 to 5"
        )
    if teacher.batch * teacher.accumulate < SMALLEST_BATCH:
        yield (
            f"[teacher] batch = {teacher.batch}: a gradient of fewer than {SMALLEST_BATCH} images is mostly noise; "
            "take 16 or more, or accumulate = 4 where memory is short"
        )
    if teacher.label_smoothing > MOST_SMOOTHING:
        yield (
            f"[teacher] label_smoothing = {teacher.label_smoothing:g}: above {MOST_SMOOTHING:g} a teacher no longer "
            "says which classes are alike, which is what the student learns from (Mueller et al., 2019); take 0 to 0.1"
        )


def _of_student(student: StudentSection, classes: int | None) -> Iterator[str]:
    low, high = TEMPERATURES
    if student.kd_ratio and not low <= student.temperature <= high:
        effect = "sharpens the teacher's answers to labels" if student.temperature < low else "makes them all alike"
        yield f"[student] temperature = {student.temperature:g} {effect}; take {low:g} to {high:g} (2 to 4 is usual)"
    if student.batch < SMALLEST_BATCH:
        yield (
            f"[student] batch = {student.batch}: BatchNorm's statistics of fewer than {SMALLEST_BATCH} images are "
            "mostly noise; take 16 or more"
        )
    elif student.kd == "dist" and student.batch < DIST_BATCH:
        yield (
            f"[student] kd = 'dist' with batch = {student.batch}: it correlates over the images of a batch, and of "
            f"fewer than {DIST_BATCH} that is mostly chance; take 32 or more, or kd = 'kl'"
        )
    if student.rate > 10 * FASTEST:
        yield (
            f"[student] rate = {student.rate:g}: above {10 * FASTEST:g} AdamW seldom settles; take 3e-3 to 1e-3, or a "
            "tenth of it for a student that knows its task already"
        )
    if not student.kd_ratio and not student.hint and not student.hints:
        yield "[student] kd_ratio = 0 without a hint: nothing is learnt from the teacher; take kd_ratio = 0.5 to 0.9"
    if student.kd == "dist" and classes == 2:
        yield (
            "[student] kd = 'dist' with two classes: over two classes a correlation is no more than which of them is "
            "the likelier, so half of the loss teaches nothing; take 'kl'"
        )


def _words(label: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"x-?ray", "xray", label.lower())))


def _characters(labels: Sequence[str]) -> bool:
    """Whether the labels are mostly single characters or numbers."""
    return 2 * sum(len(label) == 1 or label.isdigit() for label in labels) > len(labels)
