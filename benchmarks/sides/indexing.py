"""Memory of a long table, in a process of its own: `python indexing.py FOLDER COUNT` writes one line of JSON.

COUNT small images are drawn into FOLDER, listed in a table, indexed and divided; then a tiny network sees each
training image once. `*_mb` are peaks of resident memory since the process began.
"""

import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from eyas_host.data import dataset
from eyas_host.data.index import build_index
from eyas_host.data.loader import BatchLoader, ordered_batches
from eyas_host.data.split import split_index
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection

_KEPT = 16 << 20  # a set of this size would else be kept decoded, which is bounded but fills up slowly


def main(folder: Path, count: int) -> None:
    """Draw, index, divide, train; print."""
    table = draw(folder, count)
    torch.set_num_threads(1)
    dataset.MAX_CACHED_BYTES = _KEPT
    recipe = Recipe(
        run=RunSection(name="memory", device="cpu", workers=0),
        data=DataSection(source="csv", path=str(table)),
        image=ImageSection(size=32),
    )
    figures = {"images": count, "before_mb": _peak_mb()}
    started = time.perf_counter()
    index = build_index(recipe.data)
    figures |= {"index_s": time.perf_counter() - started, "index_mb": _peak_mb()}
    started = time.perf_counter()
    manifest = split_index(index, recipe.data, 0)
    figures |= {"split_s": time.perf_counter() - started, "split_mb": _peak_mb()}
    train = dataset.ImageDataset(manifest.train, manifest.labels, recipe.image.preprocessing())
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2)
    )
    targets = torch.from_numpy(train.targets)
    batches = ordered_batches(len(train), 32)
    optimizer = None
    for rows, views in zip(batches, BatchLoader(recipe, train).views(batches, (0, 1)), strict=True):
        loss = torch.nn.functional.cross_entropy(
            network(torch.from_numpy(views).permute(0, 3, 1, 2).float()), targets[rows]
        )
        optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(json.dumps(figures | {"epoch_mb": _peak_mb()}))


def draw(folder: Path, count: int) -> Path:
    """`count` different images of 48 x 48 pixels, JPEG, and their table."""
    lines = ["path,label"]
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(coarse, (48, 48), interpolation=cv2.INTER_CUBIC))
        lines.append(f"{path.relative_to(folder)},{'good' if number % 2 else 'bad'}")
    table = folder / f"{count}.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _peak_mb() -> float:
    """Linux's VmHWM: `ru_maxrss` begins with what the parent had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
