"""Evaluate a finished bundle on a second labelled set, through the device's own runtimes.

A second set shows what the held-out test set cannot: how the bundle does on images from another camera, site or season.
Needs no torch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.decision import decide
from eyas_device.errors import ImageError, RuntimeUnavailable
from eyas_device.predict import calibrated_probabilities
from eyas_device.preprocess import Pixels, Preprocessing, decode, prepare
from eyas_device.runtimes import Runtime, open_runtime
from eyas_device.support.image_files import describe_left_out
from eyas_host.data.duplicates import Hashes, components, perceptual_hash
from eyas_host.data.image_bytes import read_image_bytes
from eyas_host.data.sources import LabelledImage, list_source
from eyas_host.evaluation.bootstrap import Floats, Ints, intervals, label_intervals
from eyas_host.evaluation.labelled_figures import (
    Agreement,
    ArtefactFigures,
    Evaluation,
    LabelFigures,
    Unseen,
    WrongPrediction,
)
from eyas_host.evaluation.metrics import reliability, score
from eyas_host.evaluation.overlap import SeenBefore, joined_hashes
from eyas_host.support.errors import DataError
from eyas_host.support.machine import decoding_threads, machine
from eyas_host.support.progress import meter, warn

_CHUNK = 64
_MAX_LISTED = 10
_MAX_MISTAKES = 48
_FEW_IMAGES = 20
"""Images of a label below which its figures say little."""


class _Read(NamedTuple):
    image: LabelledImage
    pixels: Pixels
    """Prepared for the model."""
    hash: bytes


class _Predicted(NamedTuple):
    """Logits and calibrated probabilities of one artefact, [n, classes]."""

    artefact: str
    runtime: str
    version: str
    logits: Floats
    probabilities: Floats


def evaluate_bundle(
    bundle: Path,
    source: Path,
    *,
    artefacts: Sequence[str] = (),
    run: Path | None = None,
    skip_unreadable: bool = False,
) -> Evaluation:
    """Run every artefact of `bundle` that works here on the labelled images of `source`.

    Args:
        bundle: The bundle's folder.
        source: A folder that holds one folder a class, or a CSV table path,label[,group].
        artefacts: Only these, and they must work here.
        run: The run that the bundle was packed in, to look for images that it has seen; found by itself for
            `runs/NAME/bundle`.
        skip_unreadable: List images that cannot be read instead of refusing the set.

    Raises:
        BundleError: The bundle is damaged or has no such artefact.
        DataError: The set cannot be used: no images, unreadable ones, or labels that the bundle does not know.
        RuntimeUnavailable: No artefact, or not every one of `artefacts`, works here.

    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    listed = list_source(source)
    found = listed.images
    for remark in listed.remarks:
        warn(f"{source}: {remark}")
    _check_labels(found, manifest.labels, source)
    seen = SeenBefore.of(bundle, manifest.lineage.split, run)
    with ExitStack() as stack:
        runtimes, unavailable = _open_runtimes(opened, artefacts, stack)
        images, hashes, predicted, unreadable = _predict(found, runtimes, opened)
    if unreadable and not skip_unreadable:
        shown = "".join(f"\n  {line}" for line in unreadable[:_MAX_LISTED])
        more = f"\n  and {len(unreadable) - _MAX_LISTED} more" if len(unreadable) > _MAX_LISTED else ""
        raise DataError(
            f"{source}: {len(unreadable)} unreadable image{'s' * (len(unreadable) > 1)}; fix or remove them, or give "
            f"--skip-unreadable{shown}{more}"
        )
    if not images:
        raise DataError(f"{source}: none of its {len(found)} images can be read")
    targets = np.array([manifest.labels.index(image.label) for image in images], dtype=np.int64)
    overlap = seen.compare(images, hashes)
    known = {one.path for one in overlap.images if one.split in ("train", "validation")}
    unseen = np.array([image.path not in known for image in images])
    units = _units(images)
    figures = tuple(_figures(one, targets, units, unseen, opened) for one in predicted)
    main = _main(predicted, opened)
    mistakes = _mistakes(main, images, targets, opened)
    counts = Counter(image.label for image in images)
    evaluation = Evaluation(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        bundle=manifest.name,
        bundle_version=manifest.version,
        bundle_sha256=sha256(bundle / MANIFEST),
        source=str(source),
        bits=manifest.preprocessing.bits,
        labels=manifest.labels,
        images=len(images),
        counts={label: counts[label] for label in manifest.labels if counts[label]},
        missing_labels=tuple(label for label in manifest.labels if not counts[label]),
        unreadable=tuple(unreadable),
        left_out=dict(listed.left_out),
        main=main.artefact,
        artefacts=figures,
        unavailable=unavailable,
        parity=tuple(_agreement(one, main, opened) for one in predicted if one is not main),
        mistakes=mistakes[:_MAX_MISTAKES],
        mistake_count=len(mistakes),
        overlap=overlap,
        machine=machine(),
    )
    return msgspec.structs.replace(evaluation, warnings=tuple(_warnings(evaluation, images)))


