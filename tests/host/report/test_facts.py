"""What a reader asks first, in words, and reports without paths of the machine."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_host.evaluation.metrics import PairedLoss, score
from eyas_host.report.facts import key_facts
from eyas_host.report.glossary import TERMS, Glossary
from eyas_host.report.html import render_html
from eyas_host.report.model import Mistake, Report
from eyas_host.report.page import confused_pairs
from eyas_host.report.portable import portable, without_roots
from eyas_host.report.signals import class_names
from tests.support.report_parts import Page, make_report


def confused(matrix: list[list[int]]) -> Report:
    counts = np.array(matrix)
    targets = np.repeat(np.arange(len(counts)), counts.sum(axis=1))
    predicted = np.concatenate([np.repeat(np.arange(len(counts)), row) for row in counts])
    labels = tuple("abcdefghijklmnop"[: len(counts)])
    own = score(0.9 * np.eye(len(counts))[predicted] + 0.1 / len(counts), targets)
    return msgspec.structs.replace(make_report(labels), scores={"litert-int8": own})


def test_the_worst_class_is_named_with_what_it_is_taken_for() -> None:
    facts = key_facts(confused([[50, 5, 5], [2, 40, 8], [0, 1, 39]]))
    assert facts["worst class"].startswith("b: 80.0 % of its 50 test images found, 95 % interval 67.0 % to 88.8 %")
    assert facts["worst class"].endswith("most often taken for c (8)")
    assert "small classes" not in facts
    assert key_facts(confused([[40, 0], [0, 50]]))["worst class"].endswith("100.0 %"), "no confusion to name"


@pytest.mark.parametrize(("count", "line"), [(1, "1 class has fewer"), (3, "3 classes have fewer"), (9, "3 more")])
def test_small_classes_are_one_line(count: int, line: str) -> None:
    matrix = np.diag([12] * count + [60] * 3).tolist()
    fact = key_facts(confused(matrix))["small classes"]
    assert line in fact and "a (12)" in fact and "\n" not in fact


def test_what_distillation_bought_in_words() -> None:
    def said(*loss: float) -> str:
        value, low, high = loss
        report = msgspec.structs.replace(make_report(("a", "b")), distillation=PairedLoss(value, (low, high), high))
        return key_facts(report)["distillation"]

    assert "bought 2.1 points" in said(-0.021, -0.04, -0.003) and "95 % interval 0.3 to 4.0" in said(
        -0.021, -0.04, -0.003
    )
    assert "cost 2.0 points" in said(0.02, 0.01, 0.03)
    noise = said(-0.005, -0.02, 0.012)
    assert "no difference beyond noise" in noise and "+0.5 points" in noise and "-1.2 to +2.0" in noise
    assert "distillation" not in key_facts(make_report(("a", "b")))


def test_what_int8_cost_on_the_test_set_stands_beside_the_gates_figure() -> None:
    report = make_report(("a", "b"), test_losses={"litert-int8": PairedLoss(-0.004, (-0.02, 0.011), 0.01)})
    text = key_facts(report)["int8"]
    assert "0.4 points gained of balanced accuracy on the test set, 95 % interval -2.0 to 1.1 lost" in text
    assert "1.2 points lost on validation, where the gate allowed 3.0" in text
    fp32 = tuple(msgspec.structs.replace(v, precision="fp32") for v in report.variants)
    assert "quantization cost nothing" in key_facts(msgspec.structs.replace(report, variants=fp32))["int8"]


def test_the_most_confused_pairs_by_images_then_by_fraction() -> None:
    pairs = confused_pairs([[5, 3, 0], [3, 90, 1], [0, 7, 1]])
    assert [pair[:3] for pair in pairs] == [(2, 1, 7), (0, 1, 3), (1, 0, 3), (1, 2, 1)]
    assert pairs[0][3] == pytest.approx(7 / 8)
    assert confused_pairs(np.eye(4, dtype=int).tolist()) == []
    assert len(confused_pairs(np.ones((40, 40), dtype=int).tolist())) == 10


def test_labels_that_run_from_right_to_left_are_isolated_in_a_sentence() -> None:
    scratch = "\u05e1\u05e8\u05d9\u05d8\u05d4"
    assert class_names(["ok", scratch]) == f"ok and \u2068{scratch}\u2069"
    assert class_names(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


def test_a_term_links_to_its_entry_and_an_unknown_one_is_an_error() -> None:
    glossary = Glossary()
    link = glossary.term("roc_auc", 'ROC <"')
    assert 'href="#term-roc_auc"' in link and "ROC &lt;&#34;" in link and TERMS["roc_auc"][1] in link
    assert [key for key, _, _ in glossary.entries()] == ["roc_auc"]
    assert glossary.known("litert-int8") == "litert-int8"
    with pytest.raises(KeyError):
        glossary.term("rocauc")


def test_no_path_of_the_machine_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, data, run = tmp_path / "home" / "ann", tmp_path / "data" / "line 1", tmp_path / "work" / "runs" / "a"
    for folder in (home, data, run):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "work")
    mistake = Mistake(f"{data}/ok/1.png", "ok", "a", 0.9)
    report = make_report(
        ("ok", "/a"),
        (mistake,),
        warnings=(f"{data}: 3 images; see {run}/split, {home}/x.csv and {data}2", f"{tmp_path}/work/y"),
        test_log=f"{home}/.local/share/eyas/test-sets/1.jsonl",
        recipe={"data": {"path": str(data), "more": [{"path": "/mnt/other/line2.csv"}]}, "run": {"name": "a"}},
    )
    shown = portable(report, (data, run))
    assert shown.mistakes[0].path == "line 1/ok/1.png" and shown.labels == ("ok", "/a")
    assert shown.warnings[0].startswith("line 1: 3 images; see a/split, ~/x.csv and ") and shown.warnings[1] == "work/y"
    assert str(data) + "2" in shown.warnings[0], "another folder that begins alike is no root"
    assert shown.recipe["data"] == {"path": "line 1", "more": [{"path": "line2.csv"}]}
    assert shown.test_log == "~/.local/share/eyas/test-sets/1.jsonl"
    clean = msgspec.structs.replace(report, warnings=())
    text = render_html(portable(clean, (data, run)), files={"line 1/ok/1.png": mistake.path})
    assert not re.search(re.escape(str(tmp_path)) + r"|ann/", text)
    assert "line 1/ok/1.png" in Page(text).text
    monkeypatch.delenv("HOME")
    assert without_roots(("/", "x"), ("/",)) == ("/", "x"), "a root of all is none"
