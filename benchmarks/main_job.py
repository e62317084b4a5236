"""The main job, timed and scored: `python benchmarks/main_job.py [--quick] [--json FILE]`.

Runs the demonstration recipe (whole for the first seed, as far as the student for the others; what is up to date is not
run again), then measures: the second run with nothing changed, accuracy over the seeds on each seed's held-out test
set, int8 against fp32 on each backend, sizes, and speeds of both sides taking turns. `--quick` takes one seed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import timm
import torch

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish, mean, ratio
from compiled import network
from eyas_device.bundle import Bundle
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import Runtime, open_runtime
from eyas_device.runtimes.litert import LiteRT
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.data.units import unit_ids
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.latency import take_turns
from eyas_host.evaluation.metrics import Scores, paired_loss, score, softmax
from eyas_host.models import checkpoints
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.report.model import Report
from eyas_host.stages.report import TEST_LOGITS
from eyas_host.support.machine import cpu_pressure

RECIPE = Path("models/solar-cells/recipe.toml")
RUNS = Path("runs")
BACKENDS = ("litert", "openvino", "onnx")
NETWORKS = ("teacher", "student", "student-labels-only")


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and only what a finished run tells (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    arguments = parser.parse_args()
    before = cpu_pressure()
    seeds = 1 if arguments.quick else arguments.seeds
    figures: dict[str, Figure] = {}
    contexts = [_context(seed) for seed in range(seeds)]
    for seed in range(seeds):
        _distill(seed, whole=seed == 0)
    figures |= _run_figures(contexts[0])
    figures |= _accuracy_figures([_scores(context) for context in contexts])
    figures |= _int8_figures(contexts[0])
    figures |= _speed_figures(contexts[0], rounds=10 if arguments.quick else 40)
    finish(figures, before, arguments.json)


def _name(seed: int) -> str:
    return "solar-cells" if seed == 0 else f"solar-cells-seed{seed}"


def _settings(seed: int) -> list[str]:
    return [] if seed == 0 else [f"run.seed={seed}", f"run.name={_name(seed)}"]


def _context(seed: int) -> RunContext:
    return RunContext(load_recipe(RECIPE, _settings(seed)), RUNS / _name(seed))


def _distill(seed: int, *, whole: bool) -> float:
    """Run the chain through the command line; returns seconds."""
    verbs = (["distill"],) if whole else (["teach"], ["distill", "--only", "distill"])
    started = time.monotonic()
    for verb in verbs:
        if verb[-1] == "distill" and not whole and (_context(seed).root / checkpoints.STUDENT).exists():
            continue
        command = [str(Path(sys.executable).with_name("eyas")), verb[0], str(RECIPE), *verb[1:]]
        for setting in _settings(seed):
            command += ["--set", setting]
        subprocess.run(command, check=True)
    return time.monotonic() - started


def _run_figures(context: RunContext) -> dict[str, Figure]:
    """Time of the finished run and of a second one, memory, agreement of the artefacts."""
    report = msgspec.json.decode((context.root / "report.json").read_bytes(), type=Report)
    stages = sum(stage.seconds for stage in report.stages)
    return {
        "stages_minutes": Figure(
            value=stages / 60,
            unit="min",
            bound=30,
            better="lower",
            note="all stages; install and start-up not included",
        ),
        "second_run_seconds": Figure(
            value=_distill(0, whole=True),
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
            note="largest process plus its largest child",
        ),
    }


def _scores(context: RunContext) -> dict[str, Scores]:
    """Teacher and both students on this seed's held-out test set part (the access is logged)."""
    split = Split.load(context.root)
    part = split.open_test("benchmarks/main_job.py", early=True)
    pixels = prepared(part.pixels, context.recipe.image.preprocessing())
    classes = len(split.labels)
    networks = {
        "teacher": checkpoints.load_teacher(context, classes),
        "student": checkpoints.load_student(context, classes),
        "student-labels-only": checkpoints.load_student(context, classes, checkpoints.LABELS_ONLY),
    }
    torch.set_num_threads(1)
    return {
        name: score(softmax(logits_of(net, pixels, torch.device("cpu"))), part.targets, units=part.units)
        for name, net in networks.items()
    }


