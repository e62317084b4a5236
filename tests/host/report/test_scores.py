"""The report's signals, metrics per label, curves, costs, stage marks and Grad-CAM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from eyas_device.decision import Decision
from eyas_device.preprocess import Preprocessing
from eyas_host.evaluation.metrics import reliability, score
from eyas_host.models.factory import PixelClassifier
from eyas_host.report import plots
from eyas_host.report.curves import score_curves
from eyas_host.report.gradcam import explain_mistakes, grad_cam, last_convolution, map_cells, overlay
from eyas_host.report.html import render_html
from eyas_host.report.model import Explanations, Mistake, Report
from eyas_host.report.page import money
from eyas_host.report.score_plots import draw_curves
from eyas_host.report.signals import judge, operating_point
from tests.support.report_parts import HOSTILE, Page, make_report, predictions, scored
from tests.support.shapes import Pixels, draw_shape

COSTS = np.array([[0.0, 50_000.0], [5_000.0, 0.0]])


def test_metrics_per_label_follow_the_decision_rule() -> None:
    report = scored(("defective", "ok"), COSTS)
    assert report.decided is not None
    page = Page(render_html(report))
    cells = [cell.strip() for cell in page.row("defective")]
    own = report.decided.classes[0]
    assert own.recall_ci is not None
    recall = f"{100 * own.recall:.1f} % {100 * own.recall_ci[0]:.1f} % to {100 * own.recall_ci[1]:.1f} %"
    assert cells[1:4] == [f"{100 * own.precision:.1f} %", recall, f"{own.f1:.3f}"]
    assert cells[6] == str(own.support)
    assert own.recall > report.scores["litert-int8"].classes[0].recall, "the positive class has a higher recall"
    low, high = report.intervals["litert-int8"]["pr_auc"]
    assert f"{low:.3f} to {high:.3f}" in page.text


def test_the_page_shows_costs_only_where_there_is_a_table() -> None:
    report = scored(("defective", "ok"), COSTS)
    assert report.cost is not None
    text = Page(render_html(report)).text
    test = report.cost.splits[1]
    assert "Cost of mistakes" in text and "Cost table" in text
    assert money(test.decided) in text and money(test.likeliest) in text and money(test.constant) in text
    assert str(report.cost.decision) in text and "50,000" in text
    without = Page(render_html(scored(("defective", "ok"))))
    assert "Cost of mistakes" not in without.text and "cost per image" not in without.text


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", HOSTILE)])
def test_every_plot_is_drawn_and_described(labels: tuple[str, ...]) -> None:
    costs = 1.0 - np.eye(len(labels))
    page = Page(render_html(scored(labels, 10 * costs)))
    described = [str(attrs["aria-label"]) for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    assert any(label.startswith("ROC curves; areas: litert-int8 0.") for label in described)
    assert any(label.startswith("Precision-recall curves") for label in described)
    assert any(label.startswith("Cost against the threshold") for label in described) == (len(labels) == 2)
    assert not [tag for tag, _ in page.tags if tag == "script"]


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({"test_accesses": 3}, "yellow", "read 3 times"),
        ({"split_by": "stratified"}, "yellow", "at random"),
        ({"split_by": "group"}, "green", "split by group"),
        ({"warnings": ("class 'a' has 3 training images",)}, "yellow", "3 training images"),
        ({"refused": {"onnx-int8": "why"}}, "yellow", "not packed: onnx-int8"),
        ({}, "green", "95 % of the teacher's"),
    ],
)
def test_signals_for_and_against_shipping(change: dict[str, Any], level: str, text: str) -> None:
    report = msgspec.structs.replace(make_report(("a", "b")), **change)
    assert [s.level for s in judge(report) if text in s.text] == [level]


def variant_of(balanced: float, half: float) -> Report:
    report = make_report(("a", "b"))
    variants = tuple(
        msgspec.structs.replace(r, balanced_accuracy=balanced, balanced_accuracy_ci=(balanced - half, balanced + half))
        if r.name == "litert-int8"
        else r
        for r in report.variants
    )
    return msgspec.structs.replace(report, variants=variants)


def test_a_small_test_set_and_a_fall_from_validation_are_worth_a_look() -> None:
    assert any("known to 10 points either way only" in s.text for s in judge(variant_of(0.7, 0.1)))
    narrow = [s.text for s in judge(variant_of(0.7, 0.03))]
    assert any("was 81.2 % on validation" in text for text in narrow)
    assert not any("either way" in text for text in narrow)


@pytest.mark.parametrize("classes", [2, 3])
def test_curves_have_scikit_learns_areas(classes: int) -> None:
    p, targets = predictions(classes)
    labels = ("a", "b", "c")[:classes]
    curves = score_curves("student", labels, p, targets, positive="b")
    assert [c.label for c in curves] == (["b", "b"] if classes == 2 else ["", "a", "b", "c"] * 2)
    for curve in curves:
        wanted = [labels.index(curve.label)] if curve.label else range(classes)
        area = sk.roc_auc_score if curve.kind == "roc" else sk.average_precision_score
        assert curve.area == pytest.approx(np.mean([area(targets == c, p[:, c]) for c in wanted]))
        assert (np.diff(curve.x) >= 0).all() and len(curve.x) <= 200
        steps = sk.auc(curve.x, curve.y) if curve.kind == "roc" else np.sum(np.diff(curve.x) * np.array(curve.y)[1:])
        assert steps == pytest.approx(curve.area, abs=0.02), "the points reproduce the area"


def test_many_labels_have_only_the_mean_curve() -> None:
    p, targets = predictions(13, n=600)
    labels = tuple(f"label {n}" for n in range(13))
    assert [c.label for c in score_curves("student", labels, p, targets, positive=labels[0])] == ["", ""]
    p, targets = predictions(3)
    assert len(score_curves("teacher", ("a", "b", "c"), p, targets, positive="a", per_label=False)) == 2


def test_the_operating_point_matches_scikit_learn() -> None:
    p, targets = predictions(2)
    confusion = score(p, targets).confusion
    point = operating_point(confusion, 1)
    predicted = p.argmax(axis=1)
    assert point["roc"] == pytest.approx((predicted[targets == 0].mean(), predicted[targets == 1].mean()))
    assert point["pr"] == pytest.approx((sk.recall_score(targets, predicted), sk.precision_score(targets, predicted)))


def epochs(count: int, stage: str = "") -> list[dict[str, Any]]:
    metrics = {"combined": 0.5, "balanced_accuracy": 0.5, "auc": 0.6, "loss": 1.0}
    return [{"epoch": n + 1, "loss": 1.0, "seconds": 1.0, "metrics": metrics, "stage": stage} for n in range(count)]


def test_stages_of_a_training_are_marked() -> None:
    blocks = epochs(2, "1 of 7 blocks") + [{**e, "epoch": 3} for e in epochs(1, "2 of 7 blocks")]
    drawn = plots.learning_curves({"head": epochs(4), "blocks": blocks, "student": epochs(3)})
    assert list(drawn) == ["teacher", "student"]
    assert "7 epochs" in drawn["teacher"] and "from epoch" not in drawn["student"]
    assert "; 1 of 7 blocks from epoch 5; 2 of 7 blocks from epoch 7" in drawn["teacher"]
    assert "epoch 1 kept" in drawn["teacher"], "the head's, because the blocks are only as good"
    blocks[1] = blocks[1] | {"metrics": blocks[1]["metrics"] | {"combined": 0.6}}
    assert "epoch 6 kept" in plots.learning_curves({"head": epochs(4), "blocks": blocks})["teacher"]
    assert list(plots.learning_curves({"head": epochs(2)})) == ["head"]


def test_five_right_images_are_no_good_sign() -> None:
    targets = np.array([0, 0, 0, 1, 1])
    own = score(0.98 * np.eye(2)[targets] + 0.01, targets)
    assert own.balanced_accuracy == 1.0 and own.balanced_accuracy_ci[0] < 0.6
    report = make_report(("defective", "ok"))
    variant = msgspec.structs.replace(
        next(v for v in report.variants if v.name == "litert-int8"),
        balanced_accuracy=1.0,
        balanced_accuracy_ci=own.balanced_accuracy_ci,
    )
    report = msgspec.structs.replace(report, variants=(variant,), scores={"litert-int8": own}, parity={})
    assert [s.text for s in judge(report) if s.level == "green" and "split" not in s.text] == []
    assert any("the test set is small" in s.text for s in judge(report))


def test_the_dot_marks_the_best_epoch_by_the_selection_metric() -> None:
    history = epochs(3)
    for row, loss in enumerate((0.9, 0.4, 0.6)):
        history[row]["metrics"] = history[row]["metrics"] | {"loss": loss, "auc": 0.6 + 0.1 * row}
    kept = {metric: plots.learning_curves({"student": history}, metric)["student"] for metric in ("loss", "auc")}
    assert "epoch 2 kept" in kept["loss"] and "epoch 3 kept" in kept["auc"]


class Linear(torch.nn.Module):
    """A convolution, then a weight per channel and position, or with `pooled` one per channel."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 5, 9, stride=9)
        weights = torch.randn(4, 5, 7, 7) + 0.3 * torch.randn(4, 5, 1, 1)
        self.weights = weights.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 7, 7) if pooled else weights

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.conv(pixels / 64 - 2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lkhw,nkhw->nl", self.weights, self.features(pixels))


@pytest.mark.parametrize("pooled", [True, False], ids=["class activation map", "weights that differ by position"])
def test_grad_cam_weights_channels_by_their_mean_gradient(pooled: bool, shape_frames: Pixels) -> None:
    network, classes = Linear(pooled=pooled), [2, 0, 3]
    heat = grad_cam(network, shape_frames[:3], classes)
    assert heat.shape == (3, 64, 64)
    with torch.no_grad():
        maps = network.features(torch.from_numpy(shape_frames[:3]).permute(0, 3, 1, 2).float()).numpy()
    seen = 0
    for row, label in enumerate(classes):
        weights = network.weights[label].numpy().mean(axis=(1, 2))
        own = np.maximum(sum(weights[k] * maps[row, k] for k in range(5)), 0)
        seen += own.any()
        expected = cv2.resize(own / (own.max() or 1), (64, 64), interpolation=cv2.INTER_LINEAR)
        assert np.abs(heat[row] - expected).max() < 1e-4
    assert seen, "at least one image has evidence for its class"


def test_grad_cam_of_float_and_int8_students(
    network: torch.nn.Module, quantized: torch.nn.Module, shape_frames: Pixels
) -> None:
    for model in (network, quantized):
        heat = grad_cam(model, shape_frames[:4], [0, 1, 2, 3])
        assert heat.shape == (4, 64, 64) and np.isfinite(heat).all()
        assert heat.min() >= 0 and heat.max() <= 1 and heat.max() > 0
        assert not model.training
    assert grad_cam(network, shape_frames[:1], [0]).tolist() != grad_cam(network, shape_frames[:1], [1]).tolist()
    layer = last_convolution(network, shape_frames[:1])
    assert layer.out_channels == 576, "the last one before the pooling of a mobilenetv3_small_100"


def test_grad_cam_in_batches_is_that_of_each_image(network: PixelClassifier, shape_frames: Pixels) -> None:
    classes = [row % 5 for row in range(20)]
    together = grad_cam(network, shape_frames[:20], classes)
    for row in (0, 15, 16, 19):
        assert np.abs(together[row] - grad_cam(network, shape_frames[row : row + 1], [classes[row]])[0]).max() < 1e-3


def test_a_network_without_spatial_outputs_has_no_grad_cam(shape_frames: Pixels) -> None:
    flat = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten())
    with pytest.raises(ValueError, match="no convolution"):
        grad_cam(flat, shape_frames[:1], [0])


