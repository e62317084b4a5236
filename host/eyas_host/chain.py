"""The nine stages of the main job: what each reads, does and leaves behind.

`split, teach, distill, prune, qat, compile, verify, pack, report`. All choices and gates read validation; the sealed
test part is read once, by `report`, after the bundle is packed. Frameworks are imported by the stage that needs them,
so that a mistake in the recipe or the pictures shows at once.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from eyas_device.camera.folder import SUFFIXES
from eyas_host.data.index import build_index
from eyas_host.data.split import Split, save_split, split_index
from eyas_host.errors import StageError
from eyas_host.progress import say
from eyas_host.recipe import Recipe
from eyas_host.stages import Context, Outcome, Stage

if TYPE_CHECKING:
    from eyas_host.train.loop import Epoch

_Result = TypeVar("_Result")

SINGLE_THREAD_SIZE = 160
"""Up to this side of the picture one torch thread trains faster than two (small tensors, measured)."""


def threads(recipe: Recipe) -> int:
    """Torch threads of a training process."""
    if recipe.run.threads:
        return recipe.run.threads
    return 1 if recipe.picture.size <= SINGLE_THREAD_SIZE else os.cpu_count() or 1


def split(context: Context) -> Outcome:
    """Index the pictures and divide them."""
    data = context.recipe.data
    index = build_index(data)
    for notice in index.notices:
        say(f"  [yellow]{notice}[/yellow]")
    for line in index.unreadable:
        say(f"  left out: {line}")
    manifest = split_index(index, data.split, context.recipe.run.seed, data.fold)
    save_split(manifest, context.root)
    sizes = {part: sum(manifest.counts[part].values()) for part in manifest.counts}
    words = ", ".join(f"{count} {part}" for part, count in sizes.items())
    return Outcome(
        f"{len(index.pictures)} pictures, {len(index.labels)} classes: {words}",
        {"counts": manifest.counts, "labels": list(index.labels), "left_out": len(index.unreadable)},
    )


def _pictures_fingerprint(recipe: Recipe) -> str:
    """Names, sizes and times of the pictures: cheap, and enough to notice a change."""
    if recipe.data.source != "folder":
        return recipe.data.source
    root = Path(recipe.data.path)
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        stat = path.stat()
        digest.update(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def teach(context: Context) -> Outcome:
    """Transfer-learn the teacher."""
    import torch

    from eyas_host import checkpoints
    from eyas_host.train.loop import save_tensors
    from eyas_host.train.models import check_networks
    from eyas_host.train.teacher import train_teacher

    torch.set_num_threads(threads(context.recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    check_networks(context.recipe, len(data.labels))
    folder = context.folder("teach")
    model, origin, histories = train_teacher(context.recipe, data, folder)
    save_tensors(context.root / checkpoints.TEACHER, model.cpu().state_dict())
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    best = _best(histories["blocks"] or histories["head"])
    return Outcome(
        f"{context.recipe.teacher.model} ({origin} weights): {_figures(best)} on validation",
        {"weights": origin, "histories": msgspec.to_builtins(histories)},
    )


def distill(context: Context) -> Outcome:
    """Cache views and the teacher's answers, then train the student with and without them, side by side."""
    import torch

    from eyas_host import checkpoints
    from eyas_host.train.cache import ViewCache
    from eyas_host.train.loop import save_tensors
    from eyas_host.train.student import train_student

    recipe, folder = context.recipe, context.folder("distill")
    torch.set_num_threads(threads(recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    cache = ViewCache.make(folder, recipe, data, checkpoints.load_teacher(context, len(data.labels)))
    data.train.forget()
    with _beside(_labels_only, recipe, context.root) if recipe.student.labels_only else nullcontext() as other:
        model, origin, history = train_student(recipe, data, cache, folder)
        save_tensors(context.root / checkpoints.STUDENT, model.cpu().state_dict())
        histories = {"student": history} | ({"labels-only": other.result()} if other is not None else {})
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    return Outcome(
        f"{recipe.student.model} ({origin} weights): {_figures(_best(history))} on validation",
        {"weights": origin, "histories": msgspec.to_builtins(histories)},
    )


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

    from eyas_host import checkpoints
    from eyas_host.quiet import quiet_libraries
    from eyas_host.train.cache import ViewCache
    from eyas_host.train.loop import end_with_parent, save_tensors
    from eyas_host.train.student import train_student

    quiet_libraries()
    end_with_parent()
    torch.set_num_threads(threads(recipe))
    folder = root / "distill"
    model, _, history = train_student(
        recipe, Split.load(root, recipe.picture.preprocessing()), ViewCache(folder), folder, teacher=False
    )
    save_tensors(root / checkpoints.LABELS_ONLY, model.cpu().state_dict())
    return history


def prune(context: Context) -> Outcome:
    """Cut the student down and let it recover with the teacher's answers."""
    import torch

    from eyas_host import checkpoints
    from eyas_host.compress.prune import PrunePlan, ZeroKeeper, prune_channels, prune_weights
    from eyas_host.files import write_bytes
    from eyas_host.train.cache import ViewCache
    from eyas_host.train.loop import save_tensors
    from eyas_host.train.models import move
    from eyas_host.train.student import Lesson

    recipe, settings = context.recipe, context.recipe.prune
    torch.set_num_threads(threads(recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    student = checkpoints.load_student(context, len(data.labels))
    model, plan, keeper = student, PrunePlan("none"), None
    if settings.method == "channel":
        model, plan = prune_channels(student, mac_ratio=settings.keep, size=recipe.picture.size)
    elif settings.method == "nncf":
        model, plan = prune_weights(student, sparsity=settings.sparsity, size=recipe.picture.size)
    lesson = Lesson(recipe, data, ViewCache(context.folder("distill")))
    history: list[Epoch] = []
    if settings.method != "none" and settings.epochs:
        model = move(model, lesson.device)
        keeper = ZeroKeeper(model) if settings.method == "nncf" else None
        checkpoint = context.folder("prune") / "recovery.ckpt"
        history = lesson.train(
            model,
            epochs=settings.epochs,
            rate=settings.rate,
            ema=0.0 if keeper else recipe.student.ema,
            checkpoint=checkpoint,
            title="pruned student",
            after_step=keeper,
        )
        checkpoint.unlink()
    write_bytes(context.root / checkpoints.PLAN, msgspec.json.encode(plan))
    save_tensors(context.root / checkpoints.PRUNED, model.cpu().state_dict())
    figures = lesson.evaluate(model.to(lesson.device))
    facts = {
        "method": plan.method,
        "macs_before": plan.macs_before,
        "macs_after": plan.macs_after,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "histories": {"pruned": msgspec.to_builtins(history)},
    }
    words = "not pruned"
    if plan.method == "channel":
        words = f"{plan.macs_after / plan.macs_before:.0%} of the multiply-accumulates"
    elif plan.method == "nncf":
        words = f"{plan.parameters_after / plan.parameters_before:.0%} of the weights are not zero"
    return Outcome(f"{words}: {_figures(figures)} on validation", facts)


def qat(context: Context) -> Outcome:
    """Fine-tune with the int8 grid in the graph."""
    import torch

    from eyas_host import checkpoints
    from eyas_host.compress.calibration import choose_pictures, record
    from eyas_host.compress.prune import ZeroKeeper
    from eyas_host.compress.qat import prepare_qat, save_qat
    from eyas_host.data.views import prepared
    from eyas_host.files import write_bytes
    from eyas_host.train.cache import ViewCache
    from eyas_host.train.loop import to_tensor
    from eyas_host.train.student import Lesson

    recipe, settings = context.recipe, context.recipe.quantize
    torch.set_num_threads(threads(recipe))
    data = Split.load(context.root, context.recipe.picture.preprocessing())
    deploy = checkpoints.load_deploy(context, len(data.labels))
    cache = ViewCache(context.folder("distill"))
    lesson = Lesson(recipe, data, cache)
    rows = choose_pictures(data.train, settings.calibration, recipe.run.seed)
    calibration = prepared([data.train.pixels[row] for row in rows], recipe.picture.preprocessing())
    data.train.forget()
    batches = [to_tensor(calibration[i : i + 1], torch.device("cpu")).float() for i in range(len(calibration))]
    model = prepare_qat(deploy, batches, input_size=recipe.picture.size).to(lesson.device)
    keeper = ZeroKeeper(model) if recipe.prune.method == "nncf" else None
    history: list[Epoch] = []
    if settings.epochs:
        checkpoint = context.folder("qat") / "qat.ckpt"
        history = lesson.train(
            model,
            epochs=settings.epochs,
            rate=settings.rate,
            weight_decay=0.0,
            checkpoint=checkpoint,
            title="int8 student",
            after_step=keeper,
        )
        checkpoint.unlink()
    model = model.cpu()
    save_qat(model, context.folder("qat"))
    calibration_file = msgspec.json.encode(record(data.train, rows, model))
    write_bytes(context.folder("qat") / "calibration.json", msgspec.json.format(calibration_file, indent=1))
    return Outcome(
        f"{_figures(lesson.evaluate(model.to(lesson.device)))} on validation",
        {"histories": {"qat": msgspec.to_builtins(history)}},
    )


def compile_artefacts(context: Context) -> Outcome:
    """Build fp32 and int8 for each runtime."""
    import torch

    from eyas_host.compile.build import build_artefacts

    torch.set_num_threads(os.cpu_count() or 1)
    built = build_artefacts(context)
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in built.sizes.items())
    return Outcome(sizes, msgspec.to_builtins(built))


def verify(context: Context) -> Outcome:
    """Measure every rung on validation and decide what may be packed."""
    import torch

    from eyas_host.verify import verify_all

    torch.set_num_threads(1)
    return verify_all(context)


def pack(context: Context) -> Outcome:
    """Write the bundle."""
    from eyas_host.compile.bundle import pack_bundle

    return pack_bundle(context)


def report(context: Context) -> Outcome:
    """Open the sealed test part once, and write the report."""
    import torch

    from eyas_host.report.write import write_report

    torch.set_num_threads(1)
    return write_report(context)


def _best(history: list[Epoch]) -> dict[str, float]:
    return max((epoch.metrics for epoch in history), key=lambda m: m["objective"])


def _figures(metrics: dict[str, float]) -> str:
    return f"balanced accuracy {metrics['balanced_accuracy']:.3f}, AUC {metrics['auc']:.3f}"


_LESSON = ("teacher", "student", "augment", "picture")

STAGES = (
    Stage("split", ("data",), (), split, _pictures_fingerprint),
    Stage("teach", ("teacher", "augment", "picture", "run"), ("split",), teach),
    Stage("distill", _LESSON, ("split", "teach"), distill),
    Stage("prune", (*_LESSON, "prune"), ("split", "distill"), prune),
    Stage("qat", (*_LESSON, "prune", "quantize"), ("split", "distill", "prune"), qat),
    Stage("compile", ("compile", "student", "picture"), ("split", "prune", "qat"), compile_artefacts),
    Stage("verify", ("gate", "picture", "pack"), ("split", "teach", "distill", "prune", "qat", "compile"), verify),
    Stage("pack", ("run", "pack", "picture"), ("split", "compile", "verify"), pack, places=("bundle",)),
    Stage(
        "report",
        ("run",),
        ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack"),
        report,
        places=("report.json", "report.html"),
    ),
)
"""The chain, in order."""
