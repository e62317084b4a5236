"""The main job, timed and scored: `python benchmarks/main_job.py [--quick] [--json FILE]`.

Runs the demonstration recipe for each seed (what is up to date is not run again), then measures: the second run with
nothing changed, accuracy over the seeds on each seed's held-out test set, int8 against fp32 on each backend, sizes, and
speeds of both sides taking turns. `--finished` takes runs as they are; the times of its stages are those of seed 0.
`--patient` also runs the patient way for each seed, in turns with the recipe: one process, all blocks of the teacher,
more views and epochs, full size throughout, no early end. Both predict the same images, so that differences are those
of pairs. With `--finished` the seeds are compared that have both, without their times.

`--quick` runs the same stages once on 300 images, an epoch or two, in a run of its own (`runs/quick-solar-cells`), and
times fewer rounds: its accuracy and stage times are those of that training and have no bounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import timm
import torch

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish, mean, ratio, shortened
from compiled import network
from eyas_device.bundle import Bundle, Precision, RuntimeName
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import Runtime, open_runtime
from eyas_device.runtimes.litert import LiteRT
from eyas_device.runtimes.onnx import OnnxRuntime
from eyas_host.data.split import Split
from eyas_host.data.units import unit_ids
from eyas_host.evaluation.metrics import Scores, paired_loss, score, softmax
from eyas_host.evaluation.turns import take_turns
from eyas_host.evaluation.verdict import load_verdict
from eyas_host.pipeline.runner import BUNDLE_STAGES, RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.report.model import Report
from eyas_host.stages.chain import STAGES
from eyas_host.stages.report import TEST_LOGITS
from eyas_host.support.machine import cpu_pressure

RECIPE = Path("models/solar-cells/recipe.toml")
RUNS = Path("runs")
BACKENDS = ("litert", "openvino", "onnx")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
NETWORKS = ("teacher", "student", "student-labels-only", "pruned")
PATIENT = (
    "run.processes=1",
    "teacher.unfreeze=all",
    "teacher.progressive=0",
    "student.progressive=0",
    "student.views=12",
    "student.epochs=30",
    "prune.epochs=20",
    "prune.patience=20",
    "quantize.epochs=4",
    "quantize.patience=4",
)
QUICK = (
    "run.processes=1",
    "data.limit=300",
    "teacher.head_epochs=5",
    "teacher.epochs=1",
    "student.views=2",
    "student.epochs=2",
    "prune.epochs=1",
    "quantize.epochs=1",
    "gate.min_agreement=0",
    "gate.max_dp=1",
    "gate.max_drop=1",
)
"""Every stage, briefly; with open gates the fastest artefact ships, whatever so short a training makes of int8."""
SHORTENED = "shortened training of 300 images"
Way = Literal["recipe", "patient", "quick"]
WAYS: dict[Way, tuple[str, ...]] = {"recipe": (), "patient": PATIENT, "quick": QUICK}
"""How the demonstration is trained -> settings beside the recipe's."""


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run of its own, fewer rounds (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument(
        "--finished", action="store_true", help="measure finished runs, also of other code; run nothing"
    )
    parser.add_argument("--patient", action="store_true", help="beside the patient way (hours)")
    arguments = parser.parse_args()
    if arguments.quick and arguments.patient:
        parser.error("--quick has no patient way")
    before = cpu_pressure()
    way: Way = "quick" if arguments.quick else "recipe"
    seeds = 1 if arguments.quick else arguments.seeds
    contexts = [_context(seed, way) for seed in range(seeds)]
    if not arguments.finished:
        for seed in range(seeds):
            _distill(seed, way)
            if arguments.patient:
                _distill(seed, "patient")
    figures = _run_figures(contexts[0], None if arguments.finished else way)
    figures |= _accuracy_figures(contexts)
    if arguments.patient:
        patient = [_context(seed, "patient") for seed in range(seeds)]
        both = [pair for pair in zip(contexts, patient, strict=True) if (pair[1].root / "report.json").exists()]
        figures |= _patient_figures(both, timed=not arguments.finished)
    figures |= _int8_figures(contexts)
    if arguments.quick:
        figures = shortened(figures, SHORTENED)
    figures |= _speed_figures(contexts[0], rounds=10 if arguments.quick else 40)
    finish(figures, before, arguments.json)


def _name(seed: int, way: Way) -> str:
    name = "solar-cells" if seed == 0 else f"solar-cells-seed{seed}"
    return {"recipe": name, "patient": f"{name}-patient", "quick": f"quick-{name}"}[way]


def _settings(seed: int, way: Way) -> list[str]:
    own = [] if seed == 0 and way == "recipe" else [f"run.seed={seed}", f"run.name={_name(seed, way)}"]
    return [*own, *WAYS[way]]


def _context(seed: int, way: Way) -> RunContext:
    return RunContext(load_recipe(RECIPE, _settings(seed, way)), RUNS / _name(seed, way))


def _distill(seed: int, way: Way) -> float:
    """Run the chain through the command line; returns seconds."""
    started = time.monotonic()
    command = [str(Path(sys.executable).with_name("eyas")), "distill", str(RECIPE)]
    for setting in _settings(seed, way):
        command += ["--set", setting]
    subprocess.run(command, check=True)
    return time.monotonic() - started


def _run_figures(context: RunContext, again: Way | None) -> dict[str, Figure]:
    """Time of the finished run and, with `again`, of a second one in that way; memory."""
    report = msgspec.json.decode((context.root / "report.json").read_bytes(), type=Report)
    stages = sum(stage.seconds for stage in report.stages)
    return {
        "stages_minutes": Figure(
            value=stages / 60,
            unit="min",
            bound=11,
            better="lower",
            spread=_stage_times(report),
            note="all stages; install and start-up not included",
        ),
        "plan_error": _plan_error(context),
        "bundle_minutes": Figure(
            value=sum(stage.seconds for stage in report.stages if stage.name in BUNDLE_STAGES) / 60,
            unit="min",
            bound=8,
            better="lower",
            note="until there is a bundle that answers",
        ),
        "second_run_seconds": Figure(
            value=_distill(0, again) if again else None,
            unit="s",
            bound=15,
            better="lower",
            note="nothing changed; runs the bundle too",
        ),
        "peak_rss_gb": Figure(
            value=max(stage.peak_rss_mb for stage in report.stages) / 1000,
            unit="GB",
            bound=5,
            better="lower",
            note="all processes of a stage together",
        ),
    }


def _plan_error(context: RunContext) -> Figure:
    """How far the plan before the run was from what it took."""
    records = [record for stage in STAGES if (record := context.record(stage.name)) is not None]
    estimated, took = (sum(getattr(record, name) for record in records) for name in ("estimated_s", "seconds"))
    return Figure(
        value=abs(estimated / took - 1) if took else None,
        unit="",
        bound=0.25,
        better="lower",
        note=f"the plan said {estimated / 60:.1f} min for all stages",
    )


def _stage_times(report: Report) -> str:
    return ", ".join(f"{stage.name} {stage.seconds:.0f} s" for stage in report.stages)


def _patient_figures(both: list[tuple[RunContext, RunContext]], *, timed: bool) -> dict[str, Figure]:
    """The recipe beside the patient way: balanced accuracy on the same images, and times if they are `timed`."""
    if not both:
        return {}
    figures = _patient_times(both) if timed else {}
    for name in ("teacher", "student", "litert-int8"):
        losses = []
        for one, other in both:
            own, theirs = _images(one, validation=True), _images(other, validation=True)
            losses.append(paired_loss(theirs.logits[name], own.logits[name], own.targets, units=own.units).loss)
        figures[f"{name}: balanced accuracy that the patient way has more"] = mean(
            [100 * loss for loss in losses], unit="points", better="lower", note="validation and test, pairs"
        )
    return figures


def _patient_times(both: list[tuple[RunContext, RunContext]]) -> dict[str, Figure]:
    reports = [
        [msgspec.json.decode((one.root / "report.json").read_bytes(), type=Report) for one in side]
        for side in zip(*both, strict=True)
    ]
    minutes = [[sum(stage.seconds for stage in report.stages) / 60 for report in side] for side in reports]
    return {
        "patient: all stages": mean(minutes[1], unit="min", note=_stage_times(reports[1][0])),
        "time, recipe / patient": mean([one / other for one, other in zip(*minutes, strict=True)], unit="x"),
    }


class _Images(NamedTuple):
    """Images of a finished run with the logits that its stages stored."""

    logits: dict[str, npt.NDArray[np.float32]]
    """Variant -> float32 [n, classes]."""
    targets: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]


