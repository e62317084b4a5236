"""Intermediate-feature distillation (FitNets): the student's features follow the teacher's.

The teacher's feature maps are cached with the views, as float16 on a grid of at most 8 x 8 cells: 2 bytes x channels x
cells per view (14 kB for 112 channels; the view itself has 49 kB at 128 px). Running the teacher's lower blocks at
every step instead would cost most of its forward pass (docs/training.md has the figures).
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
from torch import Tensor, nn

from eyas_host.data.loader import Rows, ordered_batches
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import FeatureLayer, StudentSection
from eyas_host.support.errors import RecipeError, StageError
from eyas_host.support.files import atomic_write, write_bytes
from eyas_host.support.progress import meter, say
from eyas_host.train.losses import PooledFeatureLoss
from eyas_host.train.precision import fast_gpu_math
from eyas_host.train.view_cache import Half, ViewCache, check_space, read_row

_GRID = 8
"""Maximum side of a cached feature map, cells."""
Shape = tuple[int, int, int]
"""Channels, height and width of a feature map."""


class BlockFeatureLoss(nn.Module):
    """Loss between two feature maps; the student's is pooled to the teacher's grid and projected to its channels.

    `cosine`: one minus the cosine over the channels, averaged over the cells; `mse`: mean squared error. The 1 x 1
    projection exists only during training. Source: Romero et al., "FitNets", 2015.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, loss: str = "cosine") -> None:
        super().__init__()
        self.project = nn.Conv2d(student_channels, teacher_channels, 1)
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of maps [n, student_channels, h, w] and [n, teacher_channels, g, g]."""
        height, width = teacher.shape[-2:]
        projected = self.project(F.adaptive_avg_pool2d(student, (height, width)))
        if self.loss == "mse":
            return F.mse_loss(projected, teacher)
        return (1.0 - F.cosine_similarity(projected, teacher, dim=1)).mean()


class FeatureLoss(nn.Module):
    """Weighted sum of a recipe's feature losses: of the pooled features, and between blocks."""

    def __init__(
        self, model: PixelClassifier, settings: StudentSection, features: int, blocks: BlockCache | None
    ) -> None:
        super().__init__()
        self.pooled_weight = settings.feature_loss
        self.pooled = PooledFeatureLoss(model.pooled_channels, features) if settings.feature_loss else None
        layers = settings.feature_layers if blocks is not None else ()
        shapes = block_shapes(model) if layers else {}
        self.names = [layer.student for layer in layers]
        self.weights = [layer.weight for layer in layers]
        self.blocks = nn.ModuleList(
            BlockFeatureLoss(shapes[layer.student][0], teacher[0], loss=layer.loss)
            for layer, teacher in zip(layers, blocks.shapes if blocks is not None else (), strict=True)
        )

    def forward(
        self, pooled: Tensor, features: Tensor, maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> Tensor:
        """Loss of pooled features [n, channels] and maps [n, channels, h, w] against the teacher's."""
        loss = pooled.new_zeros(())
        if self.pooled is not None:
            loss = loss + self.pooled_weight * self.pooled(pooled, features)
        for block, weight, own, other in zip(self.blocks, self.weights, maps, teacher_maps, strict=True):
            loss = loss + weight * block(own, other)
        return loss


@contextmanager
def capture_maps(model: PixelClassifier, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Capture the feature maps [n, channels, h, w] of blocks during one forward pass, in the order of `names`."""
    captured: dict[str, Tensor] = {}
    backbone = model.backbone

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            captured[name] = _as_map(output, backbone)

        return hook

    maps: list[Tensor] = []
    hooks = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        maps.extend(captured[name] for name in names if name in captured)


def block_shapes(model: PixelClassifier, size: int = 64) -> dict[str, Shape]:
    """Block name (timm's) -> shape of its feature map at an image size, in order from the input.

    A block is a module on the two upper levels of names with two or more layers that have weights.
    """
    names = [
        name
        for name, module in model.backbone.named_modules()
        if name and name.count(".") <= 1 and sum(_has_weights(layer) for layer in module.modules()) > 1
    ]
    parameter = next(model.parameters())
    mode = model.training
    shapes: dict[str, Shape] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                _, channels, height, width = _as_map(output, model.backbone).shape
                shapes[name] = (channels, height, width)

        return hook

    hooks = [model.backbone.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.inference_mode():
            model.eval()(parameter.new_zeros(1, 3, size, size))
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return shapes


def check_feature_layers(
    layers: Sequence[FeatureLayer], teacher: PixelClassifier, student: PixelClassifier, size: int
) -> None:
    """Raise `RecipeError` for an unknown block of student or teacher, listing the known ones."""
    if not layers:
        return
    for role, model in (("student", student), ("teacher", teacher)):
        allowed = block_shapes(model, size)
        for layer in layers:
            name = getattr(layer, role)
            if name not in allowed:
                raise RecipeError(
                    f"[student] feature_layers: the {role} has no block {name!r}; allowed: {', '.join(allowed)}"
                )


class BlockCache:
    """The teacher's feature maps in one folder: `blocks-N.f16`, float16 [n, values of all maps], next to
    `view-N.u8`.
    """

    def __init__(self, root: Path) -> None:
        opened = ExitStack()
        weakref.finalize(self, opened.close)
        try:
            self.shapes = msgspec.json.decode((root / "blocks.json").read_bytes(), type=tuple[Shape, ...])
            paths = sorted(root.glob("blocks-*.f16"), key=lambda path: int(path.stem.partition("-")[2]))
            self._files = [opened.enter_context(path.open("rb", buffering=0)) for path in paths]
            self._bytes = 2 * sum(map(math.prod, self.shapes))
            sizes = {os.fstat(file.fileno()).st_size for file in self._files}
            if len(sizes) != 1 or sizes.pop() % self._bytes:
                raise ValueError("files of different sizes")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StageError(
                f"{root}: the teacher's cached blocks cannot be read ({error}); run again with --from distill"
            ) from None

    def maps(self, views: Rows, rows: Rows) -> list[Half]:
        """The teacher's maps of view `views[i]` of image `rows[i]` for each layer, float16 [batch, channels, g, g]."""
        joined = np.empty((len(rows), self._bytes // 2), dtype=np.float16)
        for target, view, row in zip(joined, views, rows, strict=True):
            read_row(self._files[view], target, int(row))
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        return [
            values.reshape(-1, *shape)
            for values, shape in zip(np.split(joined, ends, axis=1), self.shapes, strict=True)
        ]

    @classmethod
    def make(cls, cache: ViewCache, recipe: Recipe, teacher: PixelClassifier) -> BlockCache:
        """Run the teacher on the cached views; complete files of an interrupted run are kept.

        Raises `StageError` before anything is written if the maps exceed `[student] cache_gb` or the free disk space.
        """
        names = [layer.teacher for layer in recipe.student.feature_layers]
        device = pick_device(recipe.run.device)
        teacher = move(teacher, device).eval()
        known = block_shapes(teacher, recipe.image.size)
        shapes = [(c, min(h, _GRID), min(w, _GRID)) for c, h, w in (known[name] for name in names)]
        count = cache.logits.shape[1]
        paths = [cache.root / f"blocks-{number}.f16" for number in range(len(cache))]
        one = 2 * sum(map(math.prod, shapes))
        missing = [path for path in paths if not path.exists()]
        if missing:
            _check_space(cache, one * count * len(missing), one, recipe.student.cache_gb)
        write_bytes(cache.root / "blocks.json", msgspec.json.encode(shapes))
        batches = ordered_batches(count)
        with fast_gpu_math(device), meter("the teacher's feature maps", len(missing) * len(batches)) as bar:
            for path in missing:
                with atomic_write(path) as temporary, temporary.open("wb") as stream:
                    for rows in batches:
                        stream.write(_encode_maps(teacher, cache, paths.index(path), rows, names, shapes, device))
                        bar.advance()
        return cls(cache.root)


@torch.inference_mode()
def _encode_maps(
    teacher: PixelClassifier,
    cache: ViewCache,
    view: int,
    rows: Rows,
    names: Sequence[str],
    shapes: Sequence[Shape],
    device: torch.device,
) -> bytes:
    """The teacher's maps of some images in the file's format."""
    with capture_maps(teacher, names) as maps:
        teacher(to_tensor(cache.pixels(np.full_like(rows, view), rows), device))
    pooled = [F.adaptive_avg_pool2d(m.float(), shape[1:]).flatten(1) for m, shape in zip(maps, shapes, strict=True)]
    return torch.cat(pooled, dim=1).half().cpu().numpy().tobytes()


def _check_space(cache: ViewCache, needed: int, one: int, cache_gb: float) -> None:
    """Print how much will be written; raises `StageError` if the disk or `cache_gb` have no space for it."""
    size = f"{one / 1e3:.1f} kB per view, {needed / 1e6:,.1f} MB"
    say(f"  the teacher's feature maps: {size} in {escape(str(cache.root))}")
    used = sum(path.stat().st_size for path in cache.root.glob("*-*.*"))
    advice = "take blocks with fewer channels, or fewer [student] views"
    check_space(cache.root, "[student] feature_layers", used, needed, cache_gb, lambda *_: advice)


def _has_weights(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters(recurse=False))


def _as_map(output: Tensor, backbone: Any) -> Tensor:
    """A block's output as [n, channels, h, w], from tokens [n, tokens, channels] or channels-last maps too."""
    if output.ndim == 3:
        tokens = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).reshape(output.shape[0], -1, side, tokens.shape[1] // side)
    return output.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else output
