"""What the proof with other readers shares: real bundles, tiny models, and what each reader answered."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import flatbuffers
import msgspec
import numpy as np
import pytest
import torch
from ai_edge_litert.schema_py_generated import ModelT
from packaging.requirements import Requirement

from eyas_device.bundle import MANIFEST, Precision
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat
from tests.arm.drawn import Variant, write_bundle
from tests.support import tiny
from tests.support.device_fixtures import weights  # noqa: F401 - a fixture
from tests.support.host_fixtures import calibration, shape_frames  # noqa: F401 - fixtures
from tests.support.networks import briefly_trained
from tests.support.proofs import tell, teller, unless_named
from tests.support.shapes import SHAPES, draw_shape
from tests.support.system_parts import unavailable

from .answers import Found, Job, find

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VENVS = ROOT / ".readers"
LIMIT_S = 300
"""A reader takes 10 to 30 s, most of it TensorFlow's import; the processor may be shared."""
SIZE, DRAWN_FRAMES = 64, 12
TINY = ("float32", "int8", "uint8")
_TRAINED = ROOT / "runs/solar-cells/bundle"
_NAMED = os.environ.get("READERS_BUNDLE") or (str(_TRAINED) if (_TRAINED / MANIFEST).is_file() else "")


class Drawn(NamedTuple):
    """A network that is trained for seconds, and how it becomes a bundle."""

    first: Literal["packaged", "random"]
    """Its weights before."""
    temperature: float
    """That makes its answers neither flat nor sure."""
    precisions: tuple[Precision, ...]


DRAWN = {
    "mobilenetv3_small_100": Drawn("random", 2.0, ("fp32", "int8", "int16")),
    "tf_efficientnet_lite0": Drawn("packaged", 0.3, ("fp32", "int8")),
}
"""Between them they have every operation that is compiled."""
BUNDLES = (*DRAWN, *(["named"] if _NAMED else []))


@dataclass(frozen=True)
class Reader:
    """A library that reads `.tflite` files, in a virtual environment of its own."""

    extra: str
    """Of eyas-device, and the environment's name below `.readers/`."""
    library: str
    constraints: str

    def __str__(self) -> str:
        return self.library

    @property
    def pins(self) -> dict[str, str]:
        """Package -> version of the constraints file."""
        lines = (ROOT / "constraints" / self.constraints).read_text(encoding="utf-8").splitlines()
        parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
        kept = [pin for pin in parsed if pin.marker is None or pin.marker.evaluate({"python_version": "3.11"})]
        return {pin.name: str(pin.specifier).removeprefix("==") for pin in kept}

    def find(self, job: Job) -> Found:
        """What it answers."""
        command = [VENVS / self.extra / "bin/python", HERE / "answers.py"]
        done = subprocess.run(
            command, input=msgspec.json.encode(job), capture_output=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return msgspec.json.decode(done.stdout, type=Found)


READERS = (
    Reader("tflite", "tflite-runtime", "device-numpy1.txt"),
    Reader("tensorflow", "tensorflow", "tensorflow.txt"),
)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only `make test-readers`, which names this folder, runs these tests: they need environments of their own."""
    return unless_named(HERE, config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    tell(terminalreporter, "other readers of .tflite files beside LiteRT")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary."""
    return teller(request.node)


@pytest.fixture(scope="session")
def bundles(
    shape_frames: np.ndarray,  # noqa: F811
    calibration: list[torch.Tensor],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Drawn ones of two networks, and READERS_BUNDLE or what `make distill` left."""
    folder = tmp_path_factory.mktemp("bundles")
    found = {"named": str(Path(_NAMED).resolve())} if _NAMED else {}
    for name, drawn in DRAWN.items():
        deploy = fold_for_deployment(briefly_trained(name, shape_frames, drawn.first))
        int8 = prepare_qat(deploy, calibration, input_size=SIZE).eval()
        variants: list[Variant] = [("litert", precision) for precision in drawn.precisions]
        root = write_bundle(folder / name, deploy, int8, size=SIZE, variants=variants, temperature=drawn.temperature)
        found[name] = str(root)
    return found


@pytest.fixture(scope="session")
def noise() -> np.ndarray:
    """An image with every pixel value, uint8 [16, 16, 3]."""
    rng = np.random.default_rng(5)
    values = np.resize(np.arange(256, dtype=np.uint8), tiny.INPUTS)
    return rng.permutation(values).reshape(tiny.SPEC.size, tiny.SPEC.size, 3)


@pytest.fixture(scope="session")
def job(
    bundles: dict[str, str],
    weights: tuple[tiny.Floats, tiny.Floats],  # noqa: F811
    noise: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """What every reader is asked; the runtime is LiteRT."""
    folder = tmp_path_factory.mktemp("job")
    np.save(folder / "frames.npy", [draw_shape(label, 900 + n) for label in SHAPES for n in range(DRAWN_FRAMES)])
    np.save(folder / "noise.npy", noise)
    for kind in TINY:
        tiny.write_tflite(folder / f"{kind}.tflite", *weights, kind=kind)
    tiny.write_tflite(folder / "large.tflite", np.tile(weights[0], 4), weights[1], size=2 * tiny.SPEC.size)
    (folder / "newer.tflite").write_bytes(_of_the_future((folder / "float32.tflite").read_bytes()))
    (folder / "text.tflite").write_bytes(b"no model, but long enough to look at " * 10)
    return Job(
        runtime="litert",
        bundles=bundles,
        frames=str(folder / "frames.npy"),
        tiny={kind: str(folder / f"{kind}.tflite") for kind in TINY},
        pixels=str(folder / "noise.npy"),
        classes=tiny.CLASSES,
        unreadable={name: str(folder / f"{name}.tflite") for name in ("large", "newer", "text")},
    )


@pytest.fixture(scope="session")
def here(job: Job) -> Found:
    """What LiteRT answers."""
    return find(job)


@pytest.fixture(scope="session", params=READERS, ids=str)
def reader(request: pytest.FixtureRequest) -> Reader:
    """One after the other. Skips where it is not installed, but fails on continuous integration."""
    wanted: Reader = request.param
    if not (VENVS / wanted.extra / ".installed").exists():
        unavailable(f"{wanted.library} is not installed in {VENVS / wanted.extra}; `make test-readers` says why")
    return wanted


@pytest.fixture(scope="session")
def there(reader: Reader, job: Job) -> Found:
    """What the reader answers."""
    return reader.find(msgspec.structs.replace(job, runtime="tflite"))


def _of_the_future(content: bytes) -> bytes:
    """The same model with operators of a version that no reader knows."""
    model = ModelT.InitFromPackedBuf(content, 0)
    for code in model.operatorCodes:
        code.version = 99
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
