"""Pretrained student weights that ship with Eyas, and which networks use them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from eyas_host.models import pretrained
from eyas_host.models.factory import build
from eyas_host.models.weights import fit_to_images
from eyas_host.pipeline.runner import RunContext
from eyas_host.pretrain.card import Record, weights_card
from eyas_host.pretrain.images import SOURCES
from eyas_host.recipe import Recipe
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.stages.chain import STAGES
from eyas_host.support.errors import WeightsError

NETWORKS = pretrained.networks()
pytestmark = pytest.mark.usefixtures("no_hub")


def test_both_students_of_the_recipes_have_one() -> None:
    assert NETWORKS == ["mobilenetv3_large_100", "mobilenetv3_small_100"]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_small_and_fits_timms_network_tensor_by_tensor(name: str) -> None:
    path = pretrained.weights_file(name)
    assert path is not None and path.stat().st_size < 12e6
    shipped = safetensors.torch.load_file(path)
    assert {value.dtype for key, value in shipped.items() if key.startswith("backbone.conv")} == {torch.float16}
    whole, origin = build(name, 1000, "pretrained")
    assert origin == "pretrained" and whole.state_dict().keys() == shipped.keys()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value.half(), shipped[key].half(), rtol=0, atol=0)
    assert whole.mean.flatten().tolist() == [128.0] * 3
    few = build(name, 5, "pretrained", activation="relu")[0].backbone.state_dict()
    other = {key for key, value in few.items() if not torch.equal(value.half(), shipped[f"backbone.{key}"].half())}
    assert other == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", NETWORKS)
def test_its_card_and_record_say_how_it_was_made(name: str) -> None:
    record = msgspec.json.decode(pretrained.record_file(name).read_bytes(), type=Record)
    assert record.settings.student == name and record.result.finished
    assert set(record.images.values()) <= {source.package for source in SOURCES}
    assert all(re.fullmatch(r"[0-9a-f]{64}", sha) for sha in record.images)
    assert pretrained.card_file(name).read_text() == weights_card(record)


def test_who_takes_it() -> None:
    assert build("mobilenetv3_small_100", 5, "auto")[1] == "pretrained"
    with pytest.raises(WeightsError, match=r"no weights for mobilenetv3_small_100: hub: .*packaged: none"):
        build("mobilenetv3_small_100", 5, "auto", trained=True)
    assert build("mobilenetv3_small_100", 5, "pretrained", trained=True)[1] == "pretrained"
    with pytest.raises(
        WeightsError, match=r"pretrained: none for mobilenetv3_small_075 \(there are: .*mobilenetv3_small_100"
    ):
        build("mobilenetv3_small_075", 5, "pretrained")


def test_what_is_said_of_it_is_what_it_was_trained_on() -> None:
    model, origin = build("mobilenetv3_small_100", 5, "pretrained")
    said = fit_to_images(model.backbone, "mobilenetv3_small_100", origin, ImageSection(size=96))
    assert "pretrained weights, trained at 128 px (bilinear), here 96 px" in said.note and said.warnings == ()
    assert "mean 0.502, 0.502, 0.502" in said.note


def test_another_start_runs_the_students_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(weights: str) -> dict[str, dict[str, str]]:
        recipe = Recipe(
            run=RunSection(name="toy"),
            teacher=TeacherSection(model="mobilenetv3_small_100", weights=weights),  # type: ignore[arg-type]
            student=StudentSection(model="mobilenetv3_small_100", weights=weights),  # type: ignore[arg-type]
        )
        context = RunContext(recipe, tmp_path)
        stages = [stage for stage in STAGES if stage.name in ("teach", "distill")]
        return {stage.name: stage.sources(context) for stage in stages if stage.sources is not None}

    before = {weights: inputs(weights) for weights in ("auto", "pretrained", "random")}
    (tmp_path / "mobilenetv3_small_100.safetensors").write_bytes(b"others")
    monkeypatch.setattr(pretrained, "_WEIGHTS_FOLDER", tmp_path)
    changed = {
        weights: {stage for stage, value in inputs(weights).items() if value != before[weights][stage]}
        for weights in before
    }
    assert changed == {"auto": {"distill"}, "pretrained": {"teach", "distill"}, "random": set()}
