"""Hints between named blocks: the loss, the blocks' names and maps, the cache, and what a student makes of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from eyas_host.data.index import build_index
from eyas_host.data.split import Split, split_index
from eyas_host.evaluation.inference import to_tensor
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import FeatureLayer, StudentSection, TeacherSection
from eyas_host.support.errors import RecipeError, StageError
from eyas_host.train.check import check_networks
from eyas_host.train.feature_distillation import BlockCache, BlockFeatureLoss, block_shapes, capture_maps
from eyas_host.train.student import DistillationTask, train_student
from eyas_host.train.view_cache import ViewCache

CPU = torch.device("cpu")
LAYERS = (
    FeatureLayer(student="blocks.2", teacher="blocks.4", weight=0.5),
    FeatureLayer(student="blocks.4", teacher="blocks.0", weight=2.0, loss="mse"),
)


# The loss


def projecting(student: int, teacher: int, loss: str) -> BlockFeatureLoss:
    torch.manual_seed(0)
    return BlockFeatureLoss(student, teacher, loss=loss)


def by_loops(
    hint: BlockFeatureLoss, student: torch.Tensor, teacher: torch.Tensor
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The projected student features and the teacher features of each cell."""
    kernel, bias = hint.project.weight.detach().numpy()[:, :, 0, 0], hint.project.bias.detach().numpy()  # type: ignore[union-attr]
    side, cells = student.shape[-1] // teacher.shape[-1], []
    for own, other in zip(student.numpy(), teacher.numpy(), strict=True):
        for y in range(teacher.shape[-1]):
            for x in range(teacher.shape[-1]):
                averaged = own[:, y * side : (y + 1) * side, x * side : (x + 1) * side].mean((1, 2))
                cells.append((kernel @ averaged + bias, other[:, y, x]))
    return cells


def test_the_block_loss_compares_cell_by_cell() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(3, 4, 6, 6, generator=generator), torch.randn(3, 5, 2, 2, generator=generator)
    cosine, square = projecting(4, 5, "cosine"), projecting(4, 5, "mse")
    cells = by_loops(cosine, student, teacher)
    apart = [1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in cells]
    assert float(cosine(student, teacher).detach()) == pytest.approx(np.mean(apart), rel=1e-5)
    assert float(cosine(student, 7 * teacher).detach()) == pytest.approx(np.mean(apart), rel=1e-5)
    squares = np.mean([((a - b) ** 2).mean() for a, b in by_loops(square, student, teacher)])
    assert float(square(student, teacher).detach()) == pytest.approx(squares, rel=1e-5)


def test_a_coarser_student_is_spread_over_the_grid() -> None:
    hint = projecting(2, 2, "mse")
    with torch.no_grad():
        hint.project.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        hint.project.bias.zero_()  # type: ignore[union-attr]
    coarse = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(hint(coarse, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)).detach()) == pytest.approx(0.0)


# Blocks


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("tf_efficientnet_lite0", {"blocks.0": (16, 32, 32), "blocks.4": (112, 4, 4), "blocks.6": (320, 2, 2)}),
        ("resnet18", {"layer1": (64, 16, 16), "layer4.1": (512, 2, 2)}),
        ("vit_tiny_patch16_224", {"blocks.0": (192, 4, 4), "blocks.11": (192, 4, 4)}),
        ("convnext_atto", {"stages.0": (40, 16, 16), "stages.3": (320, 2, 2)}),
        ("densenet121", {"features.denseblock1": (256, 16, 16), "features.transition1": (128, 8, 8)}),
        ("swin_tiny_patch4_window7_224", {"layers.0": (96, 16, 16), "layers.3": (768, 2, 2)}),
    ],
)
def test_blocks_and_the_shapes_of_their_maps(name: str, some: dict[str, tuple[int, int, int]]) -> None:
    shapes = block_shapes(build(name, 3, "random")[0], 64)
    assert some.items() <= shapes.items()
    assert not {"conv_stem", "bn1", "classifier", "head", "fc", "norm"} & shapes.keys()


def test_tokens_become_the_map_of_their_patches() -> None:
    model = build("vit_tiny_patch16_224", 3, "random")[0].eval()
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[:, :, 16:32, 48:64] = 255.0  # the patch in the second row, fourth column
    with torch.inference_mode():
        maps = []
        for image in (pixels, torch.zeros_like(pixels)):
            with capture_maps(model, ["blocks.0"]) as found:
                model(image)
            maps += found
    changed = (maps[0] - maps[1]).norm(dim=1)[0]
    assert changed.shape == (4, 4) and int(changed.argmax()) == 1 * 4 + 3


def with_layers(recipe: Recipe, *layers: FeatureLayer) -> Recipe:
    return msgspec.structs.replace(recipe, student=msgspec.structs.replace(recipe.student, feature_layers=layers))


class Place(NamedTuple):
    recipe: Recipe
    split: Split
    teacher: PixelClassifier


