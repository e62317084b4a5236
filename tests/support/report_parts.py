"""A report to render, and a parser for the rendered page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.bundle import Confidence
from eyas_device.decision import decide
from eyas_host.evaluation.bootstrap import intervals
from eyas_host.evaluation.cost import CostFigures, choose_decision, split_cost
from eyas_host.evaluation.metrics import Bin, PairedLoss, Scores, score, softmax
from eyas_host.evaluation.parity import Parity
from eyas_host.evaluation.robustness import Robustness, RobustnessRow
from eyas_host.evaluation.verdict import Latency
from eyas_host.export.sizes import ArtefactSize, LayerSize
from eyas_host.recipe.accept import AcceptSection
from eyas_host.report.curves import score_curves
from eyas_host.report.facts import key_facts
from eyas_host.report.model import Mistake, Report, StageSummary, Variant
from eyas_host.report.ship import decide as decide_to_ship
from eyas_host.report.signals import judge

Costs = npt.NDArray[np.float64]

HOSTILE = '<script>alert("1")</script> $x_1$'
NOTICE = "CC-BY-NC-SA-4.0: non-commercial use only"


class Page(HTMLParser):
    """A parsed page: table rows, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        """First cell -> cells, of the first row that begins so."""
        self.all_rows: list[tuple[str, list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._cells: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._cells = []
        elif tag in ("td", "th") and self._cells is not None:
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._cells:
            self.rows.setdefault(self._cells[0], self._cells)
            self.all_rows.append((self._cells[0], self._cells))
            self._cells = None

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._cells:
            self._cells[-1] += data + " "

    def row(self, start: str) -> list[str]:
        return next(cells for first, cells in self.rows.items() if " ".join(first.split()).startswith(start))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def make_scores(classes: int, accuracy: float) -> Scores:
    right = round(100 * accuracy)
    rest = 100 - right
    confusion = tuple(
        tuple(right if a == t else rest if a == (t + 1) % classes else 0 for a in range(classes))
        for t in range(classes)
    )
    return Scores(accuracy, accuracy, (accuracy - 0.03, accuracy + 0.03), accuracy, 0.9, 0.04, confusion)


def _parity(reference: str, agreement: float, mean_dp: float, drop: float) -> Parity:
    return Parity(
        reference=reference,
        agreement=agreement,
        class_agreement=(agreement, None),
        mean_dp=mean_dp,
        max_dp=16 * mean_dp,
        mean_dlogit=4 * mean_dp,
        max_dlogit=64 * mean_dp,
        drop=drop,
        drop_interval=(drop - 0.01, drop + 0.015),
        drop_bound=drop + 0.013,
        class_drop=(drop, None),
    )


def make_report(labels: tuple[str, ...], mistakes: tuple[Mistake, ...] = (), **changes: Any) -> Report:
    comparison = {"teacher": 0.84, "student": 0.82, "qat": 0.81, "litert-fp32": 0.82, "litert-int8": 0.801}
    sizes = {"teacher": 26_400_000, "student": 6_000_000, "litert-fp32": 4_000_000, "litert-int8": 1_100_000}
    latency = {"teacher": 48.0, "student": 12.0, "litert-fp32": 3.0, "litert-int8": 1.2}
    scores = {name: make_scores(len(labels), value) for name, value in comparison.items()}
    parity = {
        "litert-fp32": _parity("pruned", 1.0, 0.00001, 0.0),
        "litert-int8": _parity("qat", 0.968, 0.0123, 0.012),
    }

    def variants(split: str, less: float) -> tuple[Variant, ...]:
        return tuple(
            Variant(
                name=name,
                runtime=name.split("-")[0] if name in parity else "torch",
                precision="int8" if name in ("qat", "litert-int8") else "fp32",
                balanced_accuracy=value - less,
                balanced_accuracy_ci=(value - less - 0.03, value - less + 0.03),
                f1=value,
                auc=float("nan") if name == "qat" else 0.9,
                agreement=parity[name].agreement if name in parity else None,
                size_bytes=sizes.get(name),
                latency_ms=Latency(latency[name], 1.2 * latency[name]) if name in latency else None,
                threads=1 if name in latency else None,
                split=split,
                notes="int8 is only simulated in torch" if name == "qat" else "",
            )
            for name, value in comparison.items()
        )

    def history(epochs: int) -> list[dict[str, Any]]:
        return [
            {
                "epoch": n,
                "loss": 1 / n,
                "seconds": 3.0,
                "metrics": {
                    "combined": 0.7 + n / 50,
                    "balanced_accuracy": 0.7 + n / 50,
                    "auc": None if n == 1 else 0.8,
                    "loss": 1.2 / n,
                },
            }
            for n in range(1, epochs + 1)
        ]

    report = Report(
        name="solar-cells",
        version="1.0.0",
        created="2025-01-02T03:04:05Z",
        labels=labels,
        machine={"system": "Linux", "processor": "CPU & <b>co</b>"},
        versions={"torch": "2.9.0", "nncf": "not installed"},
        variants=variants("test", 0.0),
        validation_variants=variants("validation", -0.011),
        shipped="litert-int8",
        scores=scores,
        parity=parity,
        reliability={
            "before": (Bin(0.6, 0.5, 0.3), Bin(0.95, 0.85, 0.7)),
            "after": (Bin(0.55, 0.54, 0.4), Bin(0.9, 0.89, 0.6)),
        },
        mistakes=mistakes,
        histories={"head": history(6), "student": history(8), HOSTILE: history(1)},
        stages=(StageSummary("split", 1.5, 200.0, "three splits"), StageSummary("teach", 245.0, 2100.0, HOSTILE)),
        use={"litert": "litert-int8"},
        reasons={"litert": "faster: int8 1.20 ms, fp32 3.00 ms"},
        refused={"openvino-int8": "mean |dp| 0.0300 > 0.02"},
        confidence=Confidence(temperature=1.31, bias=(0.5, -0.5) if len(labels) == 2 else ()),
        weights={"teacher": "hub", "student": "packaged"},
        pruning={
            "method": "channel",
            "macs_before": 5e7,
            "macs_after": 3e7,
            "macs_target": 0.62,
            "parameters_before": None,
        },
        exact_int8_agreement=0.973,
        test_accesses=1,
        counts={
            split: dict.fromkeys(labels, count) for split, count in (("train", 70), ("validation", 15), ("test", 16))
        },
        recipe={
            "run": {"name": "solar-cells", "seed": 0},
            "data": {"path": HOSTILE, "split": (0.7, 0.15, 0.15), "skip_unreadable": False},
            "gate": {"min_agreement": 0.95, "max_dp": 0.02, "max_drop": 0.03},
        },
        notices=(NOTICE,),
    )
    return msgspec.structs.replace(report, **changes)


def predictions(
    classes: int, n: int = 400, seed: int = 0, separate: float = 1.5
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=n)
    return softmax(rng.normal(size=(n, classes)) + separate * np.eye(classes)[targets]), targets


def scored(labels: tuple[str, ...], costs: Costs | None = None, **changes: Any) -> Report:
    """A report whose test metrics all come from one set of predictions."""
    p, targets = predictions(len(labels))
    decision = choose_decision(costs, labels, p, targets, currency="EUR")
    predicted = decide(p, p, labels, decision)
    report = make_report(labels)
    found = intervals(p, predicted, targets, costs=costs)
    cost = None
    if decision is not None:
        test = split_cost("test", decision, labels, p, targets, constant=0, interval=found["cost"])
        both = (msgspec.structs.replace(test, split="validation", interval=None), test)
        cost = CostFigures(decision=decision, bayes_threshold=0.0909, constant_label=labels[0], splits=both)
    return msgspec.structs.replace(
        report,
        scores={"teacher": score(p, targets), "litert-int8": score(p, targets)},
        decided=score(p, targets, predicted=predicted) if decision else None,
        intervals={"litert-int8": found},
        cost=cost,
        variants=tuple(
            msgspec.structs.replace(r, pr_auc=0.8, cost=1234.5 if decision else None) for r in report.variants
        ),
        curves=tuple(
            c for name in ("litert-int8", "teacher") for c in score_curves(name, labels, p, targets, positive=labels[0])
        ),
        **changes,
    )


def complete(labels: tuple[str, ...], costs: Costs | None = None, **changes: Any) -> Report:
    """A report with everything that a page can show, as `collect_report` makes it."""
    changes = {
        "robustness": Robustness(
            images=200,
            windows=100,
            window_frames=30,
            balanced_accuracy=0.8,
            flagged=0.0,
            rows=tuple(
                RobustnessRow(
                    change=f"{change} {labels[0]}",
                    balanced_accuracy=0.8 - drop,
                    drop=drop,
                    confidence=0.93,
                    flagged=1 - drop,
                    reason="darker than 99 % of the training images; check light, focus and view",
                )
                for change, drop in (("light x0.3", 0.3), ("blur", 0.02))
            ),
        ),
        "test_losses": {name: PairedLoss(0.012, (-0.004, 0.031), 0.028) for name in ("litert-fp32", "litert-int8")},
        "distillation": PairedLoss(-0.021, (-0.04, -0.003), -0.006),
        "positive_class": labels[0],
        "split_by": "stratified",
        "strategy": "stratified by label",
        "warnings": (f"class {labels[-1]} has 12 training images",),
        "hashes": {"data": "ab" * 32, "bundle manifest": "cd" * 32},
        "layers": tuple(
            LayerSize(
                name=f"backbone.blocks.{n}.0.conv_pwl",
                shape=(96, 16, 1, 1),
                parameters=1536,
                fp32_bytes=6144,
                int8_bytes=1920,
            )
            for n in range(3)
        ),
        "artefact_sizes": {"litert-int8": ArtefactSize(constants=900_000, graph=200_000)},
        "test_log": "images/.eyas/test-sets/" + "ef" * 16 + ".jsonl",
        **changes,
    }
    report = scored(labels, costs, **changes)
    ship = decide_to_ship(report, AcceptSection(min_balanced_accuracy=0.6, min_recall=0.5))
    return msgspec.structs.replace(report, ship=ship, facts=key_facts(report), signals=judge(report))
