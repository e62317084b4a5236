"""Figures, first weights and the loop, each against a second formulation or a known answer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import skimage.data
import timm
import torch

from eyas_device.preprocess import Preprocessing, prepare
from eyas_host.data.index import build_index
from eyas_host.data.split import Split, split_index
from eyas_host.data.transforms import prepared
from eyas_host.evaluation import metrics
from eyas_host.evaluation.inference import logits_of, to_tensor
from eyas_host.evaluation.metrics import validation_metrics
from eyas_host.models.factory import PixelClassifier, build, load_packaged
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.errors import RecipeError, WeightsError
from eyas_host.train import student, teacher
from eyas_host.train.student import train_student
from eyas_host.train.teacher import best_stage, train_teacher
from eyas_host.train.view_cache import ViewCache

CPU = torch.device("cpu")


# Figures


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [60, 30, 10])
    logits = rng.normal(0, 1.5, (100, 3))
    logits[np.arange(100), targets] += 1.0
    return logits, targets


def test_scores_against_plain_loops(answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = answers
    p = metrics.softmax(logits)
    assert np.allclose(p, [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits])
    said = [max(range(3), key=lambda c: row[c]) for row in p]
    pairs = list(zip(targets.tolist(), said, strict=True))
    recalls, f1s, areas = [], [], []
    for c in range(3):
        hits = sum(t == c == a for t, a in pairs)
        recalls.append(hits / sum(t == c for t, _ in pairs))
        f1s.append(2 * hits / (sum(t == c for t, _ in pairs) + sum(a == c for _, a in pairs)))
        own, others = p[targets == c, c], p[targets != c, c]
        areas.append(np.mean([(a > b) + 0.5 * (a == b) for a in own for b in others]))
    scores = metrics.score(p, targets)
    assert scores.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert scores.accuracy == pytest.approx(sum(t == a for t, a in pairs) / 100)
    assert scores.f1 == pytest.approx(np.mean(f1s))
    assert scores.auc == pytest.approx(np.mean(areas))
    assert scores.confusion == tuple(tuple(pairs.count((t, a)) for a in range(3)) for t in range(3))
    low, high = scores.balanced_accuracy_ci
    assert low < scores.balanced_accuracy < high and 0.05 < high - low < 0.35
    figures = validation_metrics(logits, targets)
    assert figures["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert figures["combined"] == pytest.approx(np.mean(recalls) + 0.5 * np.mean(areas))
    assert figures["loss"] == pytest.approx(np.mean([-math.log(row[t]) for row, t in zip(p, targets, strict=True)]))


def test_calibration_error_by_a_loop(answers: tuple[np.ndarray, np.ndarray]) -> None:
    p, targets = metrics.softmax(answers[0]), answers[1]
    error = 0.0
    for b in range(15):
        inside = [
            (row.max(), row.argmax() == t)
            for row, t in zip(p, targets, strict=True)
            if b / 15 <= row.max() < (b + 1) / 15 or (b == 14 and row.max() == 1.0)
        ]
        if inside:
            gap = np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside])
            error += abs(gap) * len(inside) / len(targets)
    assert metrics.expected_calibration_error(p, targets) == pytest.approx(error)
    assert sum(b.fraction for b in metrics.reliability(p, targets)) == pytest.approx(1.0)
    sure = np.eye(3)[targets]
    assert metrics.expected_calibration_error(sure, targets) == 0.0
    assert metrics.expected_calibration_error(np.roll(sure, 1, axis=1), targets) == 1.0


def test_auc_of_two_classes_and_of_a_missing_one() -> None:
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    assert metrics.auc(p, np.array([0, 0, 1, 1])) == pytest.approx(0.75)
    assert math.isnan(metrics.auc(p, np.array([0, 0, 0, 0])))
    assert validation_metrics(p, np.array([0, 0, 0, 0]))["combined"] == 0.5


def test_paired_loss() -> None:
    targets = np.repeat([0, 1], 200)
    before = np.eye(2)[targets]
    after = before.copy()
    after[::10] = after[::10, ::-1]
    lost, deviation = metrics.paired_loss(before, after, targets), math.sqrt(0.1 * 0.9 / 400)
    assert lost.loss == pytest.approx(0.1)
    assert lost.bound == pytest.approx(0.1 + 1.645 * deviation, abs=0.004)
    assert lost.interval == pytest.approx((0.1 - 1.96 * deviation, 0.1 + 1.96 * deviation), abs=0.007)
    gain = metrics.paired_loss(after, before, targets)
    assert gain.loss == pytest.approx(-0.1) and -0.1 < gain.bound < -0.06
    unbalanced = before.copy()
    unbalanced[:100] = unbalanced[:100, ::-1]
    assert metrics.paired_loss(before[:220], unbalanced[:220], targets[:220]).loss == pytest.approx(0.25)


# First weights


def test_packaged_weights_know_well_known_images() -> None:
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    load_packaged(backbone, "tf_efficientnet_lite0")
    norm = backbone.pretrained_cfg
    model = PixelClassifier(backbone, norm["mean"], norm["std"]).eval()
    expected = {"chelsea": {281, 282, 285}, "coffee": {967}, "rocket": {657}}
    for name, classes in expected.items():
        frame = np.ascontiguousarray(getattr(skimage.data, name)()[..., ::-1])
        pixels = prepare(frame, Preprocessing(size=224))[np.newaxis]
        assert int(logits_of(model, pixels, CPU).argmax()) in classes, name


def test_packaged_backbone_gets_a_new_head() -> None:
    model, origin = build("tf_efficientnet_lite0", 5, "packaged")
    assert origin == "packaged"
    assert logits_of(model, np.zeros((2, 64, 64, 3), dtype=np.uint8), CPU).shape == (2, 5)
    assert model.pooled_channels == 1280
    assert model.mean.flatten().tolist() == pytest.approx([127.5] * 3)


def test_pixels_become_what_the_backbone_wants(network: PixelClassifier) -> None:
    model = PixelClassifier(network.backbone, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    bgr = torch.tensor([30.0, 20.0, 10.0]).view(1, 3, 1, 1)
    rgb = (np.array([10, 20, 30]) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert np.allclose(model.normalise(bgr).flatten(), rgb, atol=1e-6)
    assert torch.equal(model.normalise(bgr.to(torch.uint8)), model.normalise(bgr))


def test_pooled_and_classify_are_the_two_halves(network: PixelClassifier, shape_frames: np.ndarray) -> None:
    pixels = to_tensor(shape_frames[:3], CPU)
    with torch.inference_mode():
        assert torch.allclose(network.classify(network.pooled(pixels)), network(pixels), atol=1e-5)
        assert network.pooled(pixels).shape == (3, network.pooled_channels)


def test_unknown_models_are_named_with_close_ones() -> None:
    with pytest.raises(RecipeError, match=r"mobilenetv3_smal_100.*similar names: .*mobilenetv3_small_100"):
        build("mobilenetv3_smal_100", 2, "random")
    with pytest.raises(RecipeError, match="similar names: none"):
        build("zzzz", 2, "random")


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_weights_fail_quickly() -> None:
    started = time.monotonic()
    with pytest.raises(WeightsError, match="no weights for mobilenetv3_small_100: hub: "):
        build("mobilenetv3_small_100", 3, "hub")
    assert time.monotonic() - started < 15
    assert build("mobilenetv3_small_100", 3, "auto")[1] == "pretrained"
    assert build("mobilenetv3_small_050", 3, "auto")[1] == "random"


def test_no_package_for_this_network() -> None:
    with pytest.raises(WeightsError, match=r"packaged: none for mobilenetv3_small_100 \(there are: tf_efficient"):
        build("mobilenetv3_small_100", 3, "packaged")


# Teacher and student


@pytest.fixture(scope="module")
def lesson_recipe(shape_images: Path) -> Recipe:
    return Recipe(
        run=RunSection(name="toy", device="cpu"),
        data=DataSection(path=str(shape_images), limit=30),
        image=ImageSection(size=32),
        teacher=TeacherSection(model="mobilenetv3_small_050", weights="random", head_epochs=2, epochs=1),
        student=StudentSection(model="mobilenetv3_small_050", weights="random", views=2, epochs=1, batch=8),
    )


@pytest.fixture(scope="module")
def split(lesson_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Split:
    data = msgspec.structs.replace(lesson_recipe.data, split=(0.6, 0.2, 0.2))
    manifest = split_index(build_index(data), data, 0)
    return Split(manifest, tmp_path_factory.mktemp("run"))


def test_teacher_and_student_train_from_images(lesson_recipe: Recipe, split: Split, tmp_path: Path) -> None:
    teacher, origin, histories = train_teacher(lesson_recipe, split, tmp_path)
    assert origin == "random" and [len(h) for h in histories.values()] == [2, 1]
    cache = ViewCache.make(tmp_path, lesson_recipe, split, teacher)
    student, _, history = train_student(lesson_recipe, split, cache, tmp_path)
    alone, _, _ = train_student(lesson_recipe, split, cache, tmp_path, teacher=False)
    assert math.isfinite(history[0].loss)
    pixels = prepared(split.validation.pixels, lesson_recipe.image.preprocessing())
    assert not np.allclose(logits_of(student, pixels, CPU), logits_of(alone, pixels, CPU))
    figures = validation_metrics(logits_of(student, pixels, CPU), split.validation.targets)
    assert history[0].metrics == pytest.approx(figures, abs=1e-5)


def test_stage_2_that_makes_it_worse_leaves_the_head_alone(lesson_recipe: Recipe, split: Split, tmp_path: Path) -> None:
    run = msgspec.structs.replace(lesson_recipe.run, selection_metric="loss")
    teacher = msgspec.structs.replace(lesson_recipe.teacher, rate=1.0, clip=0.0, epochs=2)
    recipe = msgspec.structs.replace(lesson_recipe, run=run, teacher=teacher)
    model, _, histories = train_teacher(recipe, split, tmp_path)
    head, blocks = (min(epoch.metrics["loss"] for epoch in histories[stage]) for stage in ("head", "blocks"))
    assert blocks > head and best_stage(histories, "loss") == "head"
    pixels = prepared(split.validation.pixels, recipe.image.preprocessing())
    kept = validation_metrics(logits_of(model, pixels, CPU), split.validation.targets)
    assert kept["loss"] == pytest.approx(head, abs=1e-5)
    gentle = msgspec.structs.replace(lesson_recipe, teacher=msgspec.structs.replace(teacher, rate=1e-6), run=run)
    _, _, histories = train_teacher(gentle, split, tmp_path / "gentle")
    head, blocks = (min(epoch.metrics["loss"] for epoch in histories[stage]) for stage in ("head", "blocks"))
    assert best_stage(histories, "loss") == ("blocks" if blocks < head else "head")


def decayed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ between two trainings of one step with different weight decay."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.fixture
def no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks begin without zeros, which a decay would not change."""

    def without(build: Callable[..., tuple[PixelClassifier, str]], *args: Any) -> tuple[PixelClassifier, str]:
        model, origin = build(*args)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += parameter == 0
        return model, origin

    monkeypatch.setattr(student, "build_student", partial(without, student.build_student))
    monkeypatch.setattr(teacher, "build_teacher", partial(without, teacher.build_teacher))


