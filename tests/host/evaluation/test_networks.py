"""Logits of all variants: the right ones, from images that are decoded once and never all at once."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eyas_device.bundle import Bundle
from eyas_device.preprocess import Pixels, prepare
from eyas_device.runtimes import open_runtime
from eyas_host.evaluation import networks as evaluated
from eyas_host.evaluation.inference import logits_of
from eyas_host.evaluation.networks import all_logits
from eyas_host.models.factory import PixelClassifier
from tests.support import tiny

CPU = torch.device("cpu")
IMAGES = 150  # two full batches and a smaller one


class Watched(nn.Module):
    """A small network that notes how it is called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, tiny.CLASSES))
        self.settings: set[tuple[int, str, bool, bool]] = set()
        self.calls, self.most_calls = 0, 0
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        with self.lock:
            self.settings.add((torch.get_num_threads(), *precision, torch.is_inference_mode_enabled()))
            self.calls += 1
            self.most_calls = max(self.most_calls, self.calls)
        time.sleep(0.005)
        logits: Tensor = self.layers(x.contiguous())
        with self.lock:
            self.calls -= 1
        return logits


class Frames(Sequence[Pixels]):
    """Images drawn on access; counts the accesses, and the most images that were alive at a time."""

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()
        self.alive, self.most_alive = 0, 0
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, row: Any) -> Any:
        if row >= IMAGES:
            raise IndexError
        pixels = drawn(row).view(_Tracked)
        with self.lock:
            self.reads[row] += 1
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(pixels, self._freed)
        return pixels

    def _freed(self) -> None:
        with self.lock:
            self.alive -= 1


class _Tracked(np.ndarray[Any, Any]):
    """An array that takes weak references."""


def drawn(row: int) -> Pixels:
    return tiny.draw_shape(tiny.LABELS[row % 3], row, 60 + row % 5, 50 + row % 7)


@pytest.fixture
def fast_math() -> Any:
    """What a training on a GPU sets, and what must be as it was afterwards."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    yield
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == ("high", before[1])
    assert torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before[0])


@pytest.mark.usefixtures("fast_math")
def test_each_image_is_decoded_once_and_every_variant_has_its_own_logits(
    pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluated, "usable_cores", lambda: 4)
    bundle, frames = Bundle.open(pristine_bundle), Frames()
    teacher, student = (PixelClassifier(Watched(seed), (0.5,) * 3, (0.5,) * 3) for seed in range(2))
    hooked = Watched(2)  # as NNCF's networks, whose calls must not overlap
    networks = {"teacher": teacher, "student": student, "qat": hooked}
    logits = all_logits(networks, bundle, frames, CPU)

    assert frames.reads == dict.fromkeys(range(IMAGES), 1)
    assert frames.most_alive <= 3, "decoded images must not pile up"
    watched: list[Any] = [teacher.backbone, student.backbone, hooked]
    assert [w.settings for w in watched] == [{(1, "highest", False, True)}] * 3
    assert hooked.most_calls == 1 < watched[0].most_calls

    pixels = [prepare(drawn(row), tiny.SPEC) for row in range(IMAGES)]
    assert sorted(logits) == sorted([*(a.name for a in bundle.manifest.artefacts), *networks])
    for artefact in bundle.manifest.artefacts:
        with open_runtime(bundle, artefact.runtime, artefact.name) as runtime:
            assert np.array_equal(logits[artefact.name], [runtime.infer(image).copy() for image in pixels])
    with torch.inference_mode():
        for name, network in networks.items():
            one_by_one = [network(torch.from_numpy(image).permute(2, 0, 1)[None].float()) for image in pixels[::9]]
            np.testing.assert_allclose(logits[name][::9], torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fast_math")
def test_validation_during_a_training_is_in_full_float32() -> None:
    network = Watched(0)
    logits_of(network, np.zeros((3, 16, 16, 3), dtype=np.uint8), CPU, batch=2)
    assert {setting[1:] for setting in network.settings} == {("highest", False, True)}
