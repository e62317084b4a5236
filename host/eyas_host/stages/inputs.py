"""Cheap hashes of a stage's other inputs: images, weight files, a latency table."""

from __future__ import annotations

from pathlib import Path

from eyas_device.bundle import sha256
from eyas_host.data.sources import fingerprint
from eyas_host.models import pretrained
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection


def images_fingerprint(recipe: Recipe) -> str:
    """Hash of the images' names, sizes and times: cheap, and enough to notice a change."""
    return fingerprint(recipe.data)


def teacher_weights(recipe: Recipe) -> str:
    """Hash of the weights file that the teacher starts from."""
    return _sha256(_weights_file(recipe.teacher, trained=True))


def student_weights(recipe: Recipe) -> str:
    """Hash of the weights file that the student starts from, or of its checkpoint."""
    return _sha256(recipe.student.checkpoint or _weights_file(recipe.student, trained=False))


def latency_source(recipe: Recipe) -> str:
    """Where the latency for pruning comes from: the table's hash, else the runtime; empty if pruning needs none."""
    settings = recipe.prune
    if settings.method != "nncf" and (settings.method, settings.target) != ("channel", "latency"):
        return ""
    table = Path(settings.table)
    return sha256(table) if settings.table and table.is_file() else recipe.compile.runtimes[0]


def _weights_file(section: TeacherSection | StudentSection, *, trained: bool) -> str:
    """Path of the initial weights: the recipe's file, or pretrained weights that ship with Eyas."""
    return section.weights_file or str(
        pretrained.pretrained_file(section.model, section.weights, trained=trained) or ""
    )


def _sha256(path: str) -> str:
    return sha256(Path(path)) if path and Path(path).is_file() else ""