def test_mistakes_show_the_image_and_the_evidence(tmp_path: Path) -> None:
    path = tmp_path / "cell.png"
    cv2.imwrite(str(path), np.full((60, 90, 3), 200, np.uint8))
    report = make_report(("a", "b"), (Mistake(str(path), "a", "b", 0.9, 50_000.0), Mistake("gone.png", "a", "b", 0.8)))
    heat = np.zeros((64, 64), dtype=np.float32)
    heat[:32] = 1.0
    explained = overlay(np.full((64, 64, 3), 200, np.uint8), heat)
    assert (explained[32:] == 200).all() and (explained[:32] != 200).any()
    page = Page(render_html(report, Explanations({str(path): explained})))
    images = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert images == ["Image labelled a, predicted b", "Evidence for b"]
    assert "cost 50,000" in page.text and "image not found" in page.text


def test_money() -> None:
    assert [money(v) for v in (2842.4, 50_000.0, 0.5234, 3.0, None)] == [
        "2,842",
        "50,000",
        "0.523",
        "3",
        "not measured",
    ]


def test_a_decision_as_text() -> None:
    rows = ((0.0, 1.0), (1.0, 0.0))
    assert str(Decision(costs=rows, label="defective", threshold=0.1818)) == "defective from a probability of 18.2 % on"
    assert "least expected cost" in str(Decision(costs=rows))