@pytest.fixture(scope="module")
def place(shape_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    recipe = Recipe(
        run=RunSection(name="toy", device="cpu"),
        data=DataSection(path=str(shape_images), limit=30),
        image=ImageSection(size=64),
        teacher=TeacherSection(model="mobilenetv3_small_050", weights="random"),
        student=StudentSection(
            model="mobilenetv3_small_050",
            weights="random",
            views=2,
            epochs=1,
            batch=8,
            feature_loss=0.0,
            ema=0.0,
            feature_layers=LAYERS,
        ),
    )
    data = msgspec.structs.replace(recipe.data, split=(0.6, 0.2, 0.2))
    manifest = split_index(build_index(data), data, 0)
    torch.manual_seed(0)
    teacher = build("mobilenetv3_small_050", 5, "random")[0].eval()
    return Place(recipe, Split(manifest, tmp_path_factory.mktemp("run")), teacher)


@pytest.fixture
def cache(place: Place, tmp_path: Path) -> ViewCache:
    return ViewCache.make(tmp_path, place.recipe, place.split, copy.deepcopy(place.teacher))


def test_a_wrong_name_is_answered_with_the_right_ones(place: Place) -> None:
    assert len(check_networks(place.recipe, 5)) == 2
    wrong = FeatureLayer(student="blocks.2", teacher="block.9")
    with pytest.raises(RecipeError, match=r"the teacher has no block 'block.9'; allowed: .*blocks.0.*blocks.5"):
        check_networks(with_layers(place.recipe, wrong), 5)
    with pytest.raises(RecipeError, match=r"the student has no block 'layer1'; allowed: .*blocks.0"):
        check_networks(with_layers(place.recipe, FeatureLayer(student="layer1", teacher="blocks.2")), 5)


# The cache


def test_cached_maps_are_the_teachers(place: Place, cache: ViewCache, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = BlockCache.make(cache, place.recipe, copy.deepcopy(place.teacher))
    one = 2 * sum(c * h * w for c, h, w in blocks.shapes)
    count = len(place.split.train)
    assert f"{one / 1e3:.1f} kB per view" in capsys.readouterr().err
    assert (cache.root / "blocks-1.f16").stat().st_size == one * count
    rows, views = np.array([3, 0, count - 1]), np.array([1, 0, 1])
    layers = place.teacher.backbone
    with torch.inference_mode():
        x = place.teacher.normalise(to_tensor(cache.pixels(views, rows), CPU))
        x = layers.bn1(layers.conv_stem(x))  # type: ignore[operator]
        after = []
        for block in layers.blocks:  # type: ignore[union-attr]
            x = block(x)  # type: ignore[operator]
            after.append(x)
    got = [torch.from_numpy(m).float() for m in blocks.maps(views, rows)]
    assert [m.shape[1:] for m in got] == [after[4].shape[1:], torch.Size((*after[0].shape[1:2], 8, 8))]
    assert torch.allclose(got[0], after[4], atol=5e-3)
    assert torch.allclose(got[1], nn.functional.avg_pool2d(after[0], after[0].shape[-1] // 8), atol=5e-3)


def test_without_space_nothing_is_written(place: Place, cache: ViewCache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(NamedTuple):
        free: int = 1000

    monkeypatch.setattr("eyas_host.train.view_cache.shutil.disk_usage", lambda _: Full())
    with pytest.raises(
        StageError, match=r"feature_layers need .* GB more and 1e-06 GB are free; take blocks with fewer"
    ):
        BlockCache.make(cache, place.recipe, place.teacher)
    small = msgspec.structs.replace(place.recipe.student, cache_gb=1e-6)
    with pytest.raises(StageError, match="more than cache_gb = 1e-06"):
        BlockCache.make(cache, msgspec.structs.replace(place.recipe, student=small), place.teacher)
    assert not list(cache.root.glob("blocks*"))


def test_what_a_killed_run_left_is_kept_and_damage_is_reported(place: Place, cache: ViewCache) -> None:
    BlockCache.make(cache, place.recipe, copy.deepcopy(place.teacher))
    first, second = cache.root / "blocks-0.f16", cache.root / "blocks-1.f16"
    whole = second.read_bytes()
    second.unlink()
    first.write_bytes(bytes(len(whole)))
    BlockCache.make(cache, place.recipe, copy.deepcopy(place.teacher))
    assert second.read_bytes() == whole and not any(first.read_bytes())
    first.write_bytes(whole[:-4])
    with pytest.raises(StageError, match="--from distill"):
        BlockCache(cache.root)
    (cache.root / "blocks.json").unlink()
    with pytest.raises(StageError, match="--from distill"):
        BlockCache(cache.root)


# The student


def test_a_student_follows_the_teacher_features(place: Place, cache: ViewCache, tmp_path: Path) -> None:
    BlockCache.make(cache, place.recipe, copy.deepcopy(place.teacher))
    settings = msgspec.structs.replace(place.recipe.student, kd_ratio=1.0, temperature=1.0, epochs=10, rate=0.01)
    layers = tuple(msgspec.structs.replace(layer, weight=5.0) for layer in settings.feature_layers)
    recipe = msgspec.structs.replace(place.recipe, student=msgspec.structs.replace(settings, feature_layers=layers))
    _, _, history = train_student(recipe, place.split, cache, tmp_path / "full")
    assert history[-1].loss < 0.75 * history[0].loss
    states = []
    for number, weight in enumerate((5.0, 0.5)):
        weighted = with_layers(recipe, *(msgspec.structs.replace(layer, weight=weight) for layer in layers))
        once = msgspec.structs.replace(weighted, student=msgspec.structs.replace(weighted.student, epochs=1))
        states.append(train_student(once, place.split, cache, tmp_path / str(number))[0].state_dict())
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_without_feature_layers_no_block_cache_is_opened(place: Place, cache: ViewCache) -> None:
    DistillationTask(with_layers(place.recipe), place.split, cache)
    DistillationTask(place.recipe, place.split, cache, teacher=False)
    with pytest.raises(StageError, match="cached blocks cannot be read"):
        DistillationTask(place.recipe, place.split, cache)
