"""Images of 12 megapixels: the chain's memory, and what a view costs beside decoding its image."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from eyas_device.bundle import sha256
from eyas_device.preprocess import decode
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.loader import BatchLoader, ordered_batches
from eyas_host.data.sources import LabelledImage
from eyas_host.data.transforms import Augmenter
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.files import write_bytes

_WIDTH, _HEIGHT = 4000, 3000
_SAMPLE_S = 0.5
_SHORT = {
    "run.device": "cpu",
    "teacher.head_epochs": "1",
    "teacher.epochs": "1",
    "teacher.batch": "8",
    "student.labels_only": "false",
    "student.views": "1",
    "student.epochs": "1",
    "student.batch": "8",
    "prune.epochs": "1",
    "quantize.epochs": "1",
    "quantize.calibration": "32",
    "gate.min_agreement": "0.5",
    "gate.max_dp": "0.5",
    "gate.max_drop": "1.0",
}
"""One epoch of everything: memory does not depend on how long a stage takes."""


def draw(folder: Path, count: int, *, width: int = _WIDTH, height: int = _HEIGHT) -> Path:
    """`count` different JPEGs in two classes below `folder`; those that are there stay."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:05d}.jpg"
        if not path.exists():
            rng = np.random.default_rng(number)
            coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            coarse[..., number % 2] //= 4  # the classes differ in colour
            image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            noise = np.resize(rng.integers(0, 24, (977, 3), dtype=np.uint8), image.shape)
            write_bytes(path, cv2.imencode(".jpg", cv2.add(image, noise))[1].tobytes())
    return folder


class Memory(NamedTuple):
    """Memory of a chain, MB."""

    peak: float
    """Of all its processes together, a page that several share counted once (PSS); sampled."""
    stages: dict[str, float]
    """Stage -> peak as the run records it, pages of files counted once."""


def chain_memory(work: Path, count: int, *, size: int = 128) -> Memory:
    """Memory of `eyas distill` over `count` images, in a process of its own and without stages of an earlier run."""
    images = draw(work / "images", count)
    recipe = work / "recipe.toml"
    name = f"large-{count}"
    write_bytes(recipe, f'[run]\nname = "{name}"\n[data]\npath = "{images.resolve()}"\n'.encode())
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("eyas")), "distill", str(recipe), "--runs", str(work / "runs")]
    for key, value in (_SHORT | {"image.size": str(size)}).items():
        command += ["--set", f"{key}={value}"]
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as chain:
        while chain.poll() is None:
            peak = max(peak, _tree_mb(chain.pid))
            time.sleep(_SAMPLE_S)
    if chain.returncode:
        raise subprocess.CalledProcessError(chain.returncode, command)
    report = json.loads((work / "runs" / name / "report.json").read_bytes())
    return Memory(peak, {stage["name"]: stage["peak_rss_mb"] for stage in report["stages"]})


def _tree_mb(pid: int) -> float:
    """Proportional set size of a process and all its descendants, MB; 0 for one that has ended."""
    root = Path(f"/proc/{pid}")
    try:
        lines = (root / "smaps_rollup").read_text(encoding="ascii").splitlines()
        own = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
        children = [
            child for task in root.glob("task/*/children") for child in task.read_text(encoding="ascii").split()
        ]
    except (OSError, StopIteration):
        return 0.0
    return own + sum(_tree_mb(int(child)) for child in children)


def view_times(work: Path, views: int = 12) -> tuple[list[float], list[float]]:
    """Milliseconds to decode a 12-megapixel JPEG, and to decode it and draw an augmented view; in turns."""
    data = [path.read_bytes() for path in sorted(draw(work / "images", 4).glob("*/*.jpg"))[:4]]
    recipe = Recipe(run=RunSection(name="views"), augment=AugmentSection(rotate_degrees=10.0))
    spec = recipe.image.preprocessing()
    augmenter = Augmenter(recipe.augment, spec)
    decoding: list[float] = []
    drawing: list[float] = []
    for number in range(views + 1):
        encoded = data[number % len(data)]
        started = time.perf_counter()
        pixels = decode(encoded, spec=spec)
        decoded = time.perf_counter()
        augmenter.view(pixels, np.random.default_rng(number))
        drawn = time.perf_counter()
        if number:  # the first one allocates
            decoding.append(1000 * (decoded - started))
            drawing.append(1000 * (drawn - started))
    return drawing, decoding


def loader_rate(work: Path, count: int, *, width: int = 640, height: int = 480) -> float:
    """Augmented views a second from JPEGs, with the default number of workers; the first epoch, nothing cached."""
    paths = sorted(draw(work / f"loader-{width}", count, width=width, height=height).glob("*/*.jpg"))[:count]
    images = [LabelledImage(path=str(path), label=path.parent.name, sha256=sha256(path)) for path in paths]
    recipe = Recipe(run=RunSection(name="loader", device="cpu"))
    dataset = ImageDataset(images, ("a", "b"), recipe.image.preprocessing())
    batches = ordered_batches(count, 32)
    started = time.perf_counter()
    for _ in BatchLoader(recipe, dataset).views(batches, (0, 1)):
        pass
    return count / (time.perf_counter() - started)