def _accuracy_figures(scores: list[dict[str, Scores]]) -> dict[str, Figure]:
    balanced = {name: [s[name].balanced_accuracy for s in scores] for name in NETWORKS}
    areas = {name: [s[name].auc for s in scores] for name in NETWORKS}
    kept = [own / best for own, best in zip(balanced["student"], balanced["teacher"], strict=True)]
    return {
        "teacher_balanced_accuracy": mean(balanced["teacher"], bound=0.80),
        "teacher_auc": mean(areas["teacher"]),
        "student_balanced_accuracy": mean(balanced["student"]),
        "student_auc": mean(areas["student"], bound=float(np.mean(areas["student-labels-only"])), note="> labels only"),
        "labels_only_balanced_accuracy": mean(balanced["student-labels-only"]),
        "labels_only_auc": mean(areas["student-labels-only"]),
        "student_share_of_teacher": mean(kept, bound=0.92, note="balanced accuracy, mean over the seeds"),
        "least_share_of_teacher": Figure(value=min(kept), unit="", bound=0.88, note="the worst seed"),
    }


def _int8_figures(context: RunContext) -> dict[str, Figure]:
    """What int8 costs on each backend, on validation and test together, and how it agrees with the QAT model."""
    split = Split.load(context.root)
    with (
        np.load(context.root / TEST_LOGITS) as test,
        np.load(context.folder("verify") / "logits.npz") as validation,
    ):
        p = {name: softmax(np.concatenate([validation[name], test[name]])) for name in validation.files}
    images = split.manifest.validation + split.manifest.test
    units = unit_ids(images, split.manifest.clusters, grouped=split.manifest.by == "group")
    targets = np.array([split.labels.index(image.label) for image in images], dtype=np.int64)
    answers = {name: values.argmax(1) for name, values in p.items()}
    floor = float((answers["exact-int8"] == answers["qat"]).mean())
    sizes = msgspec.json.decode((context.folder("verify") / "verdict.json").read_bytes())["sizes"]
    figures = {
        "exact_int8_agreement": Figure(value=floor, unit="", note=f"{len(targets)} images, integer arithmetic in torch")
    }
    for backend in BACKENDS:
        name = f"{backend}-int8"
        lost = paired_loss(p["pruned"], p[name], targets, units=units)
        figures[f"{name}_loss_bound"] = Figure(
            value=100 * lost.bound,
            unit="points",
            bound=3,
            better="lower",
            spread=f"loss {100 * lost.loss:.2f}",
            note="balanced accuracy against fp32, 95 % paired bootstrap over images, for this training alone",
        )
        figures[f"{name}_agreement"] = Figure(
            value=float((answers[name] == answers["qat"]).mean()),
            unit="",
            bound=floor - 0.01,
            note="with the QAT model",
        )
        figures[f"{name}_mean_dp"] = Figure(
            value=float(np.abs(p[name] - p["qat"]).mean()), unit="", bound=0.02, better="lower"
        )
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
            times[f"{backend}-fp32"], times[f"{backend}-int8"], note="shipped model, int8 against fp32"
        )
    return figures | _large_figures(work, rounds)


def _large_figures(work: Path, rounds: int) -> dict[str, Figure]:
    """Unpruned MobileNetV3-large at 224 px in LiteRT, int8 against fp32."""
    size = 224
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    paths = {p: network("mobilenetv3_large_100", p, work, size=size) for p in ("fp32", "int8")}
    models = {name: LiteRT(path, size=size, classes=2, threads=1) for name, path in paths.items()}
    times = take_turns({name: _infer(model, pixels) for name, model in models.items()}, rounds)
    return {"v3_large_224_int8_speedup": ratio(times["fp32"], times["int8"], bound=1.4, note="LiteRT, not pruned")}


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
