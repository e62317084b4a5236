"""The gain from pretrained student weights: `python benchmarks/pretrained.py [--quick] [--json FILE] [--root FOLDER]`.

The same student is distilled twice from the same teacher, views and schedule, from random weights and from those that
ship with Eyas: on the demonstration, and on a thousand images of Fashion-MNIST (`apt-get install
dataset-fashion-mnist`, or unpacked below `--root`), each over three seeds (split, teacher and order follow from the
seed; scored on the seed's held-out test set). Beside it: the demonstration once more with each other network that has a
start, one seed, ten epochs; what a linear layer makes of either start's features, and what the starts' own training
reached.
Resumable: what is up to date is not run again. `--quick` takes one seed, each set's own student, 400 images and a few
epochs, in runs of its own (`runs/quick-pretrained-...`); what depends on that training has no bounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish, mean, shortened
from eyas_device.bundle import sha256
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.split import Split
from eyas_host.data.transforms import Batch, prepared
from eyas_host.evaluation.bootstrap import Floats
from eyas_host.evaluation.inference import logits_of, to_tensor
from eyas_host.evaluation.metrics import Scores, score, softmax
from eyas_host.models import checkpoints, pretrained
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.support.files import write_bytes
from eyas_host.support.machine import cpu_pressure
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import train_student
from eyas_host.train.view_cache import ViewCache
from sides.fashion import fashion_recipe

RUNS = Path("runs")
DEMONSTRATION = Path("models/solar-cells/recipe.toml")
CPU = torch.device("cpu")
Start = Literal["random", "pretrained"]
STARTS: tuple[Start, ...] = ("random", "pretrained")
QUICK = (
    "run.processes=1",
    "data.limit=400",
    "teacher.head_epochs=5",
    "teacher.epochs=1",
    "student.views=2",
    "student.epochs=3",
)
SHORTENED = "shortened training of 400 images"


class Task(NamedTuple):
    """A set of images with the recipe that learns from it."""

    name: str
    recipe: Path
    settings: tuple[str, ...] = ()
    """Beside the recipe's."""
    prefix: str = ""
    """Of its runs' names."""

    def run_name(self, seed: int) -> str:
        """Name of the run that holds a seed's split and teacher."""
        return f"{self.prefix}{self.name}" + (f"-seed{seed}" if seed else "")

    def run_settings(self, seed: int) -> tuple[str, ...]:
        """Settings of that run."""
        return (f"run.seed={seed}", f"run.name={self.run_name(seed)}", *self.settings)

    def context(self, seed: int, *more: str) -> RunContext:
        """That run."""
        recipe = load_recipe(self.recipe, (*self.run_settings(seed), *more))
        return RunContext(recipe, RUNS / self.run_name(seed))