def _check_labels(images: Sequence[LabelledImage], labels: Sequence[str], source: Path) -> None:
    unknown = Counter(image.label for image in images if image.label not in labels)
    if unknown:
        listed = ", ".join(f"{label!r} ({count} images)" for label, count in sorted(unknown.items()))
        raise DataError(f"{source}: labels that the bundle does not know: {listed}; it knows {', '.join(labels)}")


def _open_runtimes(
    bundle: Bundle, wanted: Sequence[str], stack: ExitStack
) -> tuple[list[tuple[str, Runtime]], dict[str, str]]:
    """Artefact name and opened runtime of what works here, and why the others do not."""
    runtimes: list[tuple[str, Runtime]] = []
    unavailable: dict[str, str] = {}
    for name in dict.fromkeys(wanted or [artefact.name for artefact in bundle.manifest.artefacts]):
        try:
            runtimes.append((name, stack.enter_context(open_runtime(bundle, artefact=name))))
        except RuntimeUnavailable as error:
            if wanted:
                raise
            unavailable[name] = str(error)
    if not runtimes:
        raise RuntimeUnavailable(f"{bundle.root}: no artefact works here: {'; '.join(unavailable.values())}")
    return runtimes, unavailable


def _predict(
    images: Sequence[LabelledImage], runtimes: Sequence[tuple[str, Runtime]], bundle: Bundle
) -> tuple[list[LabelledImage], Hashes, list[_Predicted], list[str]]:
    """The readable images, their perceptual hashes [n, 32], what each artefact predicts, and what is unreadable."""
    readable, unreadable, hashes = [], [], []
    logits: list[list[Floats]] = [[] for _ in runtimes]
    with meter("evaluating images", len(images)) as bar:
        for read in _read_all(images, bundle.manifest.preprocessing):
            if isinstance(read, str):
                unreadable.append(read)
            else:
                readable.append(read.image)
                hashes.append(read.hash)
                for (_, runtime), own in zip(runtimes, logits, strict=True):
                    own.append(runtime.infer(read.pixels).copy())
            bar.advance()
    confidence = bundle.manifest.confidence
    predicted = [
        _Predicted(
            name, runtime.name, runtime.version, np.stack(own), calibrated_probabilities(np.stack(own), confidence)
        )
        for (name, runtime), own in zip(runtimes, logits, strict=True)
        if own
    ]
    return readable, joined_hashes(hashes), predicted, unreadable


def _read_all(images: Sequence[LabelledImage], spec: Preprocessing) -> Iterator[_Read | str]:
    """Each image read and prepared, or why it cannot be read, in order."""
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for start in range(0, len(images), _CHUNK):
            yield from pool.map(lambda image: _read(image, spec), images[start : start + _CHUNK])