@pytest.mark.usefixtures("no_zeros")
def test_norms_and_biases_do_not_decay(
    lesson_recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    """The gradients of the first step are equal, so only the decay differs between two trainings.

    Both decay: without a decay the parameters are one group, and the norm to clip is summed in another order.
    """
    cache = ViewCache.make(tmp_path, lesson_recipe, split, copy.deepcopy(network))
    students, heads = [], []
    for decay in (0.25, 0.5):
        one_step = {"weight_decay": decay, "batch": len(split.train)}
        learner = msgspec.structs.replace(lesson_recipe.student, ema=0.0, **one_step)
        head = msgspec.structs.replace(lesson_recipe.teacher, head_epochs=1, epochs=0, **one_step)
        recipe = msgspec.structs.replace(lesson_recipe, student=learner, teacher=head)
        students.append(train_student(recipe, split, cache, tmp_path / f"{decay}")[0])
        heads.append(train_teacher(recipe, split, tmp_path / f"{decay}")[0].classifier.state_dict())
    weights = {name for name, p in students[0].named_parameters() if p.ndim > 1}
    assert decayed(students[0].state_dict(), students[1].state_dict()) == weights
    assert decayed(heads[0], heads[1]) == {"weight"}


def test_a_last_batch_of_one_image(lesson_recipe: Recipe, split: Split, tmp_path: Path) -> None:
    alone = msgspec.structs.replace(lesson_recipe.teacher, batch=len(split.train) - 1, epochs=1)
    recipe = msgspec.structs.replace(lesson_recipe, teacher=alone)
    _, _, histories = train_teacher(recipe, split, tmp_path)
    assert len(histories["blocks"]) == 1


def test_labels_only_does_not_listen_to_the_teacher(
    lesson_recipe: Recipe, split: Split, network: PixelClassifier, tmp_path: Path
) -> None:
    cache = ViewCache.make(tmp_path, lesson_recipe, split, copy.deepcopy(network))
    results = []
    for number, factor in enumerate((1.0, -5.0)):
        cache.logits = (cache.logits * factor).astype(np.float16)
        folder = tmp_path / str(number)
        results.append(train_student(lesson_recipe, split, cache, folder, teacher=False)[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))
    heard = msgspec.structs.replace(lesson_recipe, student=msgspec.structs.replace(lesson_recipe.student, ema=0.0))
    with_teacher = train_student(heard, split, cache, tmp_path / "2")[0].state_dict()
    assert not all(torch.equal(a, b) for a, b in zip(results[0].values(), with_teacher.values(), strict=True))
