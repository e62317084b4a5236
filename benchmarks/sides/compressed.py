"""The folds of the compression benchmark: their figures on the held-out test sets, and those of other tools for the
same students.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from common import Figure
from eyas_device.bundle import RuntimeName
from eyas_device.predict import calibrated_probabilities
from eyas_host.compress.quantize.calibration import Calibration
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.bootstrap import Ints
from eyas_host.evaluation.metrics import paired_loss
from eyas_host.evaluation.turns import take_turns
from eyas_host.export.artefacts import artefact_files
from eyas_host.pipeline.runner import RunContext
from eyas_host.report.model import Report
from eyas_host.stages.report import TEST_LOGITS
from eyas_host.support.progress import meter, show
from sides.comparison import FOLD_BOUND_NOTE, Logits, compared_by_disagreements, fold_bound
from sides.peers import PEERS, Batch, Infer, open_litert, open_onnx, open_openvino

BACKENDS: dict[RuntimeName, Callable[..., Infer]] = {
    "litert": open_litert,
    "openvino": open_openvino,
    "onnx": open_onnx,
}


class Fold(msgspec.Struct, frozen=True):
    """A finished run with the predictions of each variant on its held-out test set."""

    context: RunContext
    report: Report
    logits: dict[str, Logits]
    targets: Ints

    def answers(self, variant: str) -> Ints:
        """The labels that a variant gave."""
        return np.asarray(self.logits[variant].argmax(axis=1))


def read_fold(context: RunContext) -> Fold:
    """A run whose report is written."""
    report = msgspec.json.decode((context.root / "report.json").read_bytes(), type=Report)
    split = Split.load(context.root)
    with np.load(context.root / TEST_LOGITS) as data:
        logits = {name: data[name] for name in data.files if name != "key"}
    targets = np.array([split.labels.index(p.label) for p in split.manifest.test], dtype=np.int64)
    return Fold(context, report, logits, targets)


def pooled(folds: Sequence[Fold], variant: str) -> Logits:
    """A variant's logits over all folds."""
    return np.concatenate([fold.logits[variant] for fold in folds])


def accuracy(folds: Sequence[Fold]) -> dict[str, Figure]:
    """What int8 and pruning cost, over the held-out test sets of all folds together."""
    targets = np.concatenate([fold.targets for fold in folds])
    note = f"{len(targets)} images, {len(folds)} folds"
    floor = _same(folds, "exact-int8", "qat")
    figures = {"exact_int8_agreement": Figure(value=floor, unit="", note=f"the noise floor; {note}")}
    for backend in BACKENDS:
        name = f"{backend}-int8"
        lost = paired_loss(pooled(folds, "pruned"), pooled(folds, name), targets)
        figures[f"{name}_drop"] = Figure(
            value=100 * lost.loss,
            unit="points",
            bound=0.5,
            better="lower",
            spread=_words(_losses(folds, "pruned", name)),
            note=f"balanced accuracy against the fp32 pruned student; {note}",
        )
        losses = _losses(folds, "pruned", name)
        figures[f"{name}_drop_bound"] = Figure(
            value=fold_bound(losses), unit="points", bound=1.5, better="lower", note=FOLD_BOUND_NOTE
        )
        figures[f"{name}_agreement"] = Figure(
            value=_same(folds, name, "qat"), unit="", bound=floor - 0.005, note="with the QAT model"
        )
        scaled = [
            np.abs(
                calibrated_probabilities(f.logits[name], f.report.confidence)
                - calibrated_probabilities(f.logits["qat"], f.report.confidence)
            )
            for f in folds
        ]
        figures[f"{name}_mean_dp"] = Figure(
            value=float(np.concatenate(scaled).mean()), unit="", bound=0.02, better="lower"
        )
    lost = paired_loss(pooled(folds, "student"), pooled(folds, "pruned"), targets)
    kept = [100 * f.report.pruning["latency"]["fraction"] for f in folds]
    figures["pruned_to_half_loss"] = Figure(
        value=100 * lost.loss,
        unit="points",
        bound=1.0,
        better="lower",
        spread=_words(_losses(folds, "student", "pruned")),
        note=f"balanced accuracy against the dense student; latency kept {_words(kept)} %",
    )
    for variant in ("teacher", "student", "pruned", "qat"):
        values = [next(r.balanced_accuracy for r in f.report.variants if r.name == variant) for f in folds]
        figures[f"{variant}_balanced_accuracy"] = Figure(
            value=float(np.mean(values)), unit="", spread=_words(values, 3)
        )
    return figures