def _images(context: RunContext, *, validation: bool = False) -> _Images:
    """The test set of a finished run, with `validation` after it: no image is predicted again."""
    manifest = Split.load(context.root).manifest
    paths = [context.root / TEST_LOGITS] + [context.folder("verify") / "logits.npz"] * validation
    stored = [np.load(path) for path in paths]
    names = [name for name in stored[0].files if name != "key"]
    images = manifest.test + manifest.validation * validation
    return _Images(
        {name: np.concatenate([data[name] for data in stored]) for name in names},
        np.array([manifest.labels.index(image.label) for image in images], dtype=np.int64),
        unit_ids(images, manifest.clusters, grouped=manifest.by == "group"),
    )


def _scores(context: RunContext) -> dict[str, Scores]:
    """Variant -> metrics on this seed's held-out test set."""
    images = _images(context)
    return {name: score(softmax(logits), images.targets, units=images.units) for name, logits in images.logits.items()}


def _accuracy_figures(contexts: list[RunContext]) -> dict[str, Figure]:
    """Balanced accuracy and AUC of each network over the seeds, and what is left of the teacher's."""
    scores = [_scores(context) for context in contexts]
    own = [bundle_used(context) for context in contexts]
    balanced = {name: [s[name].balanced_accuracy for s in scores if name in s] for name in NETWORKS}
    areas = {name: [s[name].auc for s in scores if name in s] for name in NETWORKS}
    balanced["shipped"] = [s[name].balanced_accuracy for s, name in zip(scores, own, strict=True)]
    areas["shipped"] = [s[name].auc for s, name in zip(scores, own, strict=True)]
    bounds = {"teacher": 0.80}
    figures: dict[str, Figure] = {}
    for name, values in balanced.items():
        if values:
            key, note = name.replace("-", "_"), f"{len(values)} seeds"
            figures[f"{key}_balanced_accuracy"] = mean(values, bound=bounds.get(name), note=note)
            figures[f"{key}_auc"] = mean(areas[name], note=note)
    for name in ("student", "shipped"):
        kept = [value / best for value, best in zip(balanced[name], balanced["teacher"], strict=True)]
        figures[f"{name}_share_of_teacher"] = mean(kept, bound=0.96, note="balanced accuracy, mean over the seeds")
    return figures


