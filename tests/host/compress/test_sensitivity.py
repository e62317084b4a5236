"""Layer sensitivity to int8 and the float fallback; an interrupted measurement resumes."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf.torch.function_hook import get_hook_storage
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from eyas_device.bundle import sha256
from eyas_host.cli import app
from eyas_host.compress.quantize import sensitivity
from eyas_host.compress.quantize.fallback import Fallback, balanced_rows, choose_fallback, fallback_layers
from eyas_host.compress.quantize.mixed import (
    MAX_SNR_DB,
    Degradation,
    MixedPrecision,
    degradation,
    drop_layers,
    signal_to_noise,
)
from eyas_host.compress.quantize.sensitivity import LayerSensitivity, Sensitivity, load_sensitivity, measure_sensitivity
from eyas_host.data.index import LabelledImage
from eyas_host.data.manifest import SplitManifest, save_split
from eyas_host.evaluation.inference import logits_of
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier
from eyas_host.models.pruned import PrunePlan
from eyas_host.pipeline.runner import SENSITIVITY, RunContext, Stage, StageResult, run_chain
from eyas_host.quant.fold import DeployModel
from eyas_host.quant.graph import weighted_layers
from eyas_host.quant.qat import load_qat, prepare_qat, save_qat
from eyas_host.quant.quantizers import (
    activation_quantizers,
    check_placement,
    hook_owners,
    present_placement,
    weight_quantizers,
)
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import load_recipe
from eyas_host.report import plots
from eyas_host.support.errors import CompressError, StageError
from eyas_host.train.checkpoint import save_tensors
from tests.support.inside import eyas
from tests.support.networks import V3_SMALL
from tests.support.shapes import SHAPES, Pixels

CPU = torch.device("cpu")
EXAMPLE = torch.zeros(1, 3, 64, 64)
LAYER = "backbone.blocks.3.0.conv_pwl"
OTHERS = ("backbone.conv_stem", "backbone.blocks.0.0.se.conv_expand", "backbone.blocks.4.1.conv_dw")
FEW = (*OTHERS[:2], LAYER, OTHERS[2])
"""In order of execution."""
TARGETS = np.arange(5).repeat(4)
GRID = (0.02, 400.0)
"""Factors on the scale of a layer's weights that clip nearly all of them, or round them all to zero."""


@pytest.fixture(scope="module")
def few(quantized: nn.Module) -> nn.Module:
    """The int8 network with all layers but `FEW` in float."""
    names = [layer.name for layer in weighted_layers(quantized, EXAMPLE)]
    assert len(names) == V3_SMALL["weights"]
    return drop_layers(quantized, set(names) - set(FEW), input_size=64)


def damaged(model: nn.Module, layer: str = LAYER, factor: float = GRID[0]) -> nn.Module:
    model = copy.deepcopy(model)
    quantizer = weight_quantizers(model)[f"{layer.replace('.', '/')}/conv2d/0"]
    with torch.no_grad():
        quantizer.scale.mul_(factor)
    return model


def judged(model: nn.Module, frames: Pixels) -> MixedPrecision:
    return MixedPrecision(model, frames, TARGETS, device=CPU)


# Figures


@given(st.integers(0, 2**31), st.floats(1e-6, 1e3))
def test_signal_to_noise_is_the_ratio_of_the_norms(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(7, 3)).astype(np.float32)
    logits = (reference + size * rng.normal(size=(7, 3))).astype(np.float32)
    noise = np.linalg.norm(reference.astype(float) - logits)
    expected = 20 * np.log10(np.linalg.norm(reference.astype(float)) / noise) if noise else MAX_SNR_DB
    assert signal_to_noise(reference, logits) == pytest.approx(min(expected, MAX_SNR_DB), abs=1e-6)


