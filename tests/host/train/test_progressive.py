"""Progressive resizing: which epochs see smaller images, what that costs, and that validation never does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eyas_host.data.index import build_index
from eyas_host.data.split import Split, split_index
from eyas_host.models.factory import PixelClassifier
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.errors import RecipeError
from eyas_host.train.check import check_networks
from eyas_host.train.progressive import cost, resized, side_of, small_side
from eyas_host.train.student import DistillationTask, build_student, train_student
from eyas_host.train.teacher import train_teacher
from eyas_host.train.view_cache import ViewCache
from tests.support.toy_training import Toy


@given(st.floats(0, 0.9), st.integers(1, 60), st.integers(1, 40).map(lambda n: 32 * n))
def test_small_images_come_first_and_never_last(fraction: float, epochs: int, size: int) -> None:
    sides = [side_of(epoch, fraction, epochs, size) for epoch in range(epochs)]
    assert sides == sorted(sides) and sides[-1] == size
    assert sum(side < size for side in sides) <= fraction * epochs
    assert cost(fraction, epochs, size) == pytest.approx(np.mean(sides) / size)


@pytest.mark.parametrize(("size", "small"), [(32, 16), (64, 48), (96, 64), (128, 96), (160, 112), (224, 160)])
def test_three_quarters_of_the_side(size: int, small: int) -> None:
    assert small_side(size) == small


def test_smaller_pixels_are_means_of_the_larger() -> None:
    """Of halves: the triangle of an antialiased bilinear filter has the weights 1, 3, 3, 1."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    rows = np.stack([np.convolve(row, [1, 3, 3, 1]) / 8 for row in pixels.numpy().reshape(-1, 16).astype(float)])
    halved = rows[:, 4:-3:2].reshape(2, 3, 16, -1)
    both = np.apply_along_axis(lambda line: (np.convolve(line, [1, 3, 3, 1]) / 8)[4:-3:2], 2, halved)
    got = resized(pixels.contiguous(memory_format=torch.channels_last), 8)
    assert np.allclose(got.numpy()[:, :, 1:-1, 1:-1], both, atol=1e-3)
    assert resized(pixels, 16) is pixels


@pytest.fixture(scope="module")
def split(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Split:
    manifest = split_index(build_index(recipe.data), recipe.data, 0)
    return Split(manifest, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recipe(shape_images: Path) -> Recipe:
    return Recipe(
        run=RunSection(name="toy", device="cpu"),
        data=DataSection(path=str(shape_images), limit=30, split=(0.6, 0.2, 0.2)),
        image=ImageSection(size=64),
        teacher=TeacherSection(
            model="mobilenetv3_small_050", weights="random", head_epochs=1, epochs=4, progressive=0.5
        ),
        student=StudentSection(
            model="mobilenetv3_small_050", weights="random", views=1, epochs=3, batch=8, progressive=0.4
        ),
    )


@contextmanager
def seen_sides() -> Iterator[tuple[list[int], list[int]]]:
    """Sides of the batches that a network is trained on, and of those that it only predicts."""
    trained: list[int] = []
    predicted: list[int] = []
    normalise: Callable[[PixelClassifier, torch.Tensor], torch.Tensor] = PixelClassifier.normalise

    def spy(model: PixelClassifier, pixels: torch.Tensor) -> torch.Tensor:
        (trained if torch.is_grad_enabled() else predicted).append(pixels.shape[-1])
        return normalise(model, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixelClassifier, "normalise", spy)
        yield trained, predicted


def test_teacher_and_student_grow_and_are_validated_at_full_size(recipe: Recipe, split: Split, tmp_path: Path) -> None:
    with seen_sides() as (trained, predicted):
        teacher, _, _ = train_teacher(recipe, split, tmp_path)
    batches = -(-len(split.train) // recipe.teacher.batch)
    assert trained == [48] * 2 * batches + [64] * 2 * batches and set(predicted) == {64}
    cache = ViewCache.make(tmp_path, recipe, split, teacher)
    for learner in (recipe, msgspec.structs.replace(recipe, student=_without_hints(recipe))):
        with seen_sides() as (trained, predicted):
            train_student(learner, split, cache, tmp_path / str(learner.student.feature_loss))
        steps = len(split.train) // recipe.student.batch
        assert trained == [48] * steps + [64] * 2 * steps and set(predicted) == {64}


def test_what_is_trained_already_recovers_at_full_size(recipe: Recipe, split: Split, tmp_path: Path) -> None:
    teacher, _, _ = train_teacher(recipe, split, tmp_path)
    task = DistillationTask(recipe, split, ViewCache.make(tmp_path, recipe, split, teacher))
    model, _ = build_student(recipe.student, len(split.labels))
    with seen_sides() as (trained, _):
        task.train(model, epochs=2, rate=1e-3, checkpoint=tmp_path / "pruned.ckpt", title="pruned student")
    assert set(trained) == {64}


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_network_of_one_size_is_refused_before_it_is_trained(recipe: Recipe, section: str) -> None:
    """At full size throughout, and in a single epoch, which is never a small one, it is accepted."""
    still = {"model": "mixer_s32_224", "weights": "random", "progressive": 0.5}
    for more, fits in (({}, False), ({"progressive": 0.0}, True), ({"epochs": 1}, True)):
        settings = msgspec.structs.replace(getattr(recipe, section), **still | more)
        image = msgspec.structs.replace(recipe.image, size=224)
        fixed = msgspec.structs.replace(recipe, image=image, **{section: settings})
        if fits:
            assert len(check_networks(fixed, 3)) == 2
        else:
            with pytest.raises(RecipeError, match=rf"160 px, with which \[{section}\] progressive = 0.5 begins"):
                check_networks(fixed, 3)


def test_patience_counts_from_the_first_epoch_of_full_size(tmp_path: Path) -> None:
    """Small images: the best epoch is the first; at full size the third is better, and two more are not."""
    scores = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.3, 0.4, 0.9])
    toy = Toy(tmp_path / "a.ckpt", epochs=20, patience=2, patient_from=4)
    history = toy.fit(evaluate=lambda _: {"combined": next(scores), "balanced_accuracy": 0.0, "auc": 0.0})
    assert len(history) == 8


def _without_hints(recipe: Recipe) -> StudentSection:
    return msgspec.structs.replace(recipe.student, feature_loss=0.0)