def _int8_figures(contexts: list[RunContext]) -> dict[str, Figure]:
    """What int8 costs on each backend, on validation and test together, and how it agrees with the QAT model."""
    seeds = [_images(context, validation=True) for context in contexts]
    answers = [{name: logits.argmax(1) for name, logits in images.logits.items()} for images in seeds]
    floor = float(np.mean([(own["exact-int8"] == own["qat"]).mean() for own in answers]))
    figures = {"exact_int8_agreement": Figure(value=floor, unit="", note="integer arithmetic in torch, with QAT")}
    for backend in BACKENDS:
        name = f"{backend}-int8"
        losses = [
            100 * paired_loss(images.logits["pruned"], images.logits[name], images.targets, units=images.units).loss
            for images in seeds
        ]
        packed = [name in {a.name for a in Bundle.open(c.root / "bundle").manifest.artefacts} for c in contexts]
        figures[f"{name}_loss"] = Figure(
            value=float(np.mean(losses)),
            unit="points",
            bound=0.5,
            better="lower",
            spread=", ".join(f"{loss:.2f}" for loss in losses),
            note="balanced accuracy against fp32, validation and test, mean over the seeds",
        )
        figures[f"{name}_packed"] = Figure(value=float(np.mean(packed)), unit="of the seeds", bound=1.0)
        figures[f"{name}_agreement"] = Figure(
            value=float(np.mean([(own[name] == own["qat"]).mean() for own in answers])),
            unit="",
            bound=floor - 0.01,
            note="with the QAT model",
        )
    sizes = load_verdict(contexts[0]).sizes
    figures["litert_int8_size_mb"] = Figure(
        value=sizes["litert-int8"] / 1e6,
        unit="MB",
        bound=sizes["litert-fp32"] / 4e6 + 0.4,
        better="lower",
        note=f"fp32 / 4 + 0.4 MB; fp32 is {sizes['litert-fp32'] / 1e6:.2f} MB",
    )
    return figures


