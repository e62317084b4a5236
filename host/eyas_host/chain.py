"""The nine stages of the main job: what each reads, does and leaves behind.

`split, teach, distill, prune, qat, compile, verify, pack, report`. All choices and gates read validation; the sealed
test part is read once, by `report`, after the bundle is packed. Frameworks are imported by the stage that needs them,
so that a mistake in the recipe or the pictures shows at once.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from rich.markup import escape

from eyas_device.bundle import sha256
from eyas_host import starts
from eyas_host.data.class_balance import balance, ratio, summary, warnings
from eyas_host.data.index import build_index
from eyas_host.data.sources import fingerprint
from eyas_host.data.split import Split, save_split, split_index
from eyas_host.pipeline import distributed
from eyas_host.pipeline.runner import Context, Outcome, Stage
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.warnings import label_warnings, student_warnings, teacher_warnings
from eyas_host.support.errors import StageError
from eyas_host.support.progress import say, warn

if TYPE_CHECKING:
    from eyas_host.models.weights import Fit
    from eyas_host.train.schedule import Epoch

_Result = TypeVar("_Result")

SINGLE_THREAD_SIZE = 160
"""Up to this side of the picture one torch thread trains faster than two (small tensors, measured)."""


def threads(recipe: Recipe) -> int:
    """Torch threads of a training process."""
    if recipe.run.threads:
        return recipe.run.threads
    cores = (os.cpu_count() or 1) // distributed.on_this_machine()
    return 1 if recipe.picture.size <= SINGLE_THREAD_SIZE else max(1, cores)


def split(context: Context) -> Outcome:
    """Index the pictures and divide them."""
    data = context.recipe.data
    index = build_index(data)
    if context.recipe.cost.table:
        from eyas_host.evaluate.cost import cost_matrix

        cost_matrix(context.recipe.cost, index.labels)  # a mistake in it shows now, not after the training
    manifest = split_index(index, data, context.recipe.run.seed)
    manifest = msgspec.structs.replace(manifest, warnings=tuple(warnings(manifest)))
    save_split(manifest, context.root, index)
    for line in (*manifest.notices, *manifest.warnings):
        warn(line)
    for line in index.unreadable:
        say(f"  left out: {escape(line)}")
    return Outcome(
        summary(manifest),
        {
            "strategy": manifest.strategy,
            "counts": manifest.counts,
            "balance": balance(manifest),
            "ratio": ratio(manifest),
            "warnings": list(manifest.warnings),
            "labels": list(index.labels),
            "left_out": len(index.unreadable),
            "copies": manifest.copies,
            "near_duplicates": sum(map(len, manifest.clusters)),
            "set_aside": {why: len(pictures) for why, pictures in manifest.set_aside.items()},
        },
    )


def _pictures_fingerprint(recipe: Recipe) -> str:
    """Names, sizes and times of the pictures: cheap, and enough to notice a change."""
    return fingerprint(recipe.data)


def teach(context: Context) -> Outcome:
    """Transfer-learn the teacher."""
    import torch

    from eyas_host.models import checkpoints
    from eyas_host.train.check import check_networks
    from eyas_host.train.checkpoint import save_tensors
    from eyas_host.train.teacher import train_teacher
    from eyas_host.train.trackers import Curves
    from eyas_host.train.view_cache import check_room

    if context.recipe.student.ready:
        return Outcome("not trained: the student is ready", {"weights": "none"})
    torch.set_num_threads(threads(context.recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    warned = _warned(context.recipe, data.labels, check_networks(context.recipe, len(data.labels)))
    views = context.folder("distill")  # what does not fit is told now, not after the training
    check_room(views, context.recipe, len(data.train), made=len(list(views.glob("view-*.u8"))))
    folder = context.folder("teach")
    curves = Curves(context.recipe, context.root)
    model, origin, histories = train_teacher(context.recipe, data, folder, curves=curves)
    if not distributed.is_main():
        return Outcome("")
    save_tensors(context.root / checkpoints.TEACHER, model.cpu().state_dict())
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    best = _best(histories["blocks"] or histories["head"], context.recipe.run.metric)
    return Outcome(
        f"{context.recipe.teacher.model} ({origin} weights): {_figures(best)} on validation",
        {"weights": origin, "warnings": warned, "histories": msgspec.to_builtins(histories)},
    )


def _warned(recipe: Recipe, labels: Sequence[str], fits: Sequence[Fit]) -> list[str]:
    """Say how the weights of teacher and student suit the pictures; returns what there is to fear for the teacher.

    What the recipe alone tells was said before the run.
    """
    for role, fit in zip(("teacher", "student"), fits, strict=True):
        say(f"  {role} {escape(fit.note)}")
    turned = label_warnings(recipe, labels)
    for line in dict.fromkeys([*(line for fit in fits for line in fit.warnings), *turned]):
        warn(line)
    return [*teacher_warnings(recipe), *fits[0].warnings, *turned]


def distill(context: Context) -> Outcome:
    """Cache views and the teacher's answers, then train the student with and without them, side by side."""
    import torch

    from eyas_host.models import checkpoints
    from eyas_host.models.weights import fit_to_pictures
    from eyas_host.train.checkpoint import save_tensors
    from eyas_host.train.feature_distillation import BlockCache, check_hints
    from eyas_host.train.student import train_student
    from eyas_host.train.trackers import Curves
    from eyas_host.train.view_cache import ViewCache

    recipe, folder = context.recipe, context.folder("distill")
    torch.set_num_threads(threads(recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    if recipe.student.ready:
        return _take_ready(context, data) if distributed.is_main() else Outcome("")
    warned = student_warnings(recipe, len(data.labels))
    for line in warned[len(student_warnings(recipe)) :]:
        warn(line)
    if distributed.is_main():
        with distributed.alone():
            teacher = checkpoints.load_teacher(context, len(data.labels))
            student = checkpoints.blank_student(context, len(data.labels))
            check_hints(recipe.student.hints, teacher, student, recipe.picture.size)
            cache = ViewCache.make(folder, recipe, data, teacher)
            if recipe.student.hints:
                BlockCache.make(cache, recipe, teacher)
    distributed.from_main("the cache is there")
    data.train.forget()
    beside = recipe.student.labels_only and distributed.is_main()
    with _beside(_labels_only, recipe, context.root) if beside else nullcontext() as other:
        curves = Curves(recipe, context.root)
        model, origin, history = train_student(recipe, data, ViewCache(folder), folder, curves=curves)
        if not distributed.is_main():
            return Outcome("")
        save_tensors(context.root / checkpoints.STUDENT, model.cpu().state_dict())
        histories = {"student": history} | ({"labels-only": other.result()} if other is not None else {})
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    return Outcome(
        f"{recipe.student.model} ({origin} weights): {_figures(_best(history, recipe.run.metric))} on validation",
        {
            "weights": origin,
            "warnings": [
                *warned,
                *fit_to_pictures(model.backbone, recipe.student.model, origin, recipe.picture).warnings,
            ],
            "histories": msgspec.to_builtins(histories),
        },
    )


def _take_ready(context: Context, split: Split) -> Outcome:
    """Take the student from its file instead of training one."""
    from eyas_host.data.transforms import prepared
    from eyas_host.evaluate.inference import logits_of, pick_device
    from eyas_host.models import checkpoints
    from eyas_host.models.factory import load_ready
    from eyas_host.train.checkpoint import save_tensors
    from eyas_host.train.engine import validation_figures

    settings = context.recipe.student
    model = load_ready(settings.model, len(split.labels), Path(settings.ready), activation=settings.activation)
    save_tensors(context.root / checkpoints.STUDENT, model.state_dict())
    pixels = prepared(split.validation.pixels, context.recipe.picture.preprocessing())
    figures = validation_figures(logits_of(model, pixels, pick_device("cpu")), split.validation.targets)
    return Outcome(f"{settings.model} as it came: {_figures(figures)} on validation", {"weights": "ready"})


@contextmanager
def _beside(work: Callable[..., _Result], *arguments: object) -> Iterator[Future[_Result]]:
    """Do `work` in a process of its own meanwhile; it is ended if what happens here fails.

    Raises `StageError` if that process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.submit(work, *arguments)
        except BrokenProcessPool:
            raise StageError(
                "the process beside this one was killed (too little memory?); run again to go on"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _labels_only(recipe: Recipe, root: Path) -> list[Epoch]:
    """Train the student without a teacher; runs in a process of its own and ends with its parent."""
    import torch

    from eyas_host.models import checkpoints
    from eyas_host.support.quiet import quiet_libraries
    from eyas_host.train.checkpoint import save_tensors
    from eyas_host.train.engine import end_with_parent
    from eyas_host.train.student import train_student
    from eyas_host.train.trackers import Curves
    from eyas_host.train.view_cache import ViewCache

    quiet_libraries()
    end_with_parent()
    distributed.leave()
    torch.set_num_threads(threads(recipe))
    folder = root / "distill"
    data = Split.load(root, recipe.picture.preprocessing())
    model, _, history = train_student(
        recipe, data, ViewCache(folder), folder, teacher=False, curves=Curves(recipe, root)
    )
    save_tensors(root / checkpoints.LABELS_ONLY, model.cpu().state_dict())
    return history


def prune(context: Context) -> Outcome:
    """Cut the student down and let it recover with the teacher's answers."""
    import torch

    from eyas_host.stages.prune import shrink

    torch.set_num_threads(threads(context.recipe))
    return shrink(context)


def _latency_source(recipe: Recipe) -> str:
    """What a latency is measured of: the table, else the runtime; nothing where none is asked for."""
    settings = recipe.prune
    if settings.method != "nncf" and (settings.method, settings.target) != ("channel", "latency"):
        return ""
    table = Path(settings.table)
    return sha256(table) if settings.table and table.is_file() else recipe.compile.runtimes[0]


def qat(context: Context) -> Outcome:
    """Put the student on the int8 grid, by training or by calibration."""
    import torch

    from eyas_host.stages.qat import quantize

    torch.set_num_threads(threads(context.recipe))
    return quantize(context)


def compile_artefacts(context: Context) -> Outcome:
    """Build fp32 and int8 for each runtime."""
    import torch

    from eyas_host.export.build import build_artefacts

    torch.set_num_threads(os.cpu_count() or 1)
    built = build_artefacts(context)
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in built.sizes.items())
    return Outcome(sizes, msgspec.to_builtins(built))


def verify(context: Context) -> Outcome:
    """Measure every rung on validation and decide what may be packed."""
    import torch

    from eyas_host.stages.verify import verify_all

    torch.set_num_threads(1)
    return verify_all(context)


def pack(context: Context) -> Outcome:
    """Write the bundle."""
    from eyas_host.bundle.pack import pack_bundle

    return pack_bundle(context)


def report(context: Context) -> Outcome:
    """Open the sealed test part once, and write the report."""
    import torch

    from eyas_host.report.write import write_report

    torch.set_num_threads(1)
    return write_report(context)


def _best(history: list[Epoch], metric: str) -> dict[str, float]:
    from eyas_host.train.schedule import best_epoch

    return history[best_epoch(history, metric)].metrics


def _figures(metrics: dict[str, float]) -> str:
    return f"balanced accuracy {metrics['balanced_accuracy']:.3f}, AUC {metrics['auc']:.3f}"


def _teacher_weights(recipe: Recipe) -> str:
    """The file that the teacher starts from."""
    return _sha256(_start(recipe.teacher, trained=True))


def _student_weights(recipe: Recipe) -> str:
    """The file that the student starts from, or is."""
    return _sha256(recipe.student.ready or _start(recipe.student, trained=False))


def _start(section: TeacherSection | StudentSection, *, trained: bool) -> str:
    """The file of first weights: the recipe's, or Eyas's own."""
    return section.weights_file or str(starts.chosen(section.model, section.weights, trained=trained) or "")


def _sha256(path: str) -> str:
    return sha256(Path(path)) if path and Path(path).is_file() else ""


_JUDGED = ("run.amp", "run.metric")
_LESSON = ("teacher", "student", "augment", "picture", *_JUDGED)

STAGES = (
    Stage("split", ("data",), (), split, _pictures_fingerprint),
    Stage(
        "teach",
        ("teacher", "augment", "picture", *_JUDGED, "student.ready"),
        ("split",),
        teach,
        _teacher_weights,
        together=True,
    ),
    Stage("distill", _LESSON, ("split", "teach"), distill, _student_weights, together=True),
    Stage("prune", (*_LESSON, "prune"), ("split", "distill"), prune, _latency_source),
    Stage("qat", (*_LESSON, "prune", "quantize", "gate.max_drop"), ("split", "distill", "prune"), qat),
    Stage("compile", ("compile", "student", "picture"), ("split", "prune", "qat"), compile_artefacts),
    Stage(
        "verify", ("gate", "picture", "pack", "cost"), ("split", "teach", "distill", "prune", "qat", "compile"), verify
    ),
    Stage("pack", ("run.name", "pack", "picture"), ("split", "compile", "verify"), pack, places=("bundle",)),
    Stage(
        "report",
        ("run",),
        ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack"),
        report,
        places=("report.json", "report.html"),
    ),
)
"""The chain, in order."""
