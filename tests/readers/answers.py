"""What a reader of `.tflite` files answers: called here for LiteRT, and run by the other readers' own Pythons.

    python answers.py <JOB.json >FOUND.json

One process does everything, because TensorFlow takes ten seconds to import. Needs the device's package alone.
"""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import msgspec
import numpy as np

from eyas_device import cli
from eyas_device.bundle import Bundle
from eyas_device.errors import EyasError
from eyas_device.predict import Classifier
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import artefact_runtime, load
from eyas_device.runtimes.tflite_base import TfliteModel
from eyas_device.updates.golden import GoldenResult

Row = list[float]


class Job(msgspec.Struct):
    """What is asked."""

    runtime: str
    """A key of `eyas_device.runtimes.RUNTIMES`."""
    bundles: dict[str, str]
    frames: str
    """An `.npy` of more frames than the golden ones, uint8 [n, h, w, 3]."""
    tiny: dict[str, str]
    """Small models of one linear layer."""
    pixels: str
    """An `.npy` of an image for them, uint8 [size, size, 3]."""
    classes: int
    """Theirs."""
    unreadable: dict[str, str]
    """Files that a reader must refuse."""


class Contract(msgspec.Struct):
    """How one tiny model was answered for."""

    logits: list[Row]
    """Of `layouts`."""
    written_alike: bool
    """Whether an image that was written in place was answered as one that was given."""
    refused: list[str]
    """What was said to three wrong images."""


class Found(msgspec.Struct):
    """What was answered. A bundle's artefact is called `BUNDLE/ARTEFACT`."""

    python: str
    numpy: str
    opencv: str
    library: str
    """Name and version of the reader."""
    checked: dict[str, list[GoldenResult]]
    """Bundle -> what `eyas-device check` said of each artefact."""
    probabilities: dict[str, list[Row]]
    """Artefact -> [golden and further frames, classes]."""
    by_reference: dict[str, list[Row]]
    """The same of the golden frames, by the reference kernels: slow ones, made to be right."""
    contracts: dict[str, Contract]
    errors: dict[str, str]
    """Artefact or unreadable file -> why it was refused."""


def find(job: Job) -> Found:
    """Do all of it."""
    found = Found(
        python=platform.python_version(),
        numpy=np.__version__,
        opencv=cv2.__version__,
        library="",
        checked={name: _checked(root, job.runtime) for name, root in job.bundles.items()},
        probabilities={},
        by_reference={},
        contracts={name: _contract(path, job) for name, path in job.tiny.items()},
        errors={name: _said(partial(_load, path, job)) for name, path in job.unreadable.items()},
    )
    frames = np.load(job.frames)
    for name, root in job.bundles.items():
        bundle = Bundle.open(Path(root))
        golden = bundle.golden().frames
        for artefact in bundle.manifest.artefacts:
            if artefact.runtime != artefact_runtime(job.runtime):
                continue
            key = f"{name}/{artefact.name}"
            try:
                with Classifier.load(bundle, job.runtime, artefact.name) as classifier:
                    found.library = classifier.runtime.version
                    found.probabilities[key] = _rows(classifier, [*golden, *frames])
                    reference = _Reference(classifier)
                with Classifier(bundle, reference, artefact) as classifier:
                    found.by_reference[key] = _rows(classifier, golden)
            except EyasError as error:
                found.errors[key] = str(error)
    return found


class _Reference(TfliteModel):
    """What a classifier runs, by the reference kernels of the same library."""

    def __init__(self, classifier: Classifier) -> None:
        runtime, manifest = cast(TfliteModel, classifier.runtime), classifier.bundle.manifest
        kernels = sys.modules[runtime.interpreter.__module__].OpResolverType.BUILTIN_REF
        self.name, self.version = runtime.name, runtime.version
        self.interpreter = partial(runtime.interpreter, experimental_op_resolver_type=kernels)
        path, size = classifier.bundle.path(classifier.artefact), manifest.preprocessing.size
        super().__init__(path, size=size, classes=len(manifest.labels), threads=1)


def _rows(classifier: Classifier, frames: Sequence[Pixels]) -> list[Row]:
    return [classifier.predict(frame).probabilities.tolist() for frame in frames]


def layouts(pixels: Pixels) -> tuple[Pixels, ...]:
    """An image, three others that are made from it, and every way to lie in memory."""
    return pixels, pixels[:, ::-1], np.asfortranarray(pixels), 255 - pixels


def _checked(root: str, runtime: str) -> list[GoldenResult]:
    """`eyas-device check`; its message for a bundle that cannot be run goes to standard error."""
    with redirect_stdout(io.StringIO()) as printed:
        cli.main(["check", root, "--runtime", runtime, "--json"])
    return [msgspec.json.decode(line, type=GoldenResult) for line in printed.getvalue().splitlines()]


def _contract(path: str, job: Job) -> Contract:
    pixels: Pixels = np.load(job.pixels)
    wrong = pixels[:1, :1], pixels[..., 0], pixels.astype(np.float32)
    with _load(path, job) as model:
        logits = [model.infer(image).tolist() for image in layouts(pixels)]
        given = model.infer(pixels).copy()
        model.infer(255 - pixels)  # what lies in the input must not matter
        written = model.infer_in_place(lambda out: np.copyto(out, pixels))
        alike = bool(np.array_equal(written, given))
        return Contract(logits, alike, [_said(partial(model.infer, image)) for image in wrong])


def _load(path: str, job: Job) -> Any:
    loader: Any = load(job.runtime)
    return loader(Path(path), size=len(np.load(job.pixels)), classes=job.classes, threads=1)


def _said(call: Callable[[], object]) -> str:
    """The message of the mistake that a call is; empty if it was none."""
    try:
        call()
    except EyasError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(find(asked)))
