"""What the host's tests share: quiet libraries, one thread, folders of drawn shapes, and a small seeded network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eyas_host.quiet import quiet_libraries

quiet_libraries()

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import pytest  # noqa: E402
import skimage.data  # noqa: E402
import torch  # noqa: E402

from eyas_host.compress.fold import DeployModel, fold_for_deployment  # noqa: E402
from eyas_host.compress.qat import prepare_qat  # noqa: E402
from eyas_host.train.models import PixelClassifier, build  # noqa: E402

torch.set_num_threads(1)

SHAPES = ("circle", "cross", "ring", "square", "triangle")
_BACKGROUNDS = ("astronaut", "coffee", "chelsea", "cat")

Pixels = npt.NDArray[np.uint8]
DrawShape = Callable[..., Pixels]
MakePictures = Callable[..., Path]


def _draw_shape(label: str, seed: int, width: int = 96, height: int = 80) -> Pixels:
    """A shape in a colour of its own on a piece of a photograph, uint8 [height, width, 3] BGR."""
    rng = np.random.default_rng((SHAPES.index(label), seed))
    photograph = getattr(skimage.data, _BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))])()[..., ::-1]
    top = int(rng.integers(photograph.shape[0] - height + 1))
    left = int(rng.integers(photograph.shape[1] - width + 1))
    picture = np.ascontiguousarray(photograph[top : top + height, left : left + width])
    radius = int(min(width, height) * rng.uniform(0.25, 0.4))
    x, y = width // 2 + int(rng.integers(-4, 5)), height // 2 + int(rng.integers(-4, 5))
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    if label == "circle":
        cv2.circle(picture, (x, y), radius, colour, -1, cv2.LINE_AA)
    elif label == "ring":
        cv2.circle(picture, (x, y), radius, colour, max(2, radius // 4), cv2.LINE_AA)
    elif label == "square":
        cv2.rectangle(picture, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    elif label == "triangle":
        corners = np.array([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)])
        cv2.fillPoly(picture, [corners], colour, cv2.LINE_AA)
    else:
        for side in (-1, 1):
            ends = (x - radius, y - side * radius), (x + radius, y + side * radius)
            cv2.line(picture, *ends, colour, max(2, radius // 3), cv2.LINE_AA)
    return picture


@pytest.fixture(scope="session")
def draw_shape() -> DrawShape:
    """Draws one picture: `draw_shape(label, seed, width, height)`."""
    return _draw_shape


@pytest.fixture(scope="session")
def make_pictures() -> MakePictures:
    """Fills a folder with class folders: `make_pictures(root, count=12, width=96, height=80, labels=SHAPES)`."""

    def make(
        root: Path, *, count: int = 12, width: int = 96, height: int = 80, labels: tuple[str, ...] = SHAPES
    ) -> Path:
        for label in labels:
            (root / label).mkdir(parents=True, exist_ok=True)
            for seed in range(count):
                path = root / label / f"{seed:03d}{'.jpg' if seed % 2 else '.png'}"
                assert cv2.imwrite(str(path), _draw_shape(label, seed, width, height))
        return root

    return make


@pytest.fixture(scope="session")
def shape_pictures(tmp_path_factory: pytest.TempPathFactory, make_pictures: MakePictures) -> Path:
    """Five classes of drawn shapes, twelve pictures each, PNG and JPEG. Not to be changed by a test."""
    return make_pictures(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def shape_frames() -> Pixels:
    """Twenty prepared pictures of shapes, uint8 [20, 64, 64, 3]."""
    return np.stack([_draw_shape(label, 100 + seed, 64, 64) for label in SHAPES for seed in range(4)])


@pytest.fixture(scope="session")
def network(shape_frames: Pixels) -> PixelClassifier:
    """A seeded mobilenetv3_small_100 for five classes whose BatchNorm has seen pictures and whose answers differ."""
    torch.manual_seed(0)
    model, _ = build("mobilenetv3_small_100", len(SHAPES), "random")
    pixels = torch.from_numpy(shape_frames).permute(0, 3, 1, 2)
    targets = torch.arange(len(SHAPES)).repeat_interleave(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(pixels), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            model(pixels)
        for parameter in model.classifier.parameters():
            parameter.mul_(0.3)  # sure answers hide differences, very sure ones exaggerate them
    return model.eval()


@pytest.fixture(scope="session")
def deploy(network: PixelClassifier) -> DeployModel:
    """The folded network. Not to be changed by a test."""
    return fold_for_deployment(network)


@pytest.fixture(scope="session")
def calibration(shape_frames: Pixels) -> list[torch.Tensor]:
    """Ten pictures, float [1, 3, 64, 64]."""
    return [torch.from_numpy(frame).permute(2, 0, 1)[None].float() for frame in shape_frames[::2]]


@pytest.fixture(scope="session")
def quantized(deploy: DeployModel, calibration: list[torch.Tensor]) -> torch.nn.Module:
    """The folded network with its int8 grid. Not to be changed by a test."""
    return prepare_qat(deploy, calibration, input_size=64).eval()
