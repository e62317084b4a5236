"""Losses of distillation, each a small module with named tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillationLoss(nn.Module):
    """Forward KL to the teacher at a temperature, beside the labels' cross-entropy.

    `kd_ratio * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - kd_ratio) * CE(student, labels)`.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(self, *, kd_ratio: float, temperature: float, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.kd_ratio = kd_ratio
        self.temperature = temperature
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits [n, classes] (student, teacher) and labels int64 [n]."""
        soft = F.kl_div(
            F.log_softmax(student / self.temperature, dim=1),
            F.log_softmax(teacher / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        hard = F.cross_entropy(student, labels, weight=self.class_weights)
        return self.kd_ratio * self.temperature**2 * soft + (1.0 - self.kd_ratio) * hard


class FeatureHint(nn.Module):
    """One minus the cosine between the projected student's and the teacher's pooled features.

    The projection lives only during training. Source: Romero et al., "FitNets", 2015, with a cosine in place of the
    square, so that the scale of the teacher's features does not matter.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of pooled features [n, student_channels] and [n, teacher_channels]."""
        return (1.0 - F.cosine_similarity(self.project(student), teacher, dim=1)).mean()


def balanced_class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights inverse to the classes' counts, mean 1 over the pictures: float32 [classes]."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return labels.numel() / (classes * counts)
