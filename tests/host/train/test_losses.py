"""Losses and samplers, each against a second formulation."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.types import LossName
from eyas_host.train.losses import (
    CrossEntropy,
    DistillationLoss,
    FocalLoss,
    OneVersusRestLoss,
    PooledFeatureLoss,
    SoftLoss,
    balanced_class_weights,
    dist_loss,
    label_loss,
    student_loss,
    teacher_loss,
)
from eyas_host.train.sampler import epoch_order

NAMES: tuple[LossName, ...] = get_args(LossName)
WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0])


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 3, 1, 0, 0, 2])


# Of the labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_versus_rest_is_a_loop_over_classes(
    logits: Tensor, labels: Tensor, smoothing: float, weighted: bool
) -> None:
    loss = OneVersusRestLoss(class_weights=torch.from_numpy(WEIGHTS) if weighted else None, label_smoothing=smoothing)
    total = 0.0
    weights = [WEIGHTS[label] if weighted else 1.0 for label in labels]
    for row, label, weight in zip(logits.tolist(), labels.tolist(), weights, strict=True):
        for c, z in enumerate(row):
            y = (1 - smoothing) * (c == label) + smoothing / 4
            p = 1 / (1 + math.exp(-z))
            total -= weight * (y * math.log(p) + (1 - y) * math.log(1 - p))
    assert float(loss(logits, labels)) == pytest.approx(total / 9)


def test_one_versus_rest_takes_several_labels_a_image(logits: Tensor) -> None:
    several = (torch.rand(9, 4, generator=torch.Generator().manual_seed(5)) < 0.4).double()
    several[0], several[1] = 0, 1  # no label at all, and every one
    plain = nn.BCEWithLogitsLoss(reduction="sum")(logits, several) / 9
    assert float(OneVersusRestLoss()(logits, several)) == pytest.approx(float(plain))
    weighted = OneVersusRestLoss(class_weights=torch.from_numpy(WEIGHTS))
    rows = nn.BCEWithLogitsLoss(reduction="none")(logits, several).sum(1)
    of_rows = [np.mean(WEIGHTS[one.numpy() > 0]) if one.any() else 1.0 for one in several]
    assert float(weighted(logits, several)) == pytest.approx(np.mean(rows.numpy() * of_rows))
    logits.requires_grad_()
    weighted(logits, several).backward()
    assert (
        logits.grad is not None and (torch.sign(logits.grad) == torch.sign(logits.detach().sigmoid() - several)).all()
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_torchvisions(gamma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = 3 * torch.randn(40, 2, generator=generator), torch.randint(2, (40,), generator=generator)
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), alpha=-1, gamma=gamma, reduction="mean")
    assert float(FocalLoss(gamma=gamma)(logits, labels)) == pytest.approx(float(expected), rel=1e-5)
    alpha = 0.8
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), alpha=alpha, gamma=gamma)
    weights = torch.tensor([1 - alpha, alpha])
    got = FocalLoss(gamma=gamma, class_weights=weights)(logits, labels)
    assert float(got) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_focal_loss_of_many_classes_by_a_loop(logits: Tensor, labels: Tensor) -> None:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        total -= WEIGHTS[label] * (1 - p) ** 3 * math.log(p)
    loss = FocalLoss(gamma=3.0, class_weights=torch.from_numpy(WEIGHTS))
    assert float(loss(logits, labels)) == pytest.approx(total / 9)


@pytest.mark.parametrize("weighted", [False, True])
def test_without_a_gamma_focal_loss_is_cross_entropy(logits: Tensor, labels: Tensor, weighted: bool) -> None:
    weights = torch.from_numpy(WEIGHTS) if weighted else None
    per_image = np.ones(4) if weights is None else WEIGHTS
    for smoothing in (0.0, 0.1):
        rows = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(logits, labels).numpy()
        for loss in (
            FocalLoss(gamma=0.0, class_weights=weights, label_smoothing=smoothing),
            CrossEntropy(class_weights=weights, label_smoothing=smoothing),
        ):
            assert float(loss(logits, labels)) == pytest.approx(np.mean(per_image[labels] * rows))


def test_focal_loss_looks_away_from_what_is_known() -> None:
    logits, labels = torch.tensor([[4.0, -4.0], [0.2, -0.2]], requires_grad=True), torch.tensor([0, 0])
    pulls = {}
    for gamma in (0.0, 2.0):
        (grad,) = torch.autograd.grad(FocalLoss(gamma=gamma)(logits, labels), logits)
        pulls[gamma] = float(grad[1].norm() / grad[0].norm())
    assert pulls[2.0] > 100 * pulls[0.0]


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_of_one_class_are_labels(name: LossName, logits: Tensor, labels: Tensor) -> None:
    loss = label_loss(name, label_smoothing=0.1)
    one_hot = nn.functional.one_hot(labels, 4).double()
    assert float(loss(logits, one_hot)) == pytest.approx(float(loss(logits, labels)))


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_soft_labels_are_what_the_answers_go_to(name: LossName) -> None:
    wanted = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(400):
        loss = label_loss(name)(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    got = logits.sigmoid() if name == "bce" else logits.softmax(1)
    assert torch.allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_sure_and_wrong_is_still_a_number(name: LossName) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [300.0, 0.0]], requires_grad=True)
    loss = label_loss(name, focal_gamma=0.5)(logits, torch.tensor([1, 1, 0]))
    loss.backward()
    assert logits.grad is not None and torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_class_weights_give_every_class_the_same_say() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = balanced_class_weights(labels, 3)
    shares = [float(weights[c] * (labels == c).sum()) for c in range(3)]
    assert shares == pytest.approx([10 / 3] * 3)
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert torch.isfinite(balanced_class_weights(labels, 4)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_weight_multiplies_an_images_whole_loss(name: LossName, logits: Tensor, labels: Tensor) -> None:
    """Also the part of smoothing: the loss of a batch is the weighted sum of the losses of its images."""
    weighted = label_loss(name, class_weights=torch.from_numpy(WEIGHTS), label_smoothing=0.2)
    plain = label_loss(name, label_smoothing=0.2)
    rows = [float(plain(logits[i : i + 1], labels[i : i + 1])) for i in range(9)]
    assert float(weighted(logits, labels)) == pytest.approx(np.mean(WEIGHTS[labels] * rows))
    halves = [float(weighted(logits[part], labels[part])) for part in (slice(0, 7), slice(7, 9))]
    assert float(weighted(logits, labels)) == pytest.approx((7 * halves[0] + 2 * halves[1]) / 9)


@pytest.mark.parametrize("ratio", [2, 39, 99, 999])
def test_a_certainly_common_image_stays_common(ratio: int) -> None:
    """At the optimum its rare class gets the mass of smoothing and no more, however rare the class is."""
    smoothing, weights = 0.05, balanced_class_weights(torch.tensor([0] * ratio + [1]), 2)
    steps = torch.linspace(-8, 8, 401, dtype=torch.float64)
    common = torch.tensor([0])
    for name, expected in (("cross_entropy", smoothing / 2), ("bce", smoothing / 2), ("focal", None)):
        loss = label_loss(name, class_weights=weights, label_smoothing=smoothing)  # type: ignore[arg-type]
        losses = [float(loss(torch.stack([-z / 2, z / 2])[None], common)) for z in steps]
        best = float(steps[int(np.argmin(losses))])
        if name == "bce":  # each logit is that of one class against the rest
            assert 1 / (1 + math.exp(-best / 2)) == pytest.approx(expected, abs=2e-3)
        elif name == "cross_entropy":
            assert 1 / (1 + math.exp(-best)) == pytest.approx(expected, abs=2e-3)
        assert 1 / (1 + math.exp(-best)) < 0.25


@pytest.mark.parametrize("name", NAMES)
def test_one_percent_defects_are_told_apart_as_well_as_balanced_ones(name: LossName) -> None:
    """Two normal distributions at d' = 4: the best balanced accuracy is that of the threshold in the middle."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    common, rare = (normal.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in (9900, 100))
    x = torch.cat([common, rare + 4.0])
    labels = torch.tensor([0] * 9900 + [1] * 100)
    line = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = label_loss(name, class_weights=balanced_class_weights(labels, 2), label_smoothing=0.05)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(torch.stack([line[0] + line[1] * x, line[2] + line[3] * x], dim=1), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    threshold = ((line[0] - line[2]) / (line[3] - line[1])).detach()
    reached = (normal.cdf(threshold) + 1 - normal.cdf(threshold - 4.0)) / 2
    assert float(reached) == pytest.approx(float(normal.cdf(torch.tensor(2.0))), abs=0.01)


def test_the_recipe_names_the_losses() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    weights = balanced_class_weights(labels, 3)
    teacher = TeacherSection(loss="focal", focal_gamma=1.5, label_smoothing=0.1)
    student = StudentSection(loss="bce", kd_ratio=0.0, class_weights=False)
    recipe = Recipe(run=RunSection(name="toy"), teacher=teacher, student=student)
    focal = FocalLoss(gamma=1.5, class_weights=weights, label_smoothing=0.1)
    assert torch.equal(teacher_loss(recipe, labels, 3)(logits, labels), focal(logits, labels))
    got = student_loss(recipe, labels, 3)(logits, -logits, labels)
    assert float(got) == pytest.approx(float(OneVersusRestLoss()(logits, labels)))
    default = Recipe(run=RunSection(name="toy"))
    plain = CrossEntropy(class_weights=weights, label_smoothing=0.05)
    assert torch.equal(teacher_loss(default, labels, 3)(logits, labels), plain(logits, labels))
    alone = student_loss(default, labels, 3, teacher=False)(logits, -logits, labels)
    assert torch.equal(alone, CrossEntropy(class_weights=weights)(logits, labels))


# Of the teacher's answers


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def plain_distillation(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, kd: float, t: float, weights: np.ndarray
) -> float:
    rows = []
    for s, z in zip(log_softmax(student / t), log_softmax(teacher / t), strict=True):
        rows.append(sum(math.exp(b) * (b - a) for a, b in zip(s, z, strict=True)))
    picked = -log_softmax(student)[np.arange(len(labels)), labels]
    hard = (weights[labels] * picked).mean()
    return float(kd * t * t * np.mean(rows) + (1 - kd) * hard)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_distillation_loss_is_its_formula(kd_ratio: float, temperature: float, weighted: bool) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, 2, (2, 9, 4))
    labels = rng.integers(0, 4, 9)
    weights = WEIGHTS if weighted else np.ones(4)
    hard = CrossEntropy(class_weights=torch.from_numpy(weights) if weighted else None)
    loss = DistillationLoss(kd_ratio=kd_ratio, soft=SoftLoss(temperature=temperature), hard=hard)
    got = float(loss(torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels)))
    assert got == pytest.approx(plain_distillation(student, teacher, labels, kd_ratio, temperature, weights), rel=1e-6)


