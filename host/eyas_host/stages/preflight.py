"""What would end a later stage and can be known before the first one: looked at in seconds, instead of after hours."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.errors import EyasError
from eyas_host.data.sources import list_images
from eyas_host.pipeline.code import imported_modules
from eyas_host.pipeline.runner import BUNDLE, RunContext
from eyas_host.recipe import Recipe
from eyas_host.support.errors import MissingExtra, StageError
from eyas_host.support.extras import extra_of, install_line, missing_modules
from eyas_host.support.files import cache_folder
from eyas_host.support.machine import cuda_compiler

if TYPE_CHECKING:
    from eyas_host.models.factory import PixelClassifier

CURVES = "curves"
"""Folder of live curves, below the run's folder."""
_TRAINING = ("teach", "distill", "prune", "qat")
_OPTIMIZER_BYTES = 16
"""Bytes of a parameter in a checkpoint: the weight, the best one so far, and two moments of AdamW."""
_COPIES = 6
"""Networks of the student's size that stay: with and without a teacher, pruned, and for QAT."""
_ARTEFACT_BYTES = {"fp32": 4.5, "int16": 2.5, "int8": 1.5}
"""Bytes of a parameter in an artefact, with its share of the rest."""
_FIXED_BYTES = 20e6
"""Report, card, golden images, live curves."""


class Space:
    """Estimated bytes that a run still writes, by what they are for."""

    def __init__(self, recipe: Recipe, images: int, teacher: int, student: int) -> None:
        """Estimate for `images` training images and networks of so many parameters."""
        largest = max(teacher, student) * _OPTIMIZER_BYTES
        artefacts = sum(_ARTEFACT_BYTES[p] * student for p in recipe.compile.precisions) * len(recipe.compile.runtimes)
        self.views = 0.0 if recipe.student.checkpoint else 3.0 * images * recipe.student.views * recipe.image.size**2
        self.checkpoints = 2.0 * largest + 4 * teacher + 4 * _COPIES * student
        self.artefacts = 2 * artefacts + _FIXED_BYTES

    @property
    def total(self) -> float:
        """All of it."""
        return self.views + self.checkpoints + self.artefacts

    def __str__(self) -> str:
        parts = {"views": self.views, "checkpoints": self.checkpoints, "artefacts and report": self.artefacts}
        return ", ".join(f"{name} {_mb(size)}" for name, size in parts.items() if size)


def check_chain(context: RunContext, stages: Sequence[str]) -> None:
    """Look for what would end one of these stages, which are about to run; several problems are one error.

    Packages, folders, the table of `[prune]`, layers of `[quantize] keep_float`, whether the student can be folded, a
    compiler, and the free disk space. Raises `StageError`, or the only problem's own error.
    """
    problems = list(_problems(context, stages))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "\n  ".join(map(str, problems))
        raise StageError(f"{context.root}: {len(problems)} problems would end this run later:\n  {lines}")


def _problems(context: RunContext, stages: Sequence[str]) -> Iterator[EyasError]:
    missing = list(_missing(stages))
    for extra in sorted({extra for _, module in missing if (extra := extra_of(module))}):
        yield _missing_extra(extra, [(stage, module) for stage, module in missing if extra_of(module) == extra])
    for check in (_check_folders, _check_temporary_folder, _check_kernels_folder, _check_compiler):
        if (problem := _error_of(partial(check, context, stages))) is not None:
            yield problem
    if not missing and {*stages} & {*_TRAINING}:
        yield from _networks(context, stages)


