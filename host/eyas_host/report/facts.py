"""What a reader asks first, in words: the worst class, small classes, what distillation bought, what int8 cost."""

from __future__ import annotations

from eyas_host.evaluation.metrics import PairedLoss, Scores
from eyas_host.report.model import Report
from eyas_host.report.signals import FEW_TEST_IMAGES, class_names, isolated


def key_facts(report: Report) -> dict[str, str]:
    """Title -> a sentence, of everything that was measured."""
    scores = report.decided or report.scores.get(report.shipped)
    facts = {
        "worst class": _worst_class(report, scores) if scores else "",
        "small classes": _small_classes(report, scores) if scores else "",
        "distillation": _distillation(report),
        "int8": _int8(report),
    }
    return {title: text for title, text in facts.items() if text}


def _worst_class(report: Report, scores: Scores) -> str:
    tested = [(own.recall, -own.support, n) for n, own in enumerate(scores.classes) if own.support]
    if not tested:
        return ""
    _, _, worst = min(tested)
    own = scores.classes[worst]
    interval = f", 95 % interval {_percent(own.recall_ci[0])} to {_percent(own.recall_ci[1])}" if own.recall_ci else ""
    text = f"{isolated(report.labels[worst])}: {_percent(own.recall)} of its {_images(own.support)} found{interval}"
    taken = max((images, -n) for n, images in enumerate(scores.confusion[worst]) if n != worst)
    return text + (f"; most often taken for {isolated(report.labels[-taken[1]])} ({taken[0]})" if taken[0] else "")


def _small_classes(report: Report, scores: Scores) -> str:
    few = [
        f"{label} ({own.support})"
        for label, own in zip(report.labels, scores.classes, strict=False)
        if own.support < FEW_TEST_IMAGES
    ]
    if not few:
        return ""
    have, their = ("1 class has", "its") if len(few) == 1 else (f"{len(few)} classes have", "their")
    return f"{have} fewer than {FEW_TEST_IMAGES} test images, so {their} figures are uncertain: {class_names(few)}"


def _distillation(report: Report) -> str:
    lost = report.distillation
    if lost is None:
        return ""
    against = "over the same network trained from labels only"
    if lost.interval[0] <= 0 <= lost.interval[1]:
        return (
            f"no difference beyond noise {against}: {-100 * lost.loss:+.1f} points of balanced accuracy on the test "
            f"set, 95 % interval {-100 * lost.interval[1]:+.1f} to {-100 * lost.interval[0]:+.1f}"
        )
    verb = "bought" if lost.loss < 0 else "cost"
    low, high = sorted(abs(100 * limit) for limit in lost.interval)
    return (
        f"{verb} {abs(100 * lost.loss):.1f} points of balanced accuracy on the test set {against}, "
        f"95 % interval {low:.1f} to {high:.1f}"
    )


def _int8(report: Report) -> str:
    own = next((variant for variant in report.variants if variant.name == report.shipped), None)
    if own is None:
        return ""
    if own.precision == "fp32":
        return f"the shipped artefact is {own.precision}: quantization cost nothing"
    text = _lost(report.test_losses.get(own.name), "on the test set")
    parity = report.parity.get(own.name)
    if parity is not None:
        gate = report.recipe.get("gate", {}).get("max_drop")
        allowed = "" if gate is None else f", where the gate allowed {100 * gate:.1f}"
        text += f"{'; ' if text else ''}{_gain(parity.drop)} on validation{allowed}"
    return text


def _lost(loss: PairedLoss | None, where: str) -> str:
    if loss is None:
        return ""
    low, high = (100 * limit for limit in loss.interval)
    return f"{_gain(loss.loss)} of balanced accuracy {where}, 95 % interval {low:.1f} to {high:.1f} lost"


def _gain(drop: float) -> str:
    return f"{abs(100 * drop):.1f} points {'lost' if drop >= 0 else 'gained'}"


def _images(count: int) -> str:
    return f"{count:,} test image{'' if count == 1 else 's'}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
