"""Training losses.

Label losses take int64 [n] or soft and multi-hot labels float [n, classes]; distillation losses also take the teacher's
logits. All are means over the images of the batch, whatever the images' weights: the mean over two batches, weighted by
their sizes, is the loss of both together (`dist` excepted, which correlates over a batch).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.recipe.types import LossName


class _LabelLoss(nn.Module):
    """A loss with class weights and label smoothing: an image's weight counts for all of its loss, smoothing included.

    The weights do not normalise the loss. Dividing by their sum, as `torch.nn.CrossEntropyLoss` does, weighs a common
    image more in a batch without rare ones, and the gradient is no longer that of the whole data set.
    """

    class_weights: Tensor | None

    def __init__(self, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights)

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss [n] of each image for logits and targets [n, classes]."""
        raise NotImplementedError

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits [n, classes] and labels int64 [n] or float [n, classes]."""
        targets, weights = self._targets(labels, logits)
        return (weights * self.rows(logits, targets)).mean()

    def _targets(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothed targets [n, classes] and the weight [n] of each image: the mean weight of its classes."""
        classes = logits.shape[1]
        targets = labels if labels.is_floating_point() else F.one_hot(labels, classes)
        targets = targets.to(logits.dtype)
        weights = torch.ones_like(targets[:, 0])
        if self.class_weights is not None:
            total = targets.sum(1)
            weights = torch.where(total > 0, targets @ self.class_weights.to(logits.dtype) / total.clamp(min=1e-12), 1)
        return targets * (1.0 - self.label_smoothing) + self.label_smoothing / classes, weights


class CrossEntropy(_LabelLoss):
    """Cross-entropy of the softmax over all classes."""

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss [n] of each image for logits and targets [n, classes]."""
        return -(targets * F.log_softmax(logits, dim=1)).sum(1)


class OneVersusRestLoss(_LabelLoss):
    """Binary cross-entropy of each class against the rest, summed over the classes.

    For multi-hot labels, and for labels of one class each. Source: Wightman et al., "ResNet strikes back", 2021.
    """

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss [n] of each image for logits and targets [n, classes]."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


class FocalLoss(_LabelLoss):
    """Softmax cross-entropy weighted by `(1 - p)^gamma` of the probability p of the true class.

    With two classes it equals the sigmoid focal loss of the difference of their logits. Source: Lin et al., "Focal Loss
    for Dense Object Detection", 2017.
    """

    def __init__(self, *, gamma: float, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights=class_weights, label_smoothing=label_smoothing)
        self.gamma = gamma

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss [n] of each image for logits and targets [n, classes]."""
        logs = F.log_softmax(logits, dim=1)
        return -(targets * (1.0 - logs.exp()).clamp(min=1e-12) ** self.gamma * logs).sum(1)


def label_loss(
    name: LossName, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0, focal_gamma: float = 2.0
) -> nn.Module:
    """The label loss with this name in the recipe."""
    if name == "bce":
        return OneVersusRestLoss(class_weights=class_weights, label_smoothing=label_smoothing)
    if name == "focal":
        return FocalLoss(gamma=focal_gamma, class_weights=class_weights, label_smoothing=label_smoothing)
    return CrossEntropy(class_weights=class_weights, label_smoothing=label_smoothing)


def teacher_loss(recipe: Recipe, labels: Tensor, classes: int) -> nn.Module:
    """The teacher's loss, on the device of `labels`, int64 [n], the labels of all training images."""
    return _label_loss(recipe.teacher, labels, classes)


def student_loss(recipe: Recipe, labels: Tensor, classes: int, *, teacher: bool = True) -> DistillationLoss:
    """The student's loss, or with `teacher=False` its label loss only; otherwise as `teacher_loss`."""
    settings = recipe.student
    return DistillationLoss(
        kd_ratio=settings.kd_ratio if teacher else 0.0,
        soft=SoftLoss(temperature=settings.temperature, kd=settings.kd),
        hard=_label_loss(settings, labels, classes),
    )


def _label_loss(settings: TeacherSection | StudentSection, labels: Tensor, classes: int) -> nn.Module:
    return label_loss(
        settings.loss,
        class_weights=balanced_class_weights(labels, classes) if settings.class_weights else None,
        label_smoothing=settings.label_smoothing,
        focal_gamma=settings.focal_gamma,
    ).to(labels.device)


class SoftLoss(nn.Module):
    """Loss of a student's logits against a teacher's.

    `kl`: `T^2 * KL(softmax(teacher / T) || softmax(student / T))`. Source: Hinton et al., "Distilling the Knowledge in
    a Neural Network", 2015. `dist`: `T^2` times `dist_loss` of the same probabilities.
    """

    def __init__(self, *, temperature: float, kd: Literal["kl", "dist"] = "kl") -> None:
        super().__init__()
        self.temperature = temperature
        self.kd = kd

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of logits [n, classes]."""
        student_logs = F.log_softmax(student / self.temperature, dim=1)
        teacher_logs = F.log_softmax(teacher / self.temperature, dim=1)
        if self.kd == "dist":
            soft = dist_loss(student_logs.exp(), teacher_logs.exp())
        else:
            soft = F.kl_div(student_logs, teacher_logs, reduction="batchmean", log_target=True)
        return self.temperature**2 * soft


class DistillationLoss(nn.Module):
    """Distillation and label loss: `kd_ratio * soft(student, teacher) + (1 - kd_ratio) * hard(student, labels)`."""

    def __init__(self, *, kd_ratio: float, soft: SoftLoss, hard: nn.Module) -> None:
        super().__init__()
        self.kd_ratio = kd_ratio
        self.soft = soft
        self.hard = hard

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits [n, classes] (student, teacher) and labels int64 [n] or float [n, classes]."""
        soft: Tensor = self.soft(student, teacher)
        hard: Tensor = self.hard(student, labels)
        return self.kd_ratio * soft + (1.0 - self.kd_ratio) * hard


def dist_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of one minus the correlation of probabilities [n, classes] over classes and over images.

    Only relations are matched, which helps with a much stronger teacher. With two classes the first term only says
    which class is more likely. Source: Huang et al., "Knowledge Distillation from A Stronger Teacher",
    2022, equations 7 to 10 with both weights 1.
    """
    return (1.0 - _correlation(student, teacher)).mean() + (1.0 - _correlation(student.T, teacher.T)).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row, [rows]."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)


class PooledFeatureLoss(nn.Module):
    """One minus the cosine between the projected pooled features of the student and the teacher's.

    The projection exists only during training. Source: Romero et al., "FitNets", 2015, with a cosine instead of the
    squared error, so that the scale of the teacher's features does not matter.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of pooled features [n, student_channels] and [n, teacher_channels]."""
        return (1.0 - F.cosine_similarity(self.project(student), teacher, dim=1)).mean()


def mean_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(softmax(reference) || softmax(logits)) of logits [n, classes], in nats."""
    mean = F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="batchmean", log_target=True)
    return float(mean)


def balanced_class_weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights inverse to the counts, mean 1 over the images: float32 [classes]."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return labels.numel() / (classes * counts)
