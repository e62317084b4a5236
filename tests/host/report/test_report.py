"""The HTML report, the model card and the bundle's README."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from eyas_device.bundle import Artefact, File, Manifest
from eyas_device.decision import Decision
from eyas_device.preprocess import Preprocessing, decode
from eyas_host.bundle.card import bundle_readme, model_card
from eyas_host.report.html import render_html, verdict
from eyas_host.report.model import Mistake, StageSummary
from eyas_host.report.page import duration, megabytes, number, percent, small
from tests.support.report_parts import HOSTILE, NOTICE, Page, make_report


def make_manifest() -> Manifest:
    def artefact(name: str, runtime: Any, size: int) -> Artefact:
        return Artefact(name, runtime, "int8", (File(f"{name}.bin", "ab" * 32, size),))

    return Manifest(
        schema=1,
        name="solar-cells",
        version="1.0.0",
        labels=("defective", "ok", HOSTILE),
        preprocessing=Preprocessing(size=128),
        artefacts=(artefact("litert-int8", "litert", 1_100_000), artefact("onnx-int8", "onnx", 1_500_000)),
        use={"litert": "litert-int8"},
        reasons={"litert": "faster: int8 1.20 ms, fp32 3.00 ms"},
        evidence={
            "litert-int8": {
                "split": "validation",
                "balanced_accuracy": 0.8123,
                "classwise_ece": 0.0213,
                "agreement": 0.968,
                "mean_dp": 0.0123,
                "latency_ms_p50": 1.2,
                "latency_ms_p90": None,
            }
        },
        notices=(NOTICE, "images by <someone>"),
    )


@pytest.fixture
def mistakes(tmp_path: Path) -> tuple[Mistake, ...]:
    image = tmp_path / "cell <b>1.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8))
    return (
        Mistake(str(image), "ok", "defective", 0.973),
        Mistake(str(tmp_path / "gone" / f"{HOSTILE.replace('/', '')}.png"), "defective", "ok", 0.91),
        Mistake("null\0byte.png", "defective", "ok", 0.9),
    )


def test_comparison_shows_test_and_validation_and_marks_what_was_not_measured(mistakes: tuple[Mistake, ...]) -> None:
    page = Page(render_html(make_report(("defective", "ok"), mistakes)))
    shipped = page.row("litert-int8 shipped")
    assert "80.1 %" in shipped[1] and "val. 81.2 %" in shipped[1]
    assert "96.8 %" in shipped[5] and "1.1 MB" in shipped[6] and "1.20 / 1.44 ms" in shipped[7]
    assert shipped[8].split("  ")[0].strip().startswith("95 % accuracy")
    assert "24× smaller" in shipped[8] and "40× faster" in shipped[8]  # noqa: RUF001
    qat = page.row("qat")
    assert [cell.strip() for cell in qat[6:8]] == ["not measured"] * 2
    assert qat[3].startswith("not measured"), "an AUC of NaN is not a number to show"
    assert "only simulated" in qat[0]
    assert page.row("teacher")[8].strip() == "teacher"


def test_every_section_has_its_content(mistakes: tuple[Mistake, ...]) -> None:
    report = make_report(("defective", "ok"), mistakes)
    page = Page(render_html(report))
    assert verdict(report) in page.text
    for text in (
        NOTICE,
        "read once",
        "mean |dp| 0.0300 > 0.02",
        "faster: int8 1.20 ms, fp32 3.00 ms",
        "97.3 %",
        "temperature of 1.31",
        "Expected calibration error 10.0 %.",
        "50.0 to 30.0 million multiply-accumulates (60.0 %; 62.0 % allowed)",
        "teacher hub, student packaged",
        "4 min 05 s",
        "2,100 MB",
        "not installed",
        "0.7, 0.15, 0.15",
        "teacher: head",
        "confidence 97 %",
    ):
        assert text in page.text, text
    assert page.row("litert-fp32")  # the first table that has it
    counted = [[" ".join(c.split()) for c in cells] for first, cells in page.all_rows if first.strip() == "ok"]
    assert ["ok", "70 50 %", "15 50 %", "16 50 %", "101"] in counted
    assert page.row("exact int8 arithmetic")[2].strip() == "97.3 %"
    assert "at least 95.0 %" in page.row("allowed by the recipe")[2]
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and (attrs.get("viewbox") or "").count(" ") == 3]
    assert len([a for a in plots if "class" not in a]) == 1 + 3 + 2, (
        "scatter, three trainings, two reliability diagrams"
    )
    assert all(attrs.get("aria-label") for attrs in plots)


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        (True, "The network of each round was measured, on a board with litert."),
        (False, "Nothing after the dense network was measured: measure the pruned one on a board."),
    ],
)
def test_predicted_latencies_name_what_the_model_was_fitted_to(
    measured: bool, sentence: str, mistakes: tuple[Mistake, ...]
) -> None:
    points = [
        {
            "round": number,
            "predicted_ms": ms,
            "measured_ms": None,
            "fraction": ms,
            "macs": 1e7,
            "balanced_accuracy": 0.8,
        }
        for number, ms in enumerate((1.0, 0.6))
    ]
    latency = {"runtime": "litert", "board": "a board", "measured": measured, "model_fitted_to": "a core"}
    report = make_report(
        ("defective", "ok"), mistakes, pruning={"method": "channel", "front": points, "latency": latency}
    )
    text = Page(render_html(report)).text
    assert "its constants were fitted to a core." in text and sentence in text


def test_page_is_self_contained_and_small(mistakes: tuple[Mistake, ...]) -> None:
    text = render_html(make_report(("defective", "ok"), mistakes))
    assert len(text.encode()) < 1_500_000
    assert "http://" not in text and "https://" not in text and "@import" not in text
    addresses = [
        value
        for tag, attrs in Page(text).tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert any(a and a.startswith("data:image/jpeg;base64,") for a in addresses)
    assert all(a and a.startswith(("data:image/", "#")) for a in addresses), addresses
    assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", text))


@pytest.mark.parametrize("labels", [("defective", HOSTILE), ("a", HOSTILE, '"><img src=x onerror=alert(1)>')])
def test_hostile_text_stays_text(labels: tuple[str, ...], mistakes: tuple[Mistake, ...]) -> None:
    mistakes += (Mistake('"><script>x.png', labels[1], labels[-1], 0.8),)
    report = make_report(labels, mistakes, name=HOSTILE, notices=(HOSTILE,), shipped="litert-int8")
    hostile = msgspec.structs.replace(report.variants[0], name=HOSTILE, notes=HOSTILE)
    text = render_html(msgspec.structs.replace(report, variants=(*report.variants, hostile)))
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link")]
    assert "<b>co" not in text
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert [str(attrs["src"])[:11] for tag, attrs in page.tags if tag == "img"] == ["data:image/"]
    assert HOSTILE in page.text
    assert page.text.count("CPU & <b>co</b>") == 2  # where variants and where stages are listed
    assert len(next(cells for first, cells in page.rows.items() if first.startswith("true"))) == len(labels) + 1


def test_missing_image_is_reported_and_present_one_is_shrunk(mistakes: tuple[Mistake, ...]) -> None:
    page = Page(render_html(make_report(("defective", "ok"), mistakes)))
    assert page.text.count("image not found") == 2
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    data = base64.b64decode((image["src"] or "").partition(",")[2])
    assert decode(data).shape == (64, 128, 3)
    assert image["alt"] == "Image labelled ok, predicted defective"


def test_report_with_almost_no_content_still_renders() -> None:
    report = make_report(("a", "b"))
    bare = tuple(
        msgspec.structs.replace(r, latency_ms=None, size_bytes=None, threads=None) for r in report.variants[1:]
    )
    report = msgspec.structs.replace(
        report,
        variants=bare,
        validation_variants=(),
        scores={},
        parity={},
        reliability={},
        histories={},
        stages=(),
        refused={},
        weights={},
        pruning={},
        recipe={},
        notices=(),
        test_accesses=2,
    )
    page = Page(render_html(report))
    assert "No latency was measured." in page.text
    assert "every artefact passed" in page.text
    assert "read 2 times" in page.text
    assert "latency not measured, size not measured." in verdict(report)
    assert "was not measured" in verdict(msgspec.structs.replace(report, shipped="none"))


def test_verdict_is_one_sentence() -> None:
    assert verdict(make_report(("a", "b"))) == (
        "The shipped model litert-int8 reaches 80.1 % balanced accuracy on unseen images, in 1.20 ms per image, "
        "in 1.1 MB: 95 % of the teacher's balanced accuracy, 24× smaller and 40× faster than the teacher in torch."  # noqa: RUF001
    )


def test_a_run_that_moved_names_both_machines_and_both_versions() -> None:
    """Figures keep the machine and the libraries that they were measured with."""
    desk = {"processor": "Desk <i>9</i>", "cores": "8"}
    server = {"processor": "Server 3", "gpu": "H100", "cores": "64"}
    stages = (
        StageSummary("teach", 245.0, 2100.0, "trained", (server,), {"torch": "2.8.0", "timm": "1.0"}),
        StageSummary("qat", 9.0, 210.0, "int8", (server, desk), {"torch": "2.9.0"}),
        StageSummary("verify", 9.0, 210.0, "passed", (desk,), {"torch": "2.9.0"}),
    )
    page = Page(render_html(make_report(("a", "b"), machine=desk, versions={"torch": "2.9.0"}, stages=stages)))
    text = " ".join(" ".join(page.texts).split())
    assert "Latency: one image at a time on Desk <i>9</i>." in text and "on 2 machines (below)" in text
    assert "Machine of the latencies qat, verify" in text and "Another machine teach, qat" in text
    assert text.index("Desk <i>9</i>") < text.index("Server 3") and "H100" in text
    assert "other in teach torch 2.8.0" in text and "other in qat" not in text


def test_number_formats() -> None:
    assert [number(v) for v in (1.2, 0.01234, 1234.5, 0.0, None)] == ["1.20", "0.0123", "1,234", "0.00", "not measured"]
    assert [duration(s) for s in (1.52, 59.7, 200, 7500)] == ["1.5 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
    assert [megabytes(s) for s in (1_130_000, 45_000, None)] == ["1.1 MB", "45.0 kB", "not measured"]
    assert percent(float("nan")) == "not measured"
    assert [small(v) for v in (0.00001, 0.0123, 0.0, None)] == ["< 0.0001", "0.0123", "0.0000", "not measured"]


def test_card_has_labels_notices_and_evidence() -> None:
    costs = ((0.0, 9.0, 9.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0))
    manifest = msgspec.structs.replace(make_manifest(), decision=Decision(costs=costs))
    training = {"Teacher": "tf_efficientnet_lite0 from the hub."}
    card = model_card(manifest, training=training, strategy="by group, near-duplicates in one split")
    for text in (
        "# solar-cells 1.0.0",
        "- defective\n- ok\n",
        f"**{NOTICE}**",
        "images by &lt;someone&gt;",
        "- Teacher: tf\\_efficientnet\\_lite0 from the hub.",
        "| litert-int8 | litert | int8 | 1.10 MB | validation | 0.812 | 0.021 | 0.968 | 0.0123 | 1.20 ms | not",
        "| onnx-int8 | onnx | int8 | 1.50 MB | " + " | ".join(["not measured"] * 7) + " |",
        "- litert runs litert-int8: faster: int8 1.20 ms, fp32 3.00 ms",
        "Training, validation and test: by group, near-duplicates in one split",
        "takes the cost of mistakes into account: the label with the least expected cost.",
    ):
        assert text in card, text
    assert "<script" not in card
    assert "The prediction is the label with the largest logit" in model_card(
        make_manifest(), training={}, strategy="stratified"
    )


def test_readme_shows_how_to_run_and_its_program_is_valid_python() -> None:
    readme = bundle_readme(make_manifest())
    for command in (
        "pip install ./eyas_device-*.whl",
        "eyas-device check .",
        "eyas-device run --bundle . --camera folder:PATH",
    ):
        assert command in readme
    program = readme.partition("```python\n")[2].partition("```")[0]
    compile(program, "README.md", "exec")
    assert 'Classifier.open(".")' in program and ".predict(" in program
    assert "<script" not in readme
