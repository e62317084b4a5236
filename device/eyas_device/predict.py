"""Classify an image: a label with a calibrated confidence."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Artefact, Bundle, Confidence, Manifest
from eyas_device.decision import decide
from eyas_device.preprocess import Pixels, Scratch, prepare
from eyas_device.runtimes import Runtime, choose, open_runtime
from eyas_device.support.closing import Closing

Probabilities = npt.NDArray[np.float32]
"""float32 [classes], sums to 1."""


class Prediction(msgspec.Struct, frozen=True):
    """The prediction for one image."""

    label: str
    index: int
    """Position of the label in the manifest's labels."""
    confidence: float
    """Calibrated probability of the label, 0..1; not always the largest one: see `eyas_device.decision.decide`."""
    uncertain: bool
    """Whether the confidence is below the bundle's threshold, or the answer is not finite."""
    probabilities: Probabilities
    latency_ms: float
    """Preprocessing, inference and calibration, milliseconds."""
    prepare_ms: float = 0.0
    """Preprocessing alone, into the runtime's own input."""
    finite: bool = True
    """Whether all logits are finite numbers. If not, the model said nothing: the probabilities are equal, the label is
    what the decision rule makes of them, the confidence is 0."""


class Classifier(Closing):
    """A verified bundle and a runtime that has its model loaded. Not thread-safe.

    >>> import cv2
    >>> with Classifier.open("runs/shapes/bundle") as classifier:
    ...     prediction = classifier.predict(cv2.imread("cross.png"))
    >>> prediction.label, 0 < prediction.confidence < 1
    ('cross', True)
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, artefact: Artefact, *, threads: int = 1) -> None:
        self.bundle = bundle
        self.threads = threads
        """Inference threads of the runtime."""
        self.runtime = runtime
        self.artefact = artefact
        manifest = bundle.manifest
        self.spec = manifest.preprocessing
        self._scratch: Scratch = {}
        self._labels = manifest.labels
        self._confidence = manifest.confidence
        self._decision = manifest.decision
        self.threshold = manifest.confidence.threshold
        """Below this confidence a prediction is uncertain; the bundle's, unless another one is set."""

    @classmethod
    def open(
        cls, root: Path | str, runtime: str | None = None, artefact: str | None = None, *, threads: int = 1
    ) -> Classifier:
        """Verify the bundle at `root` and load the preferred artefact of `runtime`.

        Without `runtime`, the first of `eyas_device.runtimes.RUNTIMES` that the bundle supports and that works here.
        Raises `BundleError` for a damaged or unsuitable bundle and `RuntimeUnavailable` without a runtime for it.
        """
        return cls.load(Bundle.open(root), runtime, artefact, threads=threads)

    @classmethod
    def load(
        cls, bundle: Bundle, runtime: str | None = None, artefact: str | None = None, *, threads: int = 1
    ) -> Classifier:
        """Load a model of a bundle that is already open; arguments as for `open`."""
        chosen = choose(bundle, runtime, artefact)
        loaded = open_runtime(bundle, chosen.runtime, chosen.artefact.name, threads=threads)
        return cls(bundle, loaded, chosen.artefact, threads=threads)

    def __str__(self) -> str:
        manifest, runtime = self.bundle.manifest, self.runtime
        return f"{manifest.name} {manifest.version}: {self.artefact.name} on {runtime.name} {runtime.version}"

    def predict(self, frame: Pixels) -> Prediction:
        """Classify one frame, uint8 [h, w] or [h, w, 1|3|4] (grey, BGR, BGRA) of any size.

        Raises `ImageError` for pixels of another type or shape.
        """
        started = perf_counter()
        prepared_at = started

        def write(out: Pixels) -> None:
            nonlocal prepared_at
            prepare(frame, self.spec, out=out, scratch=self._scratch)
            prepared_at = perf_counter()

        logits = self.runtime.infer_in_place(write)
        finite = bool(np.isfinite(logits).all())
        if finite:
            probabilities = calibrated_probabilities(logits, self._confidence)
        else:
            logits = np.zeros_like(logits)
            probabilities = np.full(len(self._labels), 1.0 / len(self._labels))
        index = int(decide(logits, probabilities, self._labels, self._decision))
        confidence = float(probabilities[index]) if finite else 0.0
        return Prediction(
            label=self._labels[index],
            index=index,
            confidence=confidence,
            uncertain=not finite or confidence < self.threshold,
            probabilities=probabilities.astype(np.float32),
            latency_ms=1000 * (perf_counter() - started),
            prepare_ms=1000 * (prepared_at - started),
            finite=finite,
        )

    def close(self) -> None:
        """Free the model."""
        self.runtime.close()


def labels_of(probabilities: npt.NDArray[np.floating[Any]], manifest: Manifest) -> tuple[list[str], list[bool]]:
    """Label and uncertainty of calibrated probabilities [n, classes], as `Classifier.predict` derives them."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(probabilities, dtype=np.float64))  # up to a factor and an offset per image
    if manifest.confidence.bias:
        logits -= manifest.confidence.bias
    indices = decide(logits, probabilities, manifest.labels, manifest.decision)
    confidences = np.take_along_axis(probabilities, indices[:, None], axis=1)[:, 0]
    uncertain = confidences < manifest.confidence.threshold
    return [manifest.labels[index] for index in indices], [bool(flag) for flag in uncertain]


def calibrated_probabilities(logits: npt.NDArray[np.floating[Any]], confidence: Confidence) -> npt.NDArray[np.float64]:
    """Calibrated probabilities float64 [..., classes] of logits [..., classes]: softmax(logits / temperature + bias).

    The host reports probabilities by this function too.
    """
    powers = np.divide(logits, confidence.temperature, dtype=np.float64)
    if confidence.bias:
        powers += confidence.bias
    powers -= powers.max(axis=-1, keepdims=True)
    np.exp(powers, out=powers)
    powers /= powers.sum(axis=-1, keepdims=True)
    return np.asarray(powers)
