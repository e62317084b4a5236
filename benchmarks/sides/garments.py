"""Real images for the loop's benchmarks: Fashion-MNIST as cameras see it, and a small network that learns it.

`apt-get install dataset-fashion-mnist`, or unpacked below a folder. Cameras, light and dirt are operations on images.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eyas_device.preprocess import Pixels
from eyas_host.evaluation.changes import blur, contrast, dirt, light
from eyas_host.train.checkpoint import save_tensors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
FOLDER = Path("usr/share/datasets/fashion-mnist")
FEATURES = 64
CACHE = Path("runs/benchmark/loop")
CONDITIONS: Mapping[str, Any] = {
    "usual": lambda image: image,
    "darker": lambda image: light(image, 0.7),
    "slightly soft": lambda image: blur(image, 6.0),
    "dusk": lambda image: light(image, 0.4),
    "haze": lambda image: contrast(image, 0.6),
    "dirt": lambda image: dirt(image, 5.0),
    "season": lambda image: light(contrast(blur(image, 7.0), 0.7), 0.8),
}
"""Name -> what a camera makes of an image; `season` is fog in little light."""
_BATCH = 64


class Garments(NamedTuple):
    """Images and their label numbers."""

    images: Pixels
    """uint8 [n, 28, 28]"""
    targets: Ints

    def take(self, rows: Any) -> Garments:
        """Some of them."""
        return Garments(self.images[rows], self.targets[rows])

    def seen(self, condition: str) -> Pixels:
        """As a camera sees them, uint8 [n, 28, 28]."""
        change = CONDITIONS[condition]
        return np.stack([change(np.dstack([image] * 3))[..., 0] for image in self.images])


def installed(root: Path) -> bool:
    """Whether the images are there."""
    return (root / FOLDER).is_dir()


def garments(root: Path, part: str) -> Garments:
    """All images of `train` (60,000) or `t10k` (10,000)."""
    images, labels = (_idx(root / FOLDER / f"{part}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return Garments(images, labels.astype(np.int64))


class Network(nn.Module):
    """Three convolutions and a linear layer, 25,000 weights; takes grey pixels [n, 28, 28], 0..255."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, last in ((1, 16, nn.MaxPool2d(2)), (16, 32, nn.MaxPool2d(2)), (32, FEATURES, nn.Identity())):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), last]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, len(LABELS))

    def pooled(self, pixels: Tensor) -> Tensor:
        """Features before the last layer, [n, `FEATURES`]."""
        maps: Tensor = self.convolutions((pixels.float()[:, None] - 73) / 90)
        return maps.amax(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, [n, classes]."""
        found: Tensor = self.head(self.pooled(pixels))
        return found


def fit(model: Network, seen: Pixels, targets: Ints, *, epochs: int, rate: float, seed: int) -> Network:
    """Train on images uint8 [n, 28, 28], flipped at random; the rate falls to zero. Changes and returns `model`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * -(-len(seen) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    pixels, truth = torch.from_numpy(np.ascontiguousarray(seen)), torch.from_numpy(targets)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(seen), generator=generator).split(_BATCH):
            shown = pixels[rows]
            flipped = torch.rand(len(rows), generator=generator) < 0.5
            shown[flipped] = shown[flipped].flip(2)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shown), truth[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def trained(seen: Pixels, targets: Ints, seed: int) -> Network:
    """A network that learned these images from random weights."""
    torch.manual_seed(seed)
    return fit(Network(), seen, targets, epochs=10, rate=5e-3, seed=seed)


class Learned(NamedTuple):
    """A first version, and which of the training images are what."""

    network: Network
    train: Garments
    validation: Garments
    later: Garments
    """What cameras send later."""


def first_version(root: Path, seed: int) -> Learned:
    """Trained on 3,000 images of a usual day; 1,500 are its validation images. Trained once by this code, then kept."""
    rows = np.random.default_rng(seed).permutation(60_000)
    everything = garments(root, "train")
    train, validation, later = (everything.take(part) for part in (rows[:3000], rows[3000:4500], rows[4500:8500]))
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = CACHE / f"first-{seed}-{code}.pt"
    if path.exists():
        network = Network()
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        network = trained(train.seen("usual"), train.targets, seed)
        save_tensors(path, network.state_dict())
    return Learned(network.eval(), train, validation, later)


@torch.inference_mode()
def logits(model: Network, seen: Pixels) -> Floats:
    """Logits float [n, classes]."""
    return np.concatenate([model(part).double().numpy() for part in _parts(seen)])


@torch.inference_mode()
def features(model: Network, seen: Pixels) -> Floats:
    """Features before the last layer, float [n, `FEATURES`]."""
    return np.concatenate([model.pooled(part).double().numpy() for part in _parts(seen)])


def accuracy(model: Network, seen: Pixels, targets: Ints) -> float:
    """Share of images that are labelled rightly."""
    return float((logits(model, seen).argmax(axis=1) == targets).mean())


def _parts(seen: Pixels) -> tuple[Tensor, ...]:
    return torch.split(torch.from_numpy(np.ascontiguousarray(seen)), 256)


def _idx(path: Path) -> Pixels:
    """An array in MNIST's format (LeCun): two zeros, 8 for uint8, the dimensions' count and lengths, then the bytes."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
