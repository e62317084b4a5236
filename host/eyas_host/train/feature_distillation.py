"""Hints: what the student's inner layers are to tell, which the teacher's tell already.

Those between blocks compare maps. The teacher's are cached beside the views, as float16 on a grid of at most 8 x 8
cells: 2 bytes x channels x cells a view (14 kB for 112 channels; the view itself has 49 kB at 128 px), written once.
Running the teacher's lower part at every step instead would cost most of its forward pass again, and with it what
caching the views is for (docs/training.md has the figures).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas_host.data.loader import Rows, ordered_batches
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import FeatureLayer, StudentSection
from eyas_host.support.errors import RecipeError, StageError
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.progress import meter, say
from eyas_host.train.losses import FeatureHint
from eyas_host.train.view_cache import ViewCache

_GRID = 8
"""Cells a side of a cached map, at most."""
Shape = tuple[int, int, int]
"""Channels, height and width of a map."""


class BlockHint(nn.Module):
    """The distance of a student's map, averaged to the teacher's grid and projected to its channels by a 1 x 1 kernel.

    `cosine`: one minus the cosine over the channels, cell by cell; `mse`: the mean square. The projection lives only
    during training. Source: Romero et al., "FitNets", 2015.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, loss: str = "cosine") -> None:
        super().__init__()
        self.project = nn.Conv2d(student_channels, teacher_channels, 1)
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of maps [n, student_channels, h, w] and [n, teacher_channels, g, g]."""
        height, width = teacher.shape[-2:]
        told = self.project(F.adaptive_avg_pool2d(student, (height, width)))
        if self.loss == "mse":
            return F.mse_loss(told, teacher)
        return (1.0 - F.cosine_similarity(told, teacher, dim=1)).mean()


class Hints(nn.Module):
    """All hints of a recipe with their weights: of the pooled features, and between blocks."""

    def __init__(
        self, model: PixelClassifier, settings: StudentSection, features: int, blocks: BlockCache | None
    ) -> None:
        super().__init__()
        self.pooled_weight = settings.feature_loss
        self.pooled = FeatureHint(model.pooled_channels, features) if settings.feature_loss else None
        hints = settings.feature_layers if blocks is not None else ()
        shapes = block_shapes(model) if hints else {}
        self.names = [hint.student for hint in hints]
        self.weights = [hint.weight for hint in hints]
        self.blocks = nn.ModuleList(
            BlockHint(shapes[hint.student][0], wanted[0], loss=hint.loss)
            for hint, wanted in zip(hints, blocks.shapes if blocks is not None else (), strict=True)
        )

    def forward(self, pooled: Tensor, features: Tensor, maps: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """The weighted sum for pooled features [n, channels] and maps [n, channels, h, w], the student's first."""
        loss = pooled.new_zeros(())
        if self.pooled is not None:
            loss = loss + self.pooled_weight * self.pooled(pooled, features)
        for hint, weight, own, other in zip(self.blocks, self.weights, maps, wanted, strict=True):
            loss = loss + weight * hint(own, other)
        return loss