def test_degradation_follows_its_definition() -> None:
    rng = np.random.default_rng(0)
    targets = np.array([0] * 20 + [1] * 6 + [2] * 4)
    reference = rng.normal(size=(30, 3)) + 3 * np.eye(3)[targets]
    logits = reference + rng.normal(size=(30, 3))
    found = degradation(reference, logits, targets, 1.7)

    def accuracy(values: npt.NDArray[np.float64]) -> float:
        return float(balanced_accuracy_score(targets, values.argmax(1)))

    def likelihood(values: npt.NDArray[np.float64]) -> float:
        return float(log_softmax(values / 1.7, axis=1)[np.arange(30), targets].mean())

    assert found.drop == pytest.approx(accuracy(reference) - accuracy(logits)) and found.drop != 0
    assert found.nll_increase == pytest.approx(likelihood(reference) - likelihood(logits)) and found.nll_increase != 0
    assert degradation(reference, reference, targets, 1.7) == Degradation(0.0, 0.0, MAX_SNR_DB)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 5))
def test_a_sample_is_balanced_over_the_classes(labels: list[int], count: int, seed: int) -> None:
    targets = np.array(labels)
    rows = balanced_rows(targets, count, seed)
    assert len(set(rows)) == len(rows) == min(count, len(labels))
    counts = [int((targets[rows] == label).sum()) for label in set(labels)]
    totals = [labels.count(label) for label in set(labels)]
    assert all(got >= min(total, max(counts) - 1) for got, total in zip(counts, totals, strict=True))
    assert list(balanced_rows(targets, count + 1, seed))[: len(rows)] == list(rows)


# Which layers to keep float


def never() -> Iterator[str]:
    raise AssertionError("no ranking was needed")
    yield ""


def test_no_layer_stays_in_float_within_the_bound() -> None:
    found = choose_fallback(never(), lambda names: 0.02, max_drop=0.02, max_layers=5)
    assert found == Fallback((), 0.02, (0.02,), 0.02) and found.enough
    assert str(found) == "int8 loses 0.020 balanced accuracy (bound 0.02): no layer needs to stay in float"


@given(st.lists(st.floats(0, 0.1), max_size=8), st.floats(0, 0.3), st.integers(0, 8), st.permutations(range(8)))
def test_the_fewest_layers_of_the_ranking_are_chosen(
    losses: list[float], bound: float, most: int, order: list[int]
) -> None:
    asked: list[tuple[str, ...]] = []

    def drop(names: tuple[str, ...]) -> float:
        asked.append(names)
        return sum(lost for number, lost in enumerate(losses) if str(number) not in names)

    ranked = [str(number) for number in order if number < len(losses)]
    found = choose_fallback(ranked, drop, max_drop=bound, max_layers=most)
    assert found.layers in asked and found.drop == drop(found.layers)
    assert len(found.layers) <= most and found.layers == tuple(n for n in ranked if n in found.layers)
    assert list(found.drops) == [drop(tuple(ranked[:count])) for count in range(len(found.drops))]
    assert found.enough == any(drop(tuple(ranked[:count])) <= bound for count in range(min(most, len(ranked)) + 1))
    if found.enough:
        for name in found.layers:
            assert drop(tuple(other for other in found.layers if other != name)) > bound
    else:
        assert found.drop == min(found.drops)


def test_an_unnecessary_layer_is_removed_again() -> None:
    drops = {("a",): 0.2, ("a", "b"): 0.1, ("a", "b", "c"): 0.01, ("b", "c"): 0.02, ("a", "c"): 0.2}
    found = choose_fallback("abcd", lambda names: drops.get(names, 0.3), max_drop=0.02, max_layers=4)
    assert found == Fallback(("b", "c"), 0.02, (0.3, 0.2, 0.1, 0.01), 0.02)
    assert "loses 0.300" in str(found) and "0.020 with quantize.keep_float = ['b', 'c']" in str(found)


def test_an_insufficient_fallback_is_reported() -> None:
    drops = {(): 0.3, ("a",): 0.1, ("a", "b"): 0.2}
    found = choose_fallback("abc", lambda names: drops[names], max_drop=0.05, max_layers=2)
    assert not found.enough and found.layers == ("a",)
    assert "even 2 float layers are not enough: the best is 0.100 with quantize.keep_float = ['a']" in str(found)
    assert "none improves it" in str(choose_fallback("ab", lambda names: 0.3, max_drop=0.05, max_layers=2))
    assert "no layer may stay in float" in str(choose_fallback("ab", lambda names: 0.3, max_drop=0.05, max_layers=0))


