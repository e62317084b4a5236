"""The card and the bill of materials say what the version's files say, and claim nothing that was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from eyas_host.versions.bom import bill_of_materials
from eyas_host.versions.card import version_card
from eyas_host.versions.collect import read_run
from eyas_host.versions.registry import CHAMPION, Registry
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.finished_run import finish_run


@pytest.fixture
def registry(pristine_bundle: Path, tmp_path: Path) -> Registry:  # noqa: F811 - fixture
    """1.0.0 serves, 1.1.0 follows it and was never measured."""
    registry = Registry(tmp_path / "registry", now=lambda: 1_700_000_000.0, by="me")
    for version, more in (
        ("1.0.0", {"accuracy": 0.9, "notices": ("Images are licensed for non-commercial use.",)}),
        ("1.1.0", {"accuracy": None}),
    ):
        run = finish_run(tmp_path / version, pristine_bundle, version, **more)  # type: ignore[arg-type]
        parent = "1.0.0" if version != "1.0.0" else ""
        registry.add(read_run(run, now=1_700_000_000.0, note="a | b <i>c</i>", parent=parent), run)
    registry.set_alias(CHAMPION, registry.find("1.0.0"))
    return registry


def head_of(card: str) -> dict[str, Any]:
    """The YAML head."""
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_its_head_is_what_the_hub_reads(registry: Registry) -> None:
    record = registry.find("1.0.0")
    head = head_of(version_card(registry, record, license_id="apache-2.0"))
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "image-classification"
    assert head["datasets"] == [f"sha256:{record.data.data}"]
    [entry] = head["model-index"]
    assert entry["name"] == record.name
    [result] = entry["results"]
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures["accuracy"] == 0.9 and figures["f1"] == pytest.approx(record.figures[record.shipped].f1, abs=1e-4)
    assert head_of(version_card(registry, record))["license"] == "other"


def test_its_body_has_the_figures_of_the_run_and_the_lineage(registry: Registry) -> None:
    record = registry.find("1.0.0")
    card = version_card(registry, record, drift=["3 devices report it: 3 stable."])
    row = re.search(rf"\| \*\*{record.shipped}\*\* \| 0\.900 \| 0\.800 to 0\.900 \|", card)
    assert row, card
    assert "(champion)" in card and "followed by: tiny-shapes@1.1.0" in card
    assert "torch 2.13.0" in card and "| test | 15 |" in card
    assert "3 devices report it: 3 stable." in card
    assert "the model is not for a product" in card, "its images say so"
    assert r"a \| b \<i\>c\</i\>" in card, "a note is text"
    for label in record.labels:
        assert re.search(rf"^\| {label} \| \d+ \| [0-9.]+ \|", card, re.MULTILINE), label


def test_a_version_without_a_report_claims_nothing(registry: Registry) -> None:
    card = version_card(registry, registry.find("1.1.0"))
    assert "model-index" not in head_of(card)
    assert "Nobody measured it on held-out images" in card
    assert card.count("Not measured.") == 4
    assert "Follows: tiny-shapes@1.0.0" in card


def test_the_bill_of_materials_is_valid_and_names_all(registry: Registry) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    for version in ("1.0.0", "1.1.0"):
        record = registry.find(version)
        document = bill_of_materials(record, license_id="apache-2.0")
        errors = validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(json.dumps(document))
        assert errors is None, errors
        model = document["metadata"]["component"]
        assert {part["name"] for part in model["components"]} == set(record.files)
        assert {part["purl"] for part in document["components"] if "purl" in part} == {
            "pkg:pypi/numpy@2.4.0",
            "pkg:pypi/torch@2.13.0",
        }
        measured = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
        assert bool(measured) == (version == "1.0.0")
    assert bill_of_materials(record) == bill_of_materials(record), "the same again"