@contextmanager
def maps_of(model: PixelClassifier, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Gather the maps [n, channels, h, w] of blocks during one forward pass, in the order of `names`."""
    found: dict[str, Tensor] = {}
    backbone = model.backbone

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[name] = _as_map(output, backbone)

        return hook

    maps: list[Tensor] = []
    hooks = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        maps.extend(found[name] for name in names if name in found)


def block_shapes(model: PixelClassifier, size: int = 64) -> dict[str, Shape]:
    """Blocks of a network by timm's names, from the input on, with the shape of their maps at an image's size.

    A block is a part with two or more layers that have weights, on the two upper levels of names.
    """
    names = [
        name
        for name, module in model.backbone.named_modules()
        if name and name.count(".") <= 1 and sum(_has_weights(layer) for layer in module.modules()) > 1
    ]
    parameter = next(model.parameters())
    mode = model.training
    found: dict[str, Shape] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                _, channels, height, width = _as_map(output, model.backbone).shape
                found[name] = (channels, height, width)

        return hook

    hooks = [model.backbone.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.inference_mode():
            model.eval()(parameter.new_zeros(1, 3, size, size))
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return found


def check_feature_layers(
    hints: Sequence[FeatureLayer], teacher: PixelClassifier, student: PixelClassifier, size: int
) -> None:
    """Raises `RecipeError` for a block that student or teacher do not have, with those that they have."""
    if not hints:
        return
    for role, model in (("student", student), ("teacher", teacher)):
        allowed = block_shapes(model, size)
        for hint in hints:
            name = getattr(hint, role)
            if name not in allowed:
                raise RecipeError(
                    f"[student] feature_layers: the {role} has no block {name!r}; allowed: {', '.join(allowed)}"
                )


class BlockCache:
    """The teacher's maps in one folder: `blocks-N.f16`, float16 [n, all maps' values], beside `view-N.u8`."""

    def __init__(self, root: Path) -> None:
        try:
            self.shapes = msgspec.json.decode((root / "blocks.json").read_bytes(), type=tuple[Shape, ...])
            paths = sorted(root.glob("blocks-*.f16"), key=lambda path: int(path.stem.partition("-")[2]))
            self._files = [path.open("rb", buffering=0) for path in paths]
            self._bytes = 2 * sum(map(math.prod, self.shapes))
            sizes = {os.fstat(file.fileno()).st_size for file in self._files}
            if len(sizes) != 1 or sizes.pop() % self._bytes:
                raise ValueError("files of different sizes")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StageError(
                f"{root}: the teacher's cached blocks cannot be read ({error}); run again with --from distill"
            ) from None

    def maps(self, views: Rows, rows: Rows) -> list[Tensor]:
        """For each hint the teacher's maps of image `rows[i]` in view `views[i]`, float32 [batch, channels, g, g]."""
        pieces = [
            os.pread(self._files[view].fileno(), self._bytes, int(row) * self._bytes)
            for view, row in zip(views, rows, strict=True)
        ]
        joined = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float16).view(len(rows), -1)
        parts = torch.split(joined, [math.prod(shape) for shape in self.shapes], dim=1)
        return [part.reshape(-1, *shape).float() for part, shape in zip(parts, self.shapes, strict=True)]

    @classmethod
    def make(cls, cache: ViewCache, recipe: Recipe, teacher: PixelClassifier) -> BlockCache:
        """Ask the teacher again about the cached views; what a killed run left whole is kept.

        Raises `StageError` before anything is written if the disk or `[student] cache_gb` have no room for it.
        """
        names = [hint.teacher for hint in recipe.student.feature_layers]
        device = pick_device(recipe.run.device)
        teacher = move(teacher, device).eval()
        found = block_shapes(teacher, recipe.image.size)
        shapes = [(c, min(h, _GRID), min(w, _GRID)) for c, h, w in (found[name] for name in names)]
        count = cache.logits.shape[1]
        paths = [cache.root / f"blocks-{number}.f16" for number in range(len(cache))]
        one = 2 * sum(map(math.prod, shapes))
        missing = [path for path in paths if not path.exists()]
        _room(cache, one * count * len(missing), one, recipe.student.cache_gb)
        write_bytes(cache.root / "blocks.json", msgspec.json.encode(shapes))
        turns = ordered_batches(count)
        with meter("the teacher's blocks", len(missing) * len(turns)) as bar:
            for path in missing:
                with atomic_write(path) as temporary, temporary.open("wb") as stream:
                    for rows in turns:
                        stream.write(_flat(teacher, cache, paths.index(path), rows, names, shapes, device))
                        bar.advance()
        return cls(cache.root)


@torch.inference_mode()
def _flat(
    teacher: PixelClassifier,
    cache: ViewCache,
    view: int,
    rows: Rows,
    names: Sequence[str],
    shapes: Sequence[Shape],
    device: torch.device,
) -> bytes:
    """The teacher's maps of some images as they are stored."""
    with maps_of(teacher, names) as maps:
        teacher(to_tensor(cache.pixels(np.full_like(rows, view), rows), device))
    pooled = [F.adaptive_avg_pool2d(m.float(), shape[1:]).flatten(1) for m, shape in zip(maps, shapes, strict=True)]
    return torch.cat(pooled, dim=1).half().cpu().numpy().tobytes()


def _room(cache: ViewCache, needed: int, one: int, gigabytes: float) -> None:
    """Say what will be written; raises `StageError` if the disk or `cache_gb` have no room for it."""
    if not needed:
        return
    say(f"  the teacher's blocks: {one / 1e3:.1f} kB a view of an image, {needed / 1e6:,.1f} MB in {cache.root}")
    free = shutil.disk_usage(cache.root).free
    used = sum(path.stat().st_size for path in cache.root.glob("*-*.*"))
    less = "take blocks with fewer channels, or fewer [student] views"
    if gigabytes and used + needed > gigabytes * 1e9:
        raise StageError(
            f"[student] feature_layers need {needed / 1e9:.2f} GB beside {used / 1e9:.2f} GB of views, together more "
            f"than cache_gb = {gigabytes:g}; {less}, or raise cache_gb"
        )
    if needed > free:
        raise StageError(
            f"{cache.root}: [student] feature_layers need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {less}"
        )


def _has_weights(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters(recurse=False))


def _as_map(output: Tensor, backbone: Any) -> Tensor:
    """A block's output as [n, channels, h, w]: transformers' tokens lie in rows, some networks put channels last."""
    if output.ndim == 3:
        tokens = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).reshape(output.shape[0], -1, side, tokens.shape[1] // side)
    return output.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else output
