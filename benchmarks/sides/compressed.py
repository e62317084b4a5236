"""The folds of the compression benchmark: their figures on the held-out test sets, and those of other tools for the
same students.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from rich.table import Table

from common import Figure
from eyas_device.predict import calibrated_probabilities
from eyas_host.compress.quantize.calibration import Calibration
from eyas_host.data.split import Split
from eyas_host.data.transforms import prepared
from eyas_host.evaluation.bootstrap import Ints
from eyas_host.evaluation.latency import take_turns
from eyas_host.evaluation.metrics import paired_loss
from eyas_host.evaluation.predictions import units_of
from eyas_host.export.build import artefact_files
from eyas_host.pipeline.runner import RunContext
from eyas_host.report.model import Report
from eyas_host.stages.report import TEST_LOGITS
from eyas_host.support.progress import meter, show
from sides.peers import PEERS, Batch, open_litert, open_onnx, open_openvino

BACKENDS = {"litert": open_litert, "openvino": open_openvino, "onnx": open_onnx}
Logits = npt.NDArray[np.float32]


class Fold(msgspec.Struct, frozen=True):
    """A finished run with the predictions of each variant on its held-out test set."""

    context: RunContext
    report: Report
    logits: dict[str, Logits]
    targets: Ints
    units: Ints
    """Unit of each image: group or near-duplicate cluster; the folds share none."""

    def answers(self, variant: str) -> Ints:
        """The labels that a variant gave."""
        return self.logits[variant].argmax(axis=1)


def read_fold(context: RunContext) -> Fold:
    """A run whose report is written."""
    report = msgspec.json.decode((context.root / "report.json").read_bytes(), type=Report)
    split = Split.load(context.root)
    with np.load(context.root / TEST_LOGITS) as data:
        logits = {name: data[name] for name in data.files if name != "key"}
    targets = np.array([split.labels.index(p.label) for p in split.manifest.test], dtype=np.int64)
    return Fold(context, report, logits, targets, units_of(split, "test"))


def pooled_units(folds: Sequence[Fold]) -> Ints:
    """The units of all folds together, numbered without overlap."""
    numbered = [np.unique(fold.units, return_inverse=True)[1] for fold in folds]
    starts = np.cumsum([0, *(own.max() + 1 for own in numbered)])
    return np.concatenate([own + start for own, start in zip(numbered, starts, strict=False)])


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
        lost = paired_loss(pooled(folds, "pruned"), pooled(folds, name), targets, units=pooled_units(folds))
        figures[f"{name}_drop"] = Figure(
            value=100 * lost.loss,
            unit="points",
            bound=0.5,
            better="lower",
            spread=_each(folds, "pruned", name),
            note=f"balanced accuracy against the fp32 pruned student; {note}",
        )
        figures[f"{name}_drop_bound"] = Figure(
            value=100 * lost.bound, unit="points", bound=1.5, better="lower", note="one-sided 95 %, paired bootstrap"
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
    lost = paired_loss(pooled(folds, "student"), pooled(folds, "pruned"), targets, units=pooled_units(folds))
    kept = [100 * f.report.pruning["latency"]["fraction"] for f in folds]
    figures["pruned_to_half_loss"] = Figure(
        value=100 * lost.loss,
        unit="points",
        bound=1.0,
        better="lower",
        spread=_each(folds, "student", "pruned"),
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
    sides = {f"{backend}-int8": pooled(folds, f"{backend}-int8") for backend in BACKENDS}
    found = {name: [] for name in PEERS}
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
    sides |= {name: np.concatenate(parts) for name, parts in found.items()}
    return _table(folds, sides, work, rounds)


def _pixels(fold: Fold) -> tuple[Batch, Batch]:
    """Prepared images: those that calibrated the fold's model, and its held-out test set."""
    spec = fold.context.recipe.image.preprocessing()
    split = Split.load(fold.context.root, spec)
    listed = msgspec.json.decode((fold.context.folder("qat") / "calibration.json").read_bytes(), type=Calibration)
    rows = {image.sha256: row for row, image in enumerate(split.train.images)}
    calibration = prepared([split.train.pixels[rows[sha256]] for sha256 in listed.images], spec)
    return calibration, prepared(split.open_test("benchmarks/compression.py").pixels, spec)


def _table(folds: Sequence[Fold], sides: dict[str, Logits], work: Path, rounds: int) -> dict[str, Figure]:
    targets = np.concatenate([fold.targets for fold in folds])
    pruned, qat = pooled(folds, "pruned"), pooled(folds, "qat")
    times, sizes = _costs(folds[0], work, rounds)
    table = Table(title="int8 of the same pruned students", title_justify="left")
    table.add_column("made by")
    for title in ("drop, points", "95 % bound", "agrees with its origin", "with fp32", "p50 ms", "fp32 / int8", "kB"):
        table.add_column(title, justify="right")
    apart = {}
    for name, logits in sides.items():
        backend = PEERS[name][0] if name in PEERS else name.split("-")[0]
        lost = paired_loss(pruned, logits, targets, units=pooled_units(folds))
        origin = pruned if name in PEERS else qat
        apart[name] = float((logits.argmax(1) != origin.argmax(1)).mean())
        table.add_row(
            f"{backend}: {name}" if name in PEERS else f"{backend}: Eyas",
            f"{100 * lost.loss:.2f}",
            f"{100 * lost.bound:.2f}",
            f"{1 - apart[name]:.4f}",
            f"{(logits.argmax(1) == pruned.argmax(1)).mean():.4f}",
            f"{np.median(times[name]):.3f}",
            f"{np.median(times[f'{backend}-fp32']) / np.median(times[name]):.2f}",
            f"{sizes[name] / 1e3:.0f}",
        )
    show(table)
    figures = {}
    ends = np.cumsum([len(fold.targets) for fold in folds])[:-1]
    for name, (backend, *_) in PEERS.items():
        own, theirs = apart[f"{backend}-int8"], apart[name]
        lost = paired_loss(pruned, sides[name], targets, units=pooled_units(folds))
        cost = f"{np.median(times[name]):.3f} ms, {sizes[name] / 1e3:.0f} kB"
        folded = np.split(sides[name].argmax(1) != pruned.argmax(1), ends)
        figures[f"{name} on {backend}: disagreements"] = Figure(
            value=100 * theirs,
            unit="%",
            spread=_words([100 * float(part.mean()) for part in folded], 1),
            note=f"with fp32; drop {100 * lost.loss:.2f} points, bound {100 * lost.bound:.2f}; {cost}",
        )
        figures[f"{backend}-int8: disagreements beside {name}"] = Figure(
            value=100 * own,
            unit="%",
            bound=50 * theirs if theirs > 0.05 else None,
            better="lower",
            note=f"with QAT; {np.median(times[f'{backend}-int8']):.3f} ms, {sizes[f'{backend}-int8'] / 1e3:.0f} kB",
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


def _each(folds: Sequence[Fold], before: str, after: str) -> str:
    """The loss of each fold, points."""
    return _words([100 * paired_loss(f.logits[before], f.logits[after], f.targets).loss for f in folds])


def _words(values: Sequence[float], places: int = 2) -> str:
    return ", ".join(f"{value:.{places}f}" for value in values)