class Student(msgspec.Struct, frozen=True):
    """One distilled student."""

    scores: Scores
    teacher: Scores
    history: list[Epoch]


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few images and epochs (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where Debian's packages are unpacked")
    arguments = parser.parse_args()
    before, seeds = cpu_pressure(), 1 if arguments.quick else 3
    torch.set_num_threads(1)
    quick = (QUICK, "quick-pretrained-") if arguments.quick else ()
    solar_cells = Task("solar-cells", DEMONSTRATION, *quick)
    figures = _set_figures(solar_cells, seeds)
    student = load_recipe(DEMONSTRATION).student.model
    for other in sorted(set(pretrained.networks()) - {student}) if not arguments.quick else ():
        figures |= _student_figures(solar_cells, 1, f"student.model={other}", "student.epochs=10")
    recipe = fashion_recipe(arguments.root, RUNS / "benchmark" / "fashion")
    if recipe is not None:
        figures |= _set_figures(Task("fashion", recipe, *quick), seeds)
    else:
        figures["fashion"] = Figure(value=None, unit="", note="apt-get install dataset-fashion-mnist")
    figures = _record_figures() | (shortened(figures, SHORTENED) if arguments.quick else figures)
    finish(figures, before, arguments.json)


def _record_figures() -> dict[str, Figure]:
    """What the training of each start reached on crops of images that were held out."""
    figures = {}
    for name in pretrained.networks():
        record = msgspec.json.decode(pretrained.record_file(name).read_bytes())
        result, settings = record["result"], record["settings"]
        figures[f"{name}_agreement"] = Figure(
            value=result["agreement"],
            unit="",
            note=f"same of 1,000 classes as {', '.join(settings['teachers'])} on {result['held_out']} held-out crops",
        )
        figures[f"{name}_crops"] = Figure(
            value=result["crops"] / 1e6,
            unit="million",
            note=f"{result['seconds'] / 3600:.2f} hours on {record['machine']}",
        )
    return figures


def _set_figures(task: Task, seeds: int) -> dict[str, Figure]:
    """Both starts of the recipe's own student on one set of images, and what a linear layer makes of them."""
    figures = _student_figures(task, seeds)
    probes = _probes(task.context(0))
    return figures | {f"{task.name}_probe_{key}": value for key, value in probes.items()}


def _student_figures(task: Task, seeds: int, *other: str) -> dict[str, Figure]:
    """Both starts of one student on one set of images; `other` are settings of another student than the recipe's."""
    students = {start: [_distill(task, seed, start, *other) for seed in range(seeds)] for start in STARTS}
    own = not other
    key = task.name if own else f"{task.name}_{load_recipe(task.recipe, other).student.model}"
    figures = {}
    for start, some in students.items():
        figures[f"{key}_{start}_balanced_accuracy"] = mean([one.scores.balanced_accuracy for one in some])
        figures[f"{key}_{start}_auc"] = mean([one.scores.auc for one in some])
        kept = [one.scores.balanced_accuracy / one.teacher.balanced_accuracy for one in some]
        figures[f"{key}_{start}_share_of_teacher"] = mean(kept, bound=0.97 if own and start == "pretrained" else None)
    figures[f"{key}_teacher_balanced_accuracy"] = mean([s.teacher.balanced_accuracy for s in students["random"]])
    parts = [
        _epochs_to_reach(warm.history, random.history)
        for random, warm in zip(students["random"], students["pretrained"], strict=True)
    ]
    figures[f"{key}_epochs_to_random's_score"] = mean(
        parts, bound=1 / 3 if own else None, better="lower", note="part of the random start's epochs; validation"
    )
    return figures


def _distill(task: Task, seed: int, start: Start, *other: str) -> Student:
    """Train a student behind the teacher and the views that all students of a seed share."""
    command = [str(Path(sys.executable).with_name("eyas")), "teach", str(task.recipe)]
    for setting in task.run_settings(seed):
        command += ["--set", setting]
    subprocess.run(command, check=True)
    context = task.context(seed, *other, f"student.weights={start}", "student.labels_only=false")
    recipe = context.recipe
    network = recipe.student.model
    split = Split.load(context.root, recipe.image.preprocessing())
    teacher = checkpoints.load_teacher(context, len(split.labels))
    digest = sha256(context.root / checkpoints.TEACHER)[:12]
    views = RUNS / "benchmark" / "pretrained" / f"{task.run_name(seed)}-{digest}"
    file = pretrained.weights_file(network) if start == "pretrained" else None
    weights = start if file is None else f"{start}-{sha256(file)[:12]}"
    folder = views / f"{network}-{recipe.student.epochs}-epochs-{weights}"
    if not (folder / "history.json").exists():
        model, origin, history = train_student(recipe, split, ViewCache.make(views, recipe, split, teacher), folder)
        if origin != start:
            raise SystemExit(f"{network}: no {start} start, it had {origin} weights")
        save_tensors(folder / "student.pt", model.state_dict())
        write_bytes(folder / "history.json", msgspec.json.encode(history))
    student = checkpoints.blank_student(context, len(split.labels))
    student.load_state_dict(checkpoints.load_state(folder / "student.pt"))
    test = split.open_test("benchmarks/pretrained.py", early=True)
    return Student(
        scores=_score(context, student.eval(), test),
        teacher=_score(context, teacher, test),
        history=msgspec.json.decode((folder / "history.json").read_bytes(), type=list[Epoch]),
    )


def _score(context: RunContext, model: PixelClassifier, part: ImageDataset) -> Scores:
    pixels = prepared(part.pixels, context.recipe.image.preprocessing())
    return score(softmax(logits_of(model, pixels, CPU)), part.targets, units=part.units)


def _epochs_to_reach(history: Sequence[Epoch], other: Sequence[Epoch]) -> float:
    """Epochs until one training has the other's best balanced accuracy on validation, as a part of the other's."""
    wanted = max(epoch.metrics["balanced_accuracy"] for epoch in other)
    reached = (n for n, epoch in enumerate(history, 1) if epoch.metrics["balanced_accuracy"] >= wanted)
    return next(reached, len(history) + 1) / len(other)


def _probes(context: RunContext) -> dict[str, Figure]:
    """Balanced accuracy of a linear layer on the pooled features of networks that never saw these images."""
    split, recipe = Split.load(context.root), context.recipe
    classes = len(split.labels)
    test = split.open_test("benchmarks/pretrained.py", early=True)
    spec = recipe.image.preprocessing()
    train, unseen = (prepared(part.pixels, spec) for part in (split.train, test))

    def balanced(model: str, weights: Literal["random", "pretrained", "packaged"], seed: int = 0) -> float:
        torch.manual_seed(seed)
        network = build(model, classes, weights)[0].eval()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced"))
        probe.fit(_pooled(network, train), split.train.targets)
        return float(balanced_accuracy_score(test.targets, probe.predict(_pooled(network, unseen))))

    note = f"logistic regression on {len(train):,} images, seed 0's held-out test set"
    student, teacher = recipe.student.model, recipe.teacher.model
    return {
        "random": mean([balanced(student, "random", seed) for seed in range(3)], note=f"{note}; three networks"),
        "pretrained": mean([balanced(student, "pretrained")], note=note),
        "teacher's_weights": mean([balanced(teacher, "packaged")], note=note),
    }


@torch.inference_mode()
def _pooled(model: PixelClassifier, pixels: Batch) -> Floats:
    batches = (pixels[first : first + 64] for first in range(0, len(pixels), 64))
    return np.concatenate([model.pooled(to_tensor(batch, CPU)).double().numpy() for batch in batches])


if __name__ == "__main__":
    main()