# Layers in int8 and in float


@pytest.mark.parametrize("factor", GRID, ids=["narrow", "wide"])
def test_a_damaged_layer_is_the_most_sensitive_and_float_repairs_it(
    few: nn.Module, shape_frames: Pixels, factor: float
) -> None:
    mixed, sound = judged(damaged(few, factor=factor), shape_frames), judged(few, shape_frames)
    assert tuple(mixed.layers) == FEW
    single = {name: mixed.only_int8(name) for name in FEW}
    assert max(single, key=lambda name: single[name].nll_increase) == LAYER
    assert min(single, key=lambda name: single[name].snr_db) == LAYER
    assert mixed.all_but((LAYER,)) == sound.all_but((LAYER,))
    assert mixed.all_but(()).snr_db < 6 < sound.all_but(()).snr_db
    assert mixed.all_but(()).drop > 0.3 > 0.1 > mixed.all_but((LAYER,)).drop


def test_the_fallback_keeps_exactly_the_damaged_layer(
    few: nn.Module, deploy: DeployModel, shape_frames: Pixels, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = damaged(few)
    before = {name: value.clone() for name, value in bad.state_dict().items()}

    def settings(max_drop: float, most: int) -> Recipe:
        tree = {"run": {"name": "x", "device": "cpu"}, "gate": {"max_drop": max_drop}, "quantize": {"fallback": most}}
        return msgspec.convert(tree, Recipe)

    found = fallback_layers(bad, deploy, shape_frames, TARGETS, settings(0.15, 3))
    assert found.layers == (LAYER,) and found.enough and len(found.drops) == 2
    assert LAYER in capsys.readouterr().err
    fixed = drop_layers(bad, found.layers, input_size=64)
    predicted = {
        name: logits_of(net, shape_frames, CPU).argmax(1) for name, net in (("deploy", deploy), ("int8", fixed))
    }
    lost = [balanced_accuracy_score(TARGETS, predicted[name]) for name in ("deploy", "int8")]
    assert lost[0] - lost[1] == pytest.approx(found.drop)
    assert fallback_layers(few, deploy, shape_frames, TARGETS, settings(0.3, 3)).layers == ()
    assert not fallback_layers(bad, deploy, shape_frames, TARGETS, settings(0.15, 0)).enough
    assert all(torch.equal(value, before[name]) for name, value in bad.state_dict().items())


def test_dropped_layers_are_those_that_were_never_quantized(
    quantized: nn.Module,
    deploy: DeployModel,
    calibration: list[torch.Tensor],
    shape_frames: Pixels,
    tmp_path: Path,
) -> None:
    names = FEW
    mixed = drop_layers(quantized, names, input_size=64)
    never_quantized = prepare_qat(deploy, calibration, input_size=64, keep_float=names)
    assert set(present_placement(mixed).activations) == set(present_placement(never_quantized).activations)
    assert set(present_placement(mixed).weights) == set(present_placement(never_quantized).weights)
    check_placement(mixed, EXAMPLE, keep_float=names)
    check_placement(quantized, EXAMPLE)
    before = quantized.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())

    logits = logits_of(mixed, shape_frames, CPU)
    both = judged(quantized, shape_frames)
    assert both.all_but(names) == degradation(both.reference, logits, TARGETS, both._temperature)
    again = judged(mixed, shape_frames)
    assert again.all_but(()) == both.all_but(names) and set(both.layers) - set(again.layers) == set(names)
    more = ("backbone.blocks.0.0.se.conv_reduce",)
    assert again.all_but(more) == both.all_but((*names, *more))
    save_qat(mixed, tmp_path)
    np.testing.assert_array_equal(logits_of(load_qat(deploy, tmp_path), shape_frames, CPU), logits)