def _read(image: LabelledImage, spec: Preprocessing) -> _Read | str:
    try:
        data = read_image_bytes(image.path)
        pixels = decode(data, spec=msgspec.structs.replace(spec, decode="full"), where=image.path)
        frame = pixels if spec.decode == "full" else decode(data, spec=spec, where=image.path)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"{image.path}: cannot be read ({error.strerror})"
    named = msgspec.structs.replace(image, sha256=hashlib.sha256(data).hexdigest())
    return _Read(named, prepare(frame, spec), perceptual_hash(pixels))


def _decided(one: _Predicted, bundle: Bundle) -> Ints:
    """Predicted labels [n], as the device decides."""
    manifest = bundle.manifest
    return np.asarray(decide(one.logits, one.probabilities, manifest.labels, manifest.decision), dtype=np.int64)


def _figures(
    one: _Predicted, targets: Ints, units: Ints, unseen: npt.NDArray[np.bool_], bundle: Bundle
) -> ArtefactFigures:
    manifest = bundle.manifest
    probabilities = one.probabilities
    predicted = _decided(one, bundle)
    scores = score(probabilities, targets, predicted=predicted, units=units)
    decision = manifest.decision
    costs = None if decision is None else np.asarray(decision.costs)
    ranges = intervals(probabilities, predicted, targets, units=units, costs=costs)
    confidence = one.probabilities[np.arange(len(targets)), predicted]
    never = set(range(len(manifest.labels))) - set(predicted.tolist())
    evidence = manifest.evidence.get(one.artefact, {}).get("balanced_accuracy")
    return ArtefactFigures(
        name=one.artefact,
        runtime=one.runtime,
        runtime_version=one.version,
        precision=next(a.precision for a in manifest.artefacts if a.name == one.artefact),
        accuracy=scores.accuracy,
        accuracy_ci=ranges["accuracy"],
        balanced_accuracy=scores.balanced_accuracy,
        balanced_accuracy_ci=ranges["balanced_accuracy"],
        f1=scores.f1,
        f1_ci=ranges["f1"],
        auc=scores.auc if math.isfinite(scores.auc) else None,
        auc_ci=ranges.get("auc"),
        pr_auc=scores.pr_auc,
        pr_auc_ci=ranges.get("pr_auc"),
        ece=scores.ece,
        classwise_ece=float(scores.classwise_ece or 0.0),
        brier=float(scores.brier or 0.0),
        nll=float(scores.nll or 0.0),
        uncertain=float((confidence < manifest.confidence.threshold).mean()),
        cost=None if costs is None else float(costs[targets, predicted].mean()),
        cost_ci=ranges.get("cost"),
        confusion=scores.confusion,
        labels=tuple(
            LabelFigures(
                label=label,
                images=own.support,
                recall=own.recall if own.support else None,
                recall_ci=own.recall_ci,
                precision=None if number in never else own.precision,
                f1=own.f1 if own.support else None,
                auc=own.auc,
                average_precision=own.average_precision,
            )
            for number, (label, own) in enumerate(zip(manifest.labels, scores.classes, strict=True))
        ),
        reliability=tuple(reliability(probabilities, targets)),
        unseen=_unseen(predicted[unseen], targets[unseen], units[unseen], len(manifest.labels))
        if 0 < unseen.sum() < len(unseen)
        else None,
        packed_balanced_accuracy=float(evidence) if isinstance(evidence, int | float) else None,
    )


def _units(images: Sequence[LabelledImage]) -> Ints:
    """Unit of each image [n]: exact copies and images of one group have the same one."""
    links: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    for row, image in enumerate(images):
        keys = [image.sha256, *([f"group {image.group}"] if image.group else [])]
        links += [(first.setdefault(key, row), row) for key in keys]
    one, two = np.array(links, dtype=np.int64).T
    return components(len(images), one, two)


def _unseen(predicted: Ints, targets: Ints, units: Ints, classes: int) -> Unseen:
    return Unseen(
        images=len(targets),
        balanced_accuracy=float(np.mean([(predicted[targets == n] == n).mean() for n in np.unique(targets)])),
        balanced_accuracy_ci=label_intervals(predicted, targets, classes, units=units)["balanced_accuracy"],
    )


