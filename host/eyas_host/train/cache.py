"""The view cache: augmented views of the training pictures with the teacher's answers, made once, read every epoch.

Pictures are read from their files batch by batch and never held in memory: a cache may be larger than the machine.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

from eyas_host.data.split import Split
from eyas_host.data.views import Augmenter, Batch
from eyas_host.errors import StageError
from eyas_host.files import whole, write_bytes
from eyas_host.progress import meter
from eyas_host.recipe import Recipe
from eyas_host.train.loop import pick_device, to_tensor
from eyas_host.train.models import PixelClassifier, move

Half = npt.NDArray[np.float16]


class ViewCache:
    """The views in one folder: `view-N.u8` (raw pixels, uint8 [n, s, s, 3]) and `view-N.npz` (the teacher's answers).

    `logits` is float16 [views, n, classes], `features` float16 [views, n, channels].
    """

    def __init__(self, root: Path) -> None:
        answers = sorted(root.glob("view-*.npz"), key=lambda path: int(path.stem.partition("-")[2]))
        try:
            loaded = [dict(np.load(path)) for path in answers]
            self.logits: Half = np.stack([one["logits"] for one in loaded])
            self.features: Half = np.stack([one["features"] for one in loaded])
            self._files = [path.with_suffix(".u8").open("rb", buffering=0) for path in answers]
            count = self.logits.shape[1]
            sizes = {os.fstat(file.fileno()).st_size for file in self._files}
            self._bytes = sizes.pop() // count
            self._side = math.isqrt(self._bytes // 3)
            if sizes or self._side**2 * 3 != self._bytes:
                raise ValueError("files of different sizes")
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise StageError(
                f"{root}: the cached views cannot be read ({error}); run again with --from distill"
            ) from None

    def __len__(self) -> int:
        """Number of views of each picture."""
        return len(self._files)

    def pixels(self, views: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Batch:
        """Pixels uint8 [batch, s, s, 3] of picture `rows[i]` in view `views[i]`."""
        pieces = (
            os.pread(self._files[view].fileno(), self._bytes, int(row) * self._bytes)
            for view, row in zip(views, rows, strict=True)
        )
        joined = np.frombuffer(bytearray(b"".join(pieces)), dtype=np.uint8)
        return joined.reshape(len(rows), self._side, self._side, 3)

    @classmethod
    def make(cls, root: Path, recipe: Recipe, split: Split, teacher: PixelClassifier) -> ViewCache:
        """Draw the views and ask the teacher; views that a killed run left whole are kept."""
        device = pick_device(recipe.run.device)
        teacher = move(teacher, device).eval()
        augmenter = Augmenter(recipe.augment, recipe.picture.preprocessing())
        with meter("views and the teacher's answers", recipe.student.views) as bar:
            for number in range(recipe.student.views):
                answers = root / f"view-{number}.npz"
                if not answers.exists():
                    pixels = augmenter.views(split.train.pixels, (recipe.run.seed, 5, number))
                    logits, features = _answers(teacher, pixels, device)
                    write_bytes(answers.with_suffix(".u8"), pixels.tobytes())
                    with whole(answers) as temporary, temporary.open("wb") as stream:
                        np.savez(stream, logits=logits, features=features)
                bar.advance()
        return cls(root)


@torch.inference_mode()
def _answers(teacher: PixelClassifier, pixels: Batch, device: torch.device, batch: int = 64) -> tuple[Half, Half]:
    logits, features = [], []
    for start in range(0, len(pixels), batch):
        pooled = teacher.pooled(to_tensor(pixels[start : start + batch], device))
        features.append(pooled.half().cpu())
        logits.append(teacher.classify(pooled).half().cpu())
    return torch.cat(logits).numpy(), torch.cat(features).numpy()
