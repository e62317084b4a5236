"""The pages in a real browser: nothing is cut or overflows at any width or on paper, and axe-core finds no fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from eyas_host.evaluation.labelled_figures import (
    Agreement,
    ArtefactFigures,
    Evaluation,
    LabelFigures,
    WrongPrediction,
)
from eyas_host.evaluation.overlap import Overlap, SeenImage
from eyas_host.report.html import render_html
from eyas_host.report.labelled_set import render_evaluation
from eyas_host.report.model import Explanations, Mistake
from tests.support.browser import (
    CUT_BOXES,
    CUT_CELLS,
    NARROW_PLOTS,
    PAPER_WIDTH,
    SMALL_TEXT,
    WIDER_THAN_THE_PAGE,
    chromium,
)
from tests.support.report_parts import complete

WIDTHS = (390, 1280, 1920)
LONG = (
    "a scratch along the upper left edge of the housing, but short",
    "Kratzer_auf_der_Oberfläche_mit_Flugrost_und_Öl_verunreinigt_ß",
    "תווית ארוכה מאוד של מוצר פגום עם סריטות רבות לאורך הקצה העליון",
    "产品表面有划痕且边缘破损需要重新打磨并再次进行检验的零件类别标签",
    "ข้อบกพร่องที่พื้นผิวของชิ้นงานตามแนวขอบด้านบนและด้านล่าง",
    "🔧🔩 tools left inside 🧰",
    "x" * 60,
    "a" * 30 + " " + "b" * 29,
    "OK",
    "ok.",
)


def labels_of(count: int) -> tuple[str, ...]:
    return ("defective", "ok") if count == 2 else tuple(f"{n} {LONG[n % 10]}"[:60] for n in range(count))


@cache
def report_page(classes: int, folder: Path) -> str:
    """A page with mistakes, overlays and examples; two classes have a cost table, ten have costs, forty have none."""
    labels = labels_of(classes)
    costs = 5.0 * (1 - np.eye(classes)) + np.eye(1, classes).T * 90 * (1 - np.eye(classes)) if classes <= 10 else None
    image = folder / "image.png"
    cv2.imwrite(str(image), np.full((40, 60, 3), 120, np.uint8))
    mistakes = (
        Mistake(str(image), labels[0], labels[-1], 0.97, 50.0),
        Mistake("gone/" + "very-long-name-" * 6 + ".png", labels[-1], labels[0], 0.9, 5.0),
    )
    report = complete(labels, costs, mistakes=mistakes)
    if classes == 10:
        report = msgspec.structs.replace(
            report, name="drawn-" * 10 + "shapes", refused={"onnx-int8": "agreement " * 20}
        )
    overlays = {str(image): np.full((64, 64, 3), 90, np.uint8)} if classes == 2 else {}
    reason = "" if overlays else "at 64 px the last convolution has 2 x 2 cells, too few to show a place"
    examples = {row.change: np.full((32, 32, 3), 60, np.uint8) for row in report.robustness.rows}  # type: ignore[union-attr]
    return render_html(report, Explanations(overlays, reason), examples)


@cache
def evaluation_page(_folder: Path) -> str:
    labels = labels_of(10)
    confusion = tuple(tuple(20 if a == b else (a + b) % 3 for b in range(10)) for a in range(10))
    figures = LabelFigures(
        label="", images=30, precision=0.9, recall=0.9, recall_ci=(0.8, 0.95), f1=0.9, auc=0.97, average_precision=0.9
    )
    artefact = ArtefactFigures(
        name="openvino-fp32", runtime="openvino", runtime_version="2026.1.0", precision="fp32", accuracy=0.8,
        accuracy_ci=(0.7, 0.9), balanced_accuracy=0.8, balanced_accuracy_ci=(0.7, 0.9), f1=0.8, f1_ci=(0.7, 0.9),
        auc=0.9, auc_ci=(0.8, 0.95), pr_auc=0.8, pr_auc_ci=(0.7, 0.9), ece=0.03, classwise_ece=0.02, brier=0.2,
        nll=0.5, uncertain=0.1, packed_balanced_accuracy=0.85, confusion=confusion, reliability=(),
        labels=tuple(msgspec.structs.replace(figures, label=label) for label in labels),
    )  # fmt: skip
    other = msgspec.structs.replace(artefact, name="litert-int8", runtime="litert")
    evaluation = Evaluation(
        created="2026-01-01T00:00:00Z", bundle="drawn-shapes", bundle_version="1.0.0", bundle_sha256="ab" * 32,
        source="/data/" + "second-set-" * 6, labels=labels, images=300, counts=dict.fromkeys(labels, 30),
        main="openvino-fp32", artefacts=(artefact, other),
        parity=(Agreement(artefact=other.name, reference=artefact.name, agreement=0.98, mean_dp=0.01, max_dp=0.2),),
        mistakes=(WrongPrediction(path="/data/gone.png", label=labels[2], predicted=labels[6], confidence=0.9),),
        mistake_count=9, warnings=("one " * 40,), machine={"processor": "x" * 50},
        overlap=Overlap(checked=True, images=(
            SeenImage(path="p" * 70, original="q" * 70, split="train", match="near-duplicate", bits=9),
        )),
    )  # fmt: skip
    return render_evaluation(evaluation)


PAGES: dict[str, Callable[[Path], str]] = {
    "2 classes": lambda folder: report_page(2, folder),
    "10 long labels": lambda folder: report_page(10, folder),
    "40 classes": lambda folder: report_page(40, folder),
    "evaluation": evaluation_page,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_at_any_width_or_on_paper(name: str, page: Any, folder: Path) -> None:
    page.set_content(PAGES[name](folder))
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(WIDER_THAN_THE_PAGE) == [], width
        assert page.evaluate(CUT_CELLS) == [], width
        assert page.evaluate(NARROW_PLOTS) == [], width
        if width > 390:
            assert page.evaluate(CUT_BOXES) == [], width
        assert page.evaluate(SMALL_TEXT, 9) == [], width
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert page.evaluate(CUT_BOXES) == [] and page.evaluate(CUT_CELLS) == []
    assert page.evaluate(SMALL_TEXT, 6) == []


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [
        ("2 classes", "light", 1280),
        ("2 classes", "dark", 390),
        ("10 long labels", "light", 390),
        ("40 classes", "dark", 1280),
        ("evaluation", "light", 1280),
    ],
)
def test_axe_finds_no_serious_fault(name: str, scheme: str, width: int, page: Any, folder: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.set_content(PAGES[name](folder))
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    alike = {"exclude": [[".matrix tbody tr:nth-child(n+4)"]]}  # 1,600 cells take ten seconds
    found = Axe().run(page, context=alike, options={"resultTypes": ["violations"]}).response["violations"]
    faults = [
        (fault["id"], node["html"][:120], node.get("failureSummary", "")[:200])
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
    assert faults == []


def test_every_column_and_figure_is_explained_for_mouse_and_keyboard(page: Any, folder: Path) -> None:
    for name in PAGES:
        page.set_content(PAGES[name](folder))
        unexplained = page.evaluate("""() => [
            ...document.querySelectorAll('table:not(.matrix) > thead th, .tiles dt')
        ].filter(e => !e.querySelector('a.term')).map(e => e.textContent)""")
        artefacts = {"litert-fp32", "litert-int8"}  # columns of the parity of each label
        assert set(unexplained) <= artefacts, name
        lost = page.evaluate("""() => [...document.querySelectorAll('a.term')].filter(e => {
            const entry = document.querySelector(e.getAttribute('href'));
            const meaning = entry && entry.querySelector('dd').textContent;
            return e.title.length < 15 || e.tabIndex !== 0 || meaning !== e.title;
        }).map(e => e.textContent)""")
        assert lost == [], name
        assert page.locator("#glossary dt").count() >= 15
    page.locator(".tiles a.term").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#term-" + "accuracy"
    assert page.locator("#term-accuracy:target").is_visible()


def test_it_prints_every_class_with_the_plots(page: Any, folder: Path) -> None:
    page.set_content(PAGES["40 classes"](folder))
    printed = page.pdf(format="A4", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF") and 8 <= printed.count(b"/Type /Page\n") <= 40