def test_distillation_ends_where_student_and_teacher_agree() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = SoftLoss(temperature=3.0)(logits, logits.detach() + 5.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-6


def test_dist_is_numpys_correlation_over_classes_and_over_images() -> None:
    rng = np.random.default_rng(2)
    student, teacher = (np.exp(log_softmax(rng.normal(0, 2, (9, 4)) / 2.0)) for _ in range(2))
    classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(student, teacher, strict=True)])
    images = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(student.T, teacher.T, strict=True)])
    got = float(dist_loss(torch.from_numpy(student), torch.from_numpy(teacher)))
    assert got == pytest.approx(classes + images)
    loss = SoftLoss(temperature=2.0, kd="dist")
    whole = float(loss(2 * torch.from_numpy(student).log(), 2 * torch.from_numpy(teacher).log()))
    assert whole == pytest.approx(4 * (classes + images))


def test_dist_asks_for_relations_alone(logits: Tensor) -> None:
    teacher = logits.softmax(1)
    paler = 0.25 + 0.3 * (teacher - 0.25)
    assert float(dist_loss(paler, teacher)) == pytest.approx(0.0, abs=1e-9)
    kl = nn.functional.kl_div(paler.log(), teacher, reduction="batchmean")
    assert float(kl) > 0.1


def test_dist_of_answers_that_are_all_the_same_is_a_number() -> None:
    logits = torch.zeros(5, 3, requires_grad=True)
    loss = SoftLoss(temperature=1.0, kd="dist")(logits, torch.zeros(5, 3))
    loss.backward()
    assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_pooled_feature_loss_sees_the_direction_only() -> None:
    hint = PooledFeatureLoss(5, 5).requires_grad_(False)
    with torch.no_grad():
        hint.project.weight.copy_(torch.eye(5))
        hint.project.bias.zero_()
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert float(hint(features, 12.0 * features)) == pytest.approx(0.0, abs=1e-6)
    assert float(hint(features, -0.1 * features)) == pytest.approx(2.0, abs=1e-6)
    flat = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert float(hint(flat, torch.tensor([[0.0, 3, 0, 0, 0]]))) == pytest.approx(1.0)


# Samplers


def test_a_shuffled_epoch_has_every_image_once() -> None:
    orders = [epoch_order(np.repeat([0, 1], [30, 10]), "shuffled", np.random.default_rng((7, n))) for n in (0, 0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])


def test_a_balanced_epoch_draws_every_class_as_often() -> None:
    labels = np.repeat([0, 1, 3], [900, 90, 10])  # class 2 has no image
    orders = [epoch_order(labels, "balanced", np.random.default_rng((7, n))) for n in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    counts = np.bincount(labels[orders[0]], minlength=4)
    assert counts.sum() == 1000 and counts[2] == 0
    assert np.abs(counts[[0, 1, 3]] - 1000 / 3).max() < 60  # four standard deviations
    rare = np.bincount(orders[0], minlength=1000)[990:]
    assert rare.min() > 10