def test_a_layer_that_does_not_exist_is_named(few: nn.Module, shape_frames: Pixels) -> None:
    with pytest.raises(CompressError, match=r"blocks\.3\.0\.conv_pwx.*conv_pwl"):
        drop_layers(few, ["backbone.blocks.3.0.conv_pwx"], input_size=64)
    with pytest.raises(CompressError, match="conv_pwx"):
        judged(few, shape_frames).all_but(["backbone.blocks.3.0.conv_pwx"])


def test_a_single_int8_layer_has_three_quantizers_and_the_reference_none(
    quantized: nn.Module, shape_frames: Pixels
) -> None:
    operation = "backbone/blocks/3/0/conv_dw/conv2d/0"
    points = {"/backbone/blocks/3/0/bn1/hardswish/0", operation}
    mixed = judged(quantized, shape_frames)
    layer = mixed.layers["backbone.blocks.3.0.conv_dw"]
    assert layer.operation == operation and {layer.reads, layer.writes} == {p.lstrip("/") for p in points}

    def only(activations: set[str], weights: set[str]) -> npt.NDArray[np.float32]:
        model = copy.deepcopy(quantized)
        places = hook_owners(get_hook_storage(model))
        for quantizers, kept in ((activation_quantizers(model), activations), (weight_quantizers(model), weights)):
            for name in set(quantizers) - kept:
                parent, attribute = places[id(quantizers[name])]
                delattr(parent, attribute)
        return logits_of(model, shape_frames, CPU)

    np.testing.assert_array_equal(mixed.reference, only(set(), set()))
    logits = only({layer.reads, layer.writes}, {operation})
    assert mixed.only_int8(layer.name) == degradation(mixed.reference, logits, TARGETS, mixed._temperature)
    assert 0 < mixed.only_int8(layer.name).snr_db < MAX_SNR_DB


# A run