def _missing(stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(stage, module) for each module that is not installed and the first stage that imports it."""
    known: set[str] = set()
    for stage in stages:
        for module in missing_modules(imported_modules(f"eyas_host.stages.{stage}") - known):
            known.add(module)
            yield stage, module


def _missing_extra(extra: str, missing: Sequence[tuple[str, str]]) -> MissingExtra:
    """One line for all modules of an extra; the first is named with its stage."""
    (stage, module), *others = missing
    more = f" (and {len(others)} more of its packages)" if others else ""
    return MissingExtra(f"stage {stage!r} needs {module}{more}, which is not installed: {install_line(extra)}")


def _check_folders(context: RunContext, stages: Collection[str]) -> None:
    """Look for folders of another user, or on a read-only disk, in which the stages write."""
    folders = (context.root, *(context.folder(name) for name in (*stages, BUNDLE, CURVES)))
    if closed := [str(path) for path in folders if path.exists() and not os.access(path, os.W_OK | os.X_OK)]:
        raise StageError(
            f"{', '.join(closed)}: cannot be written; see to the permissions, or choose another --runs or [run] name"
        )


def _check_temporary_folder(_: RunContext, stages: Collection[str]) -> None:
    """Exporters write temporary files."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise StageError(f"{error.strerror or error}; set TMPDIR to a folder that can be written") from None


def _check_kernels_folder(context: RunContext, stages: Collection[str]) -> None:
    """Look at the folder in which the kernels of simulated int8 are compiled for a GPU."""
    if "qat" not in stages or context.recipe.run.device == "cpu" or not cuda_compiler(os.environ, shutil.which):
        return
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given).absolute() if given else cache_folder("torch_extensions")
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise StageError(f"TORCH_EXTENSIONS_DIR = {given}: cannot be written; unset it, or name a writable folder")


def _check_compiler(context: RunContext, stages: Collection[str]) -> None:
    """`[run] compile` needs one, at the first epoch of the teacher's blocks."""
    if context.recipe.run.compile and {*stages} & {*_TRAINING}:
        from eyas_host.train.compiled import check_compiler

        check_compiler()


def _networks(context: RunContext, stages: Collection[str]) -> Iterator[EyasError]:
    """Check what depends on the networks: their sizes, and the layers that the recipe names."""
    from eyas_host.models.factory import build

    recipe = context.recipe
    try:
        images = list_images(recipe.data).images
        classes = len({image.label for image in images})
        student = build(recipe.student.model, classes, "random", activation=recipe.student.activation)[0].eval()
        teacher = build(recipe.teacher.model, classes, "random")[0]
    except EyasError:  # the stages that read and build them say it within the first minute
        return
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    train = min(len(images), recipe.data.limit or len(images)) * recipe.data.split[0]
    checks = [partial(_check_space, context.root, Space(recipe, ceil(train), *parameters))]
    checks += [partial(_check_table, recipe, student)] if "prune" in stages else []
    checks += [partial(_check_layers, recipe, student)] if "qat" in stages else []
    yield from (problem for check in checks if (problem := _error_of(check)) is not None)


def _check_space(root: Path, space: Space) -> None:
    there = sum(path.lstat().st_size for path in root.rglob("*")) if root.exists() else 0
    free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
    if space.total - there > free:
        raise StageError(
            f"{root}: the run needs about {_mb(space.total - there)} more ({space}), and {_mb(free)} are free; free "
            "some space, or choose another --runs"
        )


def _check_table(recipe: Recipe, student: PixelClassifier) -> None:
    """`[prune] table` is of this student and these runtimes."""
    if recipe.prune.table:
        from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes, read_table

        times = read_table(Path(recipe.prune.table), recipe.compile.runtimes)
        LatencyModel(times, layer_shapes(student, size=recipe.image.size), source=f"[prune] table {recipe.prune.table}")


def _check_layers(recipe: Recipe, student: PixelClassifier) -> None:
    """The student can be folded for int8, and the layers that stay in float exist."""
    from eyas_host.quant.fold import fold_for_deployment

    deploy = fold_for_deployment(student)
    if recipe.quantize.keep_float:
        import torch

        from eyas_host.quant.graph import required_placement

        required_placement(deploy, torch.zeros(1, 3, recipe.image.size, recipe.image.size), recipe.quantize.keep_float)


def _error_of(check: Callable[[], object]) -> EyasError | None:
    try:
        check()
    except EyasError as error:
        return error
    return None


def _mb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB" if size >= 1e9 else f"{max(1, size / 1e6):,.0f} MB"