def _main(predicted: Sequence[_Predicted], bundle: Bundle) -> _Predicted:
    """What the first runtime of the bundle runs, or the first that works here."""
    by_name = {one.artefact: one for one in predicted}
    return next((by_name[name] for name in bundle.manifest.use.values() if name in by_name), predicted[0])


def _agreement(one: _Predicted, main: _Predicted, bundle: Bundle) -> Agreement:
    gap = np.abs(one.probabilities - main.probabilities)
    return Agreement(
        artefact=one.artefact,
        reference=main.artefact,
        agreement=float((_decided(one, bundle) == _decided(main, bundle)).mean()),
        mean_dp=float(gap.mean()),
        max_dp=float(gap.max()),
    )


def _mistakes(
    main: _Predicted, images: Sequence[LabelledImage], targets: Ints, bundle: Bundle
) -> tuple[WrongPrediction, ...]:
    labels, decision = bundle.manifest.labels, bundle.manifest.decision
    predicted = _decided(main, bundle)
    confidence = main.probabilities[np.arange(len(targets)), predicted]
    price = np.zeros(len(targets)) if decision is None else np.asarray(decision.costs)[targets, predicted]
    wrong = np.flatnonzero(predicted != targets)
    return tuple(
        WrongPrediction(
            path=images[row].path,
            label=labels[targets[row]],
            predicted=labels[predicted[row]],
            confidence=float(confidence[row]),
            cost=None if decision is None else float(price[row]),
        )
        for row in wrong[np.lexsort((-confidence[wrong], -price[wrong]))]
    )


def _warnings(evaluation: Evaluation, images: Sequence[LabelledImage]) -> Iterator[str]:
    overlap = evaluation.overlap
    if not overlap.checked:
        yield f"whether images were in training could not be checked: {'; '.join(overlap.notes)}"
    else:
        yield from overlap.notes
    for split, use in (("train", "trained on"), ("validation", "validated on"), ("test", "tested on")):
        matches = [one.match for one in overlap.images if one.split == split]
        if matches:
            exact = matches.count("exact")
            listed = f"{_counted(exact, 'exact copy', 'exact copies')}, "
            listed += _counted(len(matches) - exact, "near-duplicate", "near-duplicates")
            without = "; figures without them are given too" if split != "test" else ""
            yield f"{len(matches)} of {len(images)} images were {use}: {listed}{without}"
    copies = len(images) - len({image.sha256 for image in images})
    if copies:
        yield f"{_counted(copies, 'exact copy', 'exact copies')} within the set; the intervals count each image once"
    by_hash: dict[str, LabelledImage] = {}
    contradictions: list[str] = []
    for image in images:
        first = by_hash.setdefault(image.sha256, image)
        if first.label != image.label:
            contradictions.append(f"{first.path} ({first.label}) and {image.path} ({image.label})")
    if contradictions:
        more = len(contradictions) - _MAX_LISTED
        listed = "; ".join(contradictions[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        yield f"{_counted(len(contradictions), 'image has', 'images have')} two labels: {listed}"
    groups = len({image.group for image in images if image.group})
    if 0 < groups < _FEW_IMAGES:
        yield f"images come in only {groups} groups: all figures are uncertain"
    if evaluation.missing_labels:
        yield (
            f"no images of {', '.join(evaluation.missing_labels)}: balanced accuracy and F1 are over the other labels, "
            "AUC is not given"
        )
    few = [f"{label} ({count})" for label, count in evaluation.counts.items() if count < _FEW_IMAGES]
    if few:
        yield f"fewer than {_FEW_IMAGES} images of {', '.join(few)}: their figures are uncertain"
    for name, reason in evaluation.unavailable.items():
        yield f"{name} was not evaluated: {reason}"
    if evaluation.unreadable:
        yield f"{_counted(len(evaluation.unreadable), 'unreadable image', 'unreadable images')} skipped"
    if evaluation.left_out:
        yield describe_left_out(evaluation.left_out)


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