def _speed_figures(context: RunContext, *, rounds: int) -> dict[str, Figure]:
    """Speeds at one thread, both sides of each ratio taking turns."""
    torch.set_num_threads(1)
    size = context.recipe.image.size
    bundle = Bundle.open(context.folder("verify") / "candidate")
    work = RUNS / "benchmark"
    resnet = timm.create_model("resnet50", num_classes=2).eval()
    resnet_litert = network("resnet50", "fp32", work, size=size)
    calls: dict[str, Callable[[], object]] = {}
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for artefact in bundle.manifest.artefacts:
        runtime = open_runtime(bundle, artefact.runtime, artefact.name, threads=1)
        calls[artefact.name] = _infer(runtime, pixels)
    calls["resnet50-torch"] = lambda: _eager(resnet, tensor)
    fair = LiteRT(resnet_litert, size=size, classes=2, threads=1)
    calls["resnet50-litert"] = _infer(fair, pixels)
    times = take_turns(calls, rounds)
    shipped = bundle_used(context)
    resnet_bytes = sum(t.numel() * t.element_size() for t in resnet.state_dict().values())
    shipped_bytes = sum(f.size_bytes for a in bundle.manifest.artefacts if a.name == shipped for f in a.files)
    figures = {
        "faster_than_resnet50_torch": ratio(
            times["resnet50-torch"], times[shipped], bound=40, note=f"{shipped}, {size} px"
        ),
        "smaller_than_resnet50": Figure(value=resnet_bytes / shipped_bytes, unit="x", bound=40, note=f"{shipped}"),
        "faster_than_resnet50_litert": ratio(times["resnet50-litert"], times[shipped], note="the fair opponent"),
    }
    for backend in BACKENDS:
        figures[f"{backend}_int8_speedup"] = ratio(
            times[f"{backend}-fp32"],
            times[f"{backend}-int8"],
            bound=1.0 if backend == "onnx" else None,
            note="shipped model, int8 against fp32",
        )
    return figures | _large_figures(work, rounds)


def _large_figures(work: Path, rounds: int) -> dict[str, Figure]:
    """Unpruned MobileNetV3-large at 224 px in LiteRT and in ONNX Runtime, int8 against fp32."""
    size = 224
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    figures = {}
    backends: tuple[tuple[str, RuntimeName, Callable[..., Runtime], float, str], ...] = (
        ("v3_large_224_int8_speedup", "litert", LiteRT, 1.4, "LiteRT, not pruned"),
        ("v3_large_224_onnx_int8_speedup", "onnx", OnnxRuntime, 1.2, "ONNX Runtime, not pruned"),
    )
    for name, runtime, open_model, bound, note in backends:
        models = {
            precision: open_model(
                network("mobilenetv3_large_100", precision, work, size=size, runtime=runtime),
                size=size,
                classes=2,
                threads=1,
            )
            for precision in PRECISIONS
        }
        times = take_turns({precision: _infer(model, pixels) for precision, model in models.items()}, rounds)
        figures[name] = ratio(times["fp32"], times["int8"], bound=bound, note=note)
    return figures


def bundle_used(context: RunContext) -> str:
    """What the first runtime of the packed bundle runs."""
    return next(iter(Bundle.open(context.root / "bundle").manifest.use.values()))


def _infer(runtime: Runtime, pixels: Pixels) -> Callable[[], object]:
    return lambda: runtime.infer(pixels)


@torch.inference_mode()
def _eager(model: Any, tensor: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = model(tensor)
    return answer


if __name__ == "__main__":
    main()