@pytest.fixture
def run(tmp_path: Path, network: PixelClassifier, few: nn.Module, shape_frames: Pixels) -> RunContext:
    """A run whose split, prune and qat are finished; the validation split is the twenty frames."""
    images = []
    for row, frame in enumerate(shape_frames):
        path = tmp_path / f"{row}.png"
        assert cv2.imwrite(str(path), frame)
        images.append(LabelledImage(path=str(path), label=SHAPES[TARGETS[row]], sha256=sha256(path)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[run]\nname = "run"\ndevice = "cpu"\n[data]\npath = "."\n[image]\nsize = 64\n'
        '[prune]\nmethod = "none"\n[gate]\nmax_drop = 0.15\n'
    )
    context = RunContext(load_recipe(recipe), tmp_path / "runs/run")
    save_split(SplitManifest("", 0, (0.7, 0.15, 0.15), SHAPES, (), tuple(images), (), {}), context.root)
    save_tensors(context.root / checkpoints.PRUNED, network.state_dict())
    (context.root / checkpoints.PLAN).write_bytes(msgspec.json.encode(PrunePlan("none")))
    finish_qat(context, damaged(few))
    return context


def finish_qat(context: RunContext, model: nn.Module) -> None:
    def stage(context: RunContext) -> StageResult:
        save_qat(model, context.folder("qat"))
        return StageResult("done")

    run_chain([Stage("qat", (), (), stage)], context, only="qat")


class Interrupted(MixedPrecision):
    """Is interrupted at the third layer."""

    def only_int8(self, name: str) -> Degradation:
        if name == FEW[2]:
            raise KeyboardInterrupt
        return super().only_int8(name)


class Counted(MixedPrecision):
    """Counts the layers that are measured."""

    measured: list[str]

    def only_int8(self, name: str) -> Degradation:
        self.measured.append(name)
        return super().only_int8(name)


def test_an_interrupted_measurement_resumes_and_ends_the_same(run: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_sensitivity(run) is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sensitivity, "MixedPrecision", Interrupted)
        measure_sensitivity(run)
    assert load_sensitivity(run) is None
    Counted.measured = []
    monkeypatch.setattr(sensitivity, "MixedPrecision", Counted)
    found = measure_sensitivity(run)
    assert tuple(entry.layer for entry in found.layers) == FEW and Counted.measured == list(FEW[2:])
    assert load_sensitivity(run) == found
    assert found.ranked[0].layer == LAYER and found.images == 20
    assert found.advice is not None and found.advice.layers == (LAYER,)
    assert measure_sensitivity(run) == found and len(Counted.measured) == 2
    (run.root / SENSITIVITY).unlink()
    assert measure_sensitivity(run) == found and len(Counted.measured) == 6


def test_a_changed_model_or_other_images_start_over(
    run: RunContext, few: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Counted.measured = []
    monkeypatch.setattr(sensitivity, "MixedPrecision", Counted)
    first = measure_sensitivity(run)
    assert len(Counted.measured) == 4 and load_sensitivity(run) == first
    assert measure_sensitivity(run, images=10).images == 10
    assert len(Counted.measured) == 8
    finish_qat(run, few)
    assert load_sensitivity(run) is None
    second = measure_sensitivity(run, images=10)
    assert len(Counted.measured) == 12
    assert second.advice is not None and second.advice.layers == ()
    (run.root / SENSITIVITY).write_text('{"model": 1')
    assert load_sensitivity(run) is None
    assert measure_sensitivity(run, images=10) == second


def test_the_verb_shows_a_table_and_ends_with_the_advice(
    run: RunContext, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def finished(path: Path, runs: Path, overrides: list[str], until: str, *, yes: bool) -> Iterator[RunContext]:
        yield RunContext(load_recipe(path, overrides), run.root)

    monkeypatch.setattr("eyas_host.cli.sensitivity.prepared_run", finished)
    figures = run.root / "figures.json"
    recipe = run.root.parents[1] / "recipe.toml"
    words = [str(recipe), "--runs", str(run.root.parent), "--images", "10", "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", ["eyas", "sensitivity", *words, "--set", "quantize.fallback=2"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code
    out, err = capsys.readouterr()
    rows = [line.split()[1] for line in out.splitlines() if "backbone." in line]
    assert set(rows) == set(FEW) and rows[0] == LAYER and "all layers in int8" in out
    assert err.splitlines()[-1].startswith("sensitivity") and f"quantize.keep_float = ['{LAYER}']" in err
    assert load_sensitivity(run) == msgspec.json.decode(figures.read_bytes(), type=Sensitivity)

    (run.folder("qat") / "stage.json").unlink()
    with pytest.raises(StageError, match="not finished"):
        measure_sensitivity(run)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert re.match("eyas: .*qat: not finished", capsys.readouterr().err)


def test_damaged_files_are_reported(run: RunContext) -> None:
    path = run.folder("qat") / "qat.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CompressError, match="--from qat"):
        measure_sensitivity(run)
    assert not (run.root / SENSITIVITY).exists()


def test_a_run_without_data_ends_with_one_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[run]\nname = "none"\n[data]\npath = "images"\n')
    done = eyas(tmp_path, "sensitivity", "recipe.toml")
    assert done.code == 2 and "no such folder" in done.err and "Traceback" not in done.err
    assert not list(tmp_path.rglob("sensitivity.json"))


# The plot


def test_the_plot_has_a_mark_per_layer() -> None:
    entries = tuple(
        LayerSensitivity(
            f"backbone.blocks.{n}.conv", Degradation(0.0, 0.01 * (n % 7), 40.0 - n), Degradation(0.0, 0.0, 30.0)
        )
        for n in range(23)
    )
    found = Sensitivity(
        "m", "p", 64, Degradation(0.01, 0.02, 21.0), entries, Fallback((entries[6].layer,), 0.0, (0.1, 0.0), 0.03)
    )
    svg = str(plots.sensitivity(found))
    assert svg.startswith("<svg") and svg.endswith("</svg>\n") and "#0a0b" not in svg
    marks = re.search(r'<g id="PathCollection_1">(.*?)\n   </g>', svg, re.DOTALL)
    assert marks and marks.group(1).count("<use ") == 23
    for number in (6, 13, 20):
        assert f"blocks.{number}.conv" in svg
    assert plots.sensitivity(msgspec.structs.replace(found, layers=())) == ""
