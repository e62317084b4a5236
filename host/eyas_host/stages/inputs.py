"""Cheap hashes of what a stage reads beside the recipe and other stages: images, weight files, a latency table."""

from __future__ import annotations

from pathlib import Path

from eyas_device.bundle import sha256
from eyas_host.data.sources import fingerprint
from eyas_host.models import pretrained
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection


def images_fingerprint(recipe: Recipe) -> str:
    """Names, sizes and times of the images: cheap, and enough to notice a change."""
    return fingerprint(recipe.data)


def teacher_weights(recipe: Recipe) -> str:
    """The file that the teacher starts from."""
    return _sha256(_start(recipe.teacher, trained=True))


def student_weights(recipe: Recipe) -> str:
    """The file that the student starts from, or is."""
    return _sha256(recipe.student.checkpoint or _start(recipe.student, trained=False))


def latency_source(recipe: Recipe) -> str:
    """What a latency is measured of: the table, else the runtime; nothing where none is asked for."""
    settings = recipe.prune
    if settings.method != "nncf" and (settings.method, settings.target) != ("channel", "latency"):
        return ""
    table = Path(settings.table)
    return sha256(table) if settings.table and table.is_file() else recipe.compile.runtimes[0]


def _start(section: TeacherSection | StudentSection, *, trained: bool) -> str:
    """The file of first weights: the recipe's, or Eyas's own."""
    return section.weights_file or str(pretrained.chosen(section.model, section.weights, trained=trained) or "")


def _sha256(path: str) -> str:
    return sha256(Path(path)) if path and Path(path).is_file() else ""
