"""Other readers of `.tflite` files beside LiteRT: the same artefacts, the same frames, the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eyas_device.bundle import Bundle
from tests.support import tiny

from .answers import Found, Job, layouts
from .conftest import BUNDLES, TINY, Reader

EXACT_DP = 1e-6
"""Largest difference of a probability by the reference kernels: a file says the same to every reader."""
MAX_DP = {"litert-fp32": 1e-4, "litert-int16": 1e-3}
"""The same by the kernels that a reader takes. Those of int8 differ by a step here and there, which a network that was
trained for seconds amplifies: they are held to the bundle's golden tolerance."""
INT8_MEAN_DP = 0.02

Report = Callable[[str], None]


def artefacts(job: Job, bundle: str) -> list[str]:
    """Names of what the bundle has for these readers."""
    found = [a.name for a in Bundle.open(Path(job.bundles[bundle])).manifest.artefacts if a.runtime == "litert"]
    assert found
    return found


def test_the_reader_is_what_it_claims_to_be(reader: Reader, there: Found) -> None:
    assert there.library == f"{reader.library} {reader.pins[reader.library]}"
    assert there.python.startswith("3.11.")
    assert there.numpy == reader.pins["numpy"]
    assert reader.pins["opencv-python-headless"].startswith(f"{there.opencv}.")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_golden_images(bundle: str, job: Job, there: Found) -> None:
    assert [row.artefact for row in there.checked[bundle]] == artefacts(job, bundle), there.errors
    for row in there.checked[bundle]:
        assert (row.status, row.runtime) == ("ok", "tflite"), row


@pytest.mark.parametrize("bundle", BUNDLES)
def test_answers(bundle: str, job: Job, there: Found, here: Found, report: Report) -> None:
    tolerance = Bundle.open(Path(job.bundles[bundle])).manifest.golden_tolerance
    for name in artefacts(job, bundle):
        key = f"{bundle}/{name}"
        assert key in there.probabilities, there.errors[key]
        p, q = np.array(there.probabilities[key]), np.array(here.probabilities[key])
        difference, alike = np.abs(p - q), p.argmax(axis=1) == q.argmax(axis=1)
        report(
            f"{there.library}: {bundle} {name}, {len(p)} images, difference of a probability {difference.max():.2g} "
            f"at most, {difference.mean():.2g} on average, agreement {alike.mean():.3f}"
        )
        limit = MAX_DP.get(name, tolerance)
        assert q.std(axis=0).max() > 0.05, "the network answers the same to every image"
        assert difference.max() <= limit and difference.mean() <= INT8_MEAN_DP
        best = np.sort(q, axis=1)
        assert alike[best[:, -1] - best[:, -2] > 2 * limit].all()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_reference_kernels_answer_the_same(bundle: str, job: Job, there: Found, here: Found) -> None:
    for name in artefacts(job, bundle):
        p, q = (np.array(found.by_reference[f"{bundle}/{name}"]) for found in (there, here))
        assert len(p) >= 10 and p.shape == q.shape
        assert np.abs(p - q).max() <= EXACT_DP, name


@pytest.mark.parametrize("kind", TINY)
def test_contract(kind: str, noise: np.ndarray, weights: tuple[tiny.Floats, tiny.Floats], there: Found) -> None:
    found = there.contracts[kind]
    wanted = [tiny.reference_logits(pixels, *weights) for pixels in layouts(noise)]
    assert np.abs(np.array(found.logits) - wanted).max() < (1e-3 if kind == "float32" else 0.5)
    assert found.written_alike
    assert all("uint8 (16, 16, 3) is needed" in said for said in found.refused)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("large", "large.tflite: the model has inputs [1, 32, 32, 3]; one input [1, 16, 16, 3]"),
        ("newer", "newer.tflite: the model cannot be loaded (Didn't find op for builtin opcode"),
        ("text", "text.tflite: the model cannot be loaded ("),
    ],
    ids=["large", "newer", "text"],
)
def test_files_that_cannot_be_read(file: str, said: str, there: Found) -> None:
    assert said in there.errors[file]
    assert "\n" not in there.errors[file]
