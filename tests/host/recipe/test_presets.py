"""Presets: each writes a recipe that loads, builds its network and takes training steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from eyas_host.cli.app import HELP
from eyas_host.data.class_folders import list_class_folders
from eyas_host.data.first_look import look_at
from eyas_host.models.factory import PixelClassifier, build_student, build_teacher, known_model
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.presets import STUDENTS, TEACHERS, pick
from eyas_host.recipe.scaffold import new_recipe
from eyas_host.recipe.warnings import recipe_warnings
from eyas_host.support.errors import RecipeError
from eyas_host.train.losses import teacher_loss
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze
from tests.support.inside import Done, eyas
from tests.support.shapes import SHAPES, draw_folder

LABELS = torch.tensor([0, 1, 2, 3])
WITHOUT_BATCH_NORM = {"vit_small", "convnext_tiny"}


def preset_recipe(
    images: Path, models: Path, teacher: str = "efficientnet_lite0", student: str = "mobilenetv3_small"
) -> Recipe:
    """The recipe that `eyas new` writes, with random weights, because there may be no hub."""
    networks = TEACHERS[teacher], STUDENTS[student]
    classes = list_class_folders(images).classes
    path = new_recipe(images, classes, models, "toy", *networks, typical=look_at(classes).typical)
    return load_recipe(path, ("teacher.weights=random", "student.weights=random"))


def pixels(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_presets_and_their_help() -> None:
    timms = {one.model for one in TEACHERS.values()} | {one.model for one in STUDENTS.values()}
    assert all(known_model(name) for name in timms)
    page = (HELP / "new.md").read_text()
    for name, preset in (TEACHERS | STUDENTS).items():  # type: ignore[operator]
        assert f"- `{name}`: {preset.why}\n" in page
    lites = {f"tf_efficientnet_lite{n}" for n in range(3)}
    others = {"resnet50", "efficientnet_b3", "densenet201", "vit_small_patch16_224", "convnext_tiny"}
    students = {"mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"}
    assert timms == lites | others | students


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_takes_a_step(name: str, shape_images: Path, tmp_path: Path) -> None:
    recipe = preset_recipe(shape_images, tmp_path, teacher=name)
    assert recipe_warnings(recipe) == []
    settings = recipe.teacher
    assert settings.model == TEACHERS[name].model
    torch.manual_seed(0)
    model, _ = build_teacher(settings, 4)
    check_pooled_and_classify(model)
    assert (name in WITHOUT_BATCH_NORM) == (not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()))

    groups = unfreeze(model, settings)
    scales = [group["lr_scale"] for group in groups]
    assert max(scales) == 1.0 and min(scales) > 0.01  # type: ignore[type-var, operator]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert bool(frozen) == (settings.unfreeze != "all")
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for group in groups:
        group["lr"] = settings.rate * group["lr_scale"]  # type: ignore[operator]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    freeze_batch_norm(model)
    loss = teacher_loss(recipe, LABELS, 4)(model(pixels()), LABELS)
    loss.backward()
    optimizer.step()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= trained and all(model.get_parameter(key).grad is not None for key in trained)
    assert {f"backbone.{key}" for key in head_of(model)} <= moved
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def head_of(model: PixelClassifier) -> set[str]:
    """Names of the classifier's parameters in the backbone."""
    own = {id(parameter) for parameter in model.classifier.parameters()}
    return {name for name, parameter in model.backbone.named_parameters() if id(parameter) in own}


def check_pooled_and_classify(model: PixelClassifier) -> None:
    with torch.inference_mode():
        model.eval()
        pooled = model.pooled(pixels())
        assert pooled.shape == (4, model.pooled_channels)
        assert torch.allclose(model.classify(pooled), model(pixels()), atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_takes_a_step(name: str, shape_images: Path, tmp_path: Path) -> None:
    recipe = preset_recipe(shape_images, tmp_path, student=name)
    assert recipe_warnings(recipe) == [] and recipe.student.model == STUDENTS[name].model
    model, _ = build_student(recipe.student, 4)
    check_pooled_and_classify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.student.rate)
    losses = []
    model.train()
    for _ in range(4):
        losses.append(nn.functional.cross_entropy(model(pixels()), LABELS))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < float(losses[0].detach())


@pytest.mark.parametrize(
    ("side", "teacher", "size"),
    [(256, "vit_small", 224), (256, "efficientnet_b3", 160), (256, "resnet50", 128), (150, "vit_small", 128)],
)
def test_image_size_follows_the_teacher(side: int, teacher: str, size: int, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", count=2, width=side, height=side + 10, labels=SHAPES[:2])
    assert preset_recipe(tmp_path / "images", tmp_path, teacher=teacher).image.size == size


def test_a_network_by_short_name_or_by_timms() -> None:
    assert pick(TEACHERS, "vit_small") is pick(TEACHERS, "vit_small_patch16_224")
    with pytest.raises(RecipeError, match=r"'resnet5': not a preset; did you mean 'resnet50'\? allowed: eff"):
        pick(TEACHERS, "resnet5")
    with pytest.raises(RecipeError, match=r"'zzz': not a preset; allowed: mobilenetv3_small, "):
        pick(STUDENTS, "zzz")


def test_through_the_command_line(shape_images: Path, tmp_path: Path) -> None:
    def new(*more: str) -> Done:
        return eyas(tmp_path, "new", shape_images, "--name", "toy", *more)

    wrong = new("--teacher", "resnet5")
    assert wrong.code == 2 and wrong.err.startswith("eyas: 'resnet5': not a preset")
    assert "Traceback" not in wrong.err and not (tmp_path / "models").exists()
    done = new("--teacher", "resnet50", "--student", "mobilenetv4_conv_small")
    assert done.code == 0, done.err
    recipe = load_recipe(tmp_path / "models/toy/recipe.toml")
    assert (recipe.teacher.model, recipe.student.model) == ("resnet50", "mobilenetv4_conv_small")
    assert (recipe.teacher.rate, recipe.teacher.layer_decay) == (3e-4, 0.85)