@pytest.mark.parametrize(("side", "cells"), [(64, 2), (96, 3), (128, 4)])
def test_a_map_of_less_than_four_by_four_cells_is_left_out_with_the_reason(
    side: int, cells: int, network: PixelClassifier, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), draw_shape("circle", 3, side, side))
    found = explain_mistakes(network, [Mistake(str(path), "a", "b", 0.9)], list("abcde"), Preprocessing(size=side))
    assert map_cells(network, np.zeros((1, side, side, 3), np.uint8)) == (cells, cells)
    if cells < 4:
        assert not found.overlays and f"{cells} × {cells} cells" in found.reason  # noqa: RUF001
        text = Page(render_html(make_report(("a", "b"), (Mistake(str(path), "a", "b", 0.9),)), found)).text
        assert f"is left out: {found.reason}." in text
    else:
        assert set(found.overlays) == {str(path)} and not found.reason


def test_plots_with_a_diagonal_have_equal_axes() -> None:
    report = scored(("a", "b"))
    bins = reliability(*predictions(2))
    for drawn in (draw_curves(report.curves, "roc", "litert-int8"), plots.reliability(bins, "x")):
        frame = re.search(r'id="patch_2">\s*<path d="M ([\d.]+) ([\d.]+)\s*L ([\d.]+) \S+\s*L \S+ ([\d.]+)', str(drawn))
        assert frame is not None
        left, bottom, right, top = map(float, frame.groups())
        assert right - left == pytest.approx(bottom - top, rel=1e-3)
        assert right - left > 250, "as large as half of the page allows"