def peers(folds: Sequence[Fold], work: Path, *, rounds: int) -> dict[str, Figure]:
    """Each backend's own tool on the same fp32 artefacts and calibration images, and a table of both sides."""
    sides = {f"{backend}-int8": [fold.logits[f"{backend}-int8"] for fold in folds] for backend in BACKENDS}
    found: dict[str, list[Logits]] = {name: [] for name in PEERS}
    with meter("other tools", len(folds) * len(PEERS)) as bar:
        for fold in folds:
            calibration, test = _pixels(fold)
            for name, (backend, quantize, suffix, open_model) in PEERS.items():
                fp32 = artefact_files(fold.context.folder("compile"), backend, "fp32")[0]
                path = work / fold.context.root.name / f"{name.replace(' ', '-')}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                quantize(fp32, path, calibration)
                infer = open_model(path, size=test.shape[1], classes=len(fold.report.labels))
                found[name].append(np.stack([infer(image).copy() for image in test]))
                bar.advance(name)
    return _table(folds, sides | found, work, rounds)


def _pixels(fold: Fold) -> tuple[Batch, Batch]:
    """Prepared images: those that calibrated the fold's model, and its held-out test set."""
    spec = fold.context.recipe.image.preprocessing()
    split = Split.load(fold.context.root, spec)
    listed = msgspec.json.decode((fold.context.folder("qat") / "calibration.json").read_bytes(), type=Calibration)
    rows = {image.sha256: row for row, image in enumerate(split.train.images)}
    calibration = prepared([split.train.pixels[rows[sha256]] for sha256 in listed.images], spec)
    return calibration, prepared(split.open_test("benchmarks/compression.py").pixels, spec)


def _table(folds: Sequence[Fold], sides: dict[str, list[Logits]], work: Path, rounds: int) -> dict[str, Figure]:
    targets = np.concatenate([fold.targets for fold in folds])
    pruned, qat = ([fold.logits[name] for fold in folds] for name in ("pruned", "qat"))
    times, sizes = _costs(folds[0], work, rounds)
    table = Table(title="int8 of the same pruned students", title_justify="left")
    table.add_column("made by")
    for title in ("drop, points", "95 % bound", "agrees with fp32", "with QAT", "p50 ms", "fp32 / int8", "kB"):
        table.add_column(title, justify="right")
    notes = {}
    for name, logits in sides.items():
        backend = PEERS[name][0] if name in PEERS else name.split("-")[0]
        together = np.concatenate(logits)
        drop = 100 * paired_loss(np.concatenate(pruned), together, targets).loss
        bound = fold_bound([100 * paired_loss(*one).loss for one in zip(pruned, logits, _targets(folds), strict=True)])
        limit = "" if bound is None else f"{bound:.2f}"
        milliseconds, size = float(np.median(times[name])), sizes[name] / 1e3
        notes[name] = f"drop {drop:.2f} points, bound {limit}; {milliseconds:.3f} ms, {size:.0f} kB"
        table.add_row(
            f"{backend}: {name}" if name in PEERS else f"{backend}: Eyas",
            f"{drop:.2f}",
            limit,
            f"{(together.argmax(1) == np.concatenate(pruned).argmax(1)).mean():.4f}",
            "" if name in PEERS else f"{(together.argmax(1) == np.concatenate(qat).argmax(1)).mean():.4f}",
            f"{milliseconds:.3f}",
            f"{np.median(times[f'{backend}-fp32']) / milliseconds:.2f}",
            f"{size:.0f}",
        )
    show(table)
    figures: dict[str, Figure] = {}
    for peer, (backend, *_) in PEERS.items():
        own = f"{backend}-int8"
        figures |= compared_by_disagreements(
            (own, sides[own], notes[own]), (peer, sides[peer], notes[peer]), fp32=pruned, qat=qat
        )
    return figures


def _costs(fold: Fold, work: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of one image at one thread, all in turns, and bytes, of one fold's models."""
    size, classes = fold.context.recipe.image.size, len(fold.report.labels)
    files = {
        f"{backend}-{precision}": (artefact_files(fold.context.folder("compile"), backend, precision), open_model)
        for backend, open_model in BACKENDS.items()
        for precision in ("fp32", "int8")
    }
    for name, (_, _, suffix, open_model) in PEERS.items():
        path = work / fold.context.root.name / f"{name.replace(' ', '-')}{suffix}"
        files[name] = ([path, path.with_suffix(".bin")] if suffix == ".xml" else [path], open_model)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    opened = {name: open_model(paths[0], size=size, classes=classes) for name, (paths, open_model) in files.items()}
    calls = {name: lambda infer=infer: infer(image) for name, infer in opened.items()}
    sizes = {name: sum(path.stat().st_size for path in paths) for name, (paths, _) in files.items()}
    return take_turns(calls, rounds), sizes


def _same(folds: Sequence[Fold], one: str, other: str) -> float:
    """Part of the images of all folds with the same answer."""
    return float(np.concatenate([fold.answers(one) == fold.answers(other) for fold in folds]).mean())


def _losses(folds: Sequence[Fold], before: str, after: str) -> list[float]:
    """Balanced accuracy that each fold lost, points."""
    return [100 * paired_loss(f.logits[before], f.logits[after], f.targets).loss for f in folds]


def _targets(folds: Sequence[Fold]) -> list[Ints]:
    return [fold.targets for fold in folds]


def _words(values: Sequence[float], places: int = 2) -> str:
    return ", ".join(f"{value:.{places}f}" for value in values)
