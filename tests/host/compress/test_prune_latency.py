"""The prune stage with a latency target: with an injected clock, from a table, killed and refused."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from eyas_device.bench.blocks import Block, BlockTimes
from eyas_device.bench.result import Quantiles
from eyas_host.cli import app, stages
from eyas_host.compress.prune import rounds, to_latency
from eyas_host.compress.prune.channels import channel_groups
from eyas_host.compress.prune.latency_model import LatencyModel, LayerShapes, layer_shapes
from eyas_host.compress.prune.magnitude import prune_evenly
from eyas_host.data.split import Split
from eyas_host.models import checkpoints
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.recipe.compress import PruneSection
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.export import CompileSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection
from eyas_host.stages import prune as prune_stage
from eyas_host.stages import split as split_stage
from eyas_host.support.errors import CompressError
from eyas_host.train import checkpoint
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.view_cache import ViewCache
from tests.support.block_times import block_times

SIZE = 32
SETTINGS = PruneSection(target="latency", keep=0.6, rounds=2, round_epochs=1, epochs=2)


class Clock:
    """Fake stopwatch: a network's latency follows from its layers, by another law than the latency model's."""

    built = 0

    def __init__(self, *arguments: object) -> None:
        pass

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def build(self, model: PixelClassifier, precision: str = "int8") -> LayerShapes:
        Clock.built += 1
        return layer_shapes(model, size=SIZE)

    def blocks(self, layers: LayerShapes) -> BlockTimes:
        return times(layers)

    def medians(self, built: Sequence[LayerShapes]) -> list[float]:
        return [sum(each(layers)) for layers in built]


def each(layers: LayerShapes) -> list[float]:
    """Milliseconds of each layer: call overhead, and work that takes longer in narrow layers than predicted."""
    return [float(ms) for ms in 0.002 + 1e-6 * layers.work**0.85]


def times(layers: LayerShapes) -> BlockTimes:
    blocks = tuple(
        Block(name=name, operators=("CONV_2D",), inputs=(), outputs=(), ms=ms, p10=ms, p90=ms)
        for name, ms in zip(layers.names, each(layers), strict=True)
    )
    total = sum(block.ms for block in blocks)
    return block_times(blocks, Quantiles(count=9, p10=total, p50=total, p90=total, p99=total, max=total))


@pytest.fixture(scope="module")
def distilled(shape_images: Path, network: PixelClassifier, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A run whose student is ready to be pruned. Not to be changed by a test."""
    recipe = Recipe(
        run=RunSection(name="toy", device="cpu"),
        data=DataSection(path=str(shape_images), split=(0.6, 0.2, 0.2)),
        image=ImageSection(size=SIZE),
        student=StudentSection(weights="random", views=1, batch=16),
        compile=CompileSection(runtimes=("litert",)),
        prune=SETTINGS,
    )
    context = RunContext(recipe, tmp_path_factory.mktemp("run"))
    split_stage.run(context)
    data = Split.load(context.root, recipe.image.preprocessing())
    (context.root / "distill").mkdir()
    ViewCache.make(context.folder("distill"), recipe, data, copy.deepcopy(network))
    save_tensors(context.root / checkpoints.STUDENT, network.state_dict())
    return context


@pytest.fixture
def begun(distilled: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunContext]:
    """Creates a run with changed [prune] settings and the fake stopwatch."""
    monkeypatch.setattr(to_latency, "Stopwatch", Clock)

    def begin(name: str = "run", **changes: Any) -> RunContext:
        root = Path(shutil.copytree(distilled.root, tmp_path / name))
        settings = msgspec.structs.replace(SETTINGS, **changes)
        return RunContext(msgspec.structs.replace(distilled.recipe, prune=settings), root)

    return begin


def dense_ms(context: RunContext) -> float:
    return sum(each(layer_shapes(checkpoints.load_student(context, 5), size=SIZE)))


def pruned_ms(context: RunContext) -> float:
    return sum(each(layer_shapes(checkpoints.load_pruned(context, 5), size=SIZE)))


def test_the_measured_latency_is_reached_and_the_front_recorded(begun: Callable[..., RunContext]) -> None:
    context = begun()
    outcome = prune_stage.run(context)
    fraction = pruned_ms(context) / dense_ms(context)
    assert 0.6 * (1 - rounds.TOLERANCE) <= fraction <= 0.6
    front = outcome.facts["front"]
    assert [point["round"] for point in front] == [0, 1, 2]
    assert front[0]["fraction"] == 1.0 and front[1]["fraction"] == pytest.approx(0.6**0.5, rel=0.15)
    assert front[2]["fraction"] == pytest.approx(fraction)
    assert front[2]["measured_ms"] == pytest.approx(fraction * dense_ms(context))
    assert front[2]["predicted_ms"] != pytest.approx(front[2]["measured_ms"], rel=0.01)  # the loop had to be closed
    assert all(0 <= point["balanced_accuracy"] <= 1 for point in front)
    assert front[0]["macs"] > front[1]["macs"] > front[2]["macs"]
    assert outcome.facts["latency"] | {"dense_ms": 0.0, "fraction": 0.0} == {
        "runtime": "litert",
        "board": "a board",
        "dense_ms": 0.0,
        "fraction": 0.0,
        "measured": True,
        "model_fitted_to": "int8 LiteRT on one x86-64 core with AVX2",
    }
    assert outcome.facts["macs_after"] < outcome.facts["macs_before"]
    assert len(outcome.facts["histories"]["pruned"]) == SETTINGS.epochs
    assert re.search(r"\(0\.\d\d of \d\.\d{3}, measured here\): balanced accuracy", outcome.summary)
    assert sorted(path.name for path in context.folder("prune").iterdir()) == ["blocks.json", "plan.json", "student.pt"]
    model = checkpoints.load_pruned(context, 5)
    assert all(group.channels % 8 == 0 for group in channel_groups(model, size=SIZE))


def test_a_target_in_milliseconds_is_reached_too(begun: Callable[..., RunContext]) -> None:
    context = begun(ms=0.7 * dense_ms(begun("other")), rounds=1, epochs=0)
    prune_stage.run(context)
    assert 0.7 * (1 - rounds.TOLERANCE) <= pruned_ms(context) / dense_ms(context) <= 0.7


class Killed(BaseException):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Kill the stage right after it has written this many files."""
    left = [writes]

    def save(path: Path, state: Any) -> None:
        save_tensors(path, state)
        left[0] -= 1
        if not left[0]:
            raise Killed

    for module in (rounds, checkpoint, prune_stage):
        monkeypatch.setattr(module, "save_tensors", save)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("writes", "damaged"), [(2, ()), (3, ()), (4, ()), (6, ()), (4, ("blocks.json", "round-1.ckpt"))]
)
def test_a_killed_run_ends_with_the_same_numbers(
    begun: Callable[..., RunContext],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: dict[str, Any],
    writes: int,
    damaged: tuple[str, ...],
) -> None:
    """Files in order: round 0; cut, one epoch, round 1; cut, two epochs, round 2; the pruned student."""
    if not undisturbed:
        complete = begun("complete")
        undisturbed["facts"] = prune_stage.run(complete).facts
        undisturbed["plan"] = (complete.root / checkpoints.PLAN).read_bytes()
        undisturbed["state"] = checkpoints.load_state(complete.root / checkpoints.PRUNED)
    context = begun()
    with monkeypatch.context() as patch:
        killed_after(patch, writes)
        with pytest.raises(Killed):
            prune_stage.run(context)
    assert not (context.root / checkpoints.PRUNED).exists()
    for name in damaged:
        path = context.folder("prune") / name
        path.write_bytes(path.read_bytes()[:-40])
    Clock.built = 0
    facts = prune_stage.run(context).facts
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == [n for n in damaged if n.endswith(".ckpt")]
    assert Clock.built == 0 if writes >= 5 else Clock.built > 0  # measurements are not repeated
    assert (context.root / checkpoints.PLAN).read_bytes() == undisturbed["plan"]
    state = checkpoints.load_state(context.root / checkpoints.PRUNED)
    assert all(torch.equal(value, undisturbed["state"][name]) for name, value in state.items())
    assert facts["front"] == undisturbed["facts"]["front"]
    for one, other in zip(facts["histories"]["pruned"], undisturbed["facts"]["histories"]["pruned"], strict=True):
        assert one["loss"] == other["loss"] and one["metrics"] == other["metrics"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 0.05}, "is out of reach"),
        ({"ms": 1e-6}, "is out of reach"),
        ({"ms": 50.0}, "there is nothing to prune"),
    ],
)
def test_a_target_out_of_reach_leaves_no_partial_files(
    begun: Callable[..., RunContext], changes: dict[str, float], words: str
) -> None:
    context = begun(**changes)
    with pytest.raises(CompressError, match=re.escape(words)) as caught:
        prune_stage.run(context)
    assert "[prune]" in str(caught.value)
    assert not (context.root / checkpoints.PLAN).exists() and not (context.root / checkpoints.PRUNED).exists()
    assert not list(context.root.rglob("*.part"))


def test_a_table_replaces_measuring(begun: Callable[..., RunContext], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    context = begun(table=str(path), epochs=0, round_epochs=0)
    layers = layer_shapes(checkpoints.load_student(context, 5), size=SIZE)
    path.write_bytes(msgspec.json.encode(times(layers)))
    Clock.built = 0
    outcome = prune_stage.run(context)
    assert Clock.built == 0
    smaller = layer_shapes(checkpoints.load_pruned(context, 5), size=SIZE)
    latency = LatencyModel(times(layers), layers)
    assert 0.55 < latency.ms(smaller) / latency.dense_ms <= 0.6
    last = outcome.facts["front"][-1]
    assert last["measured_ms"] is None and last["predicted_ms"] == pytest.approx(latency.ms(smaller))
    assert not outcome.facts["latency"]["measured"] and "predicted from the table" in outcome.summary
    assert "fitted to int8 LiteRT on one x86-64 core with AVX2" in outcome.summary
    assert not (context.folder("prune") / to_latency.BLOCKS).exists()


def test_a_table_of_another_student_is_refused(begun: Callable[..., RunContext], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(msgspec.json.encode(times(layer_shapes(build("resnet18", 5, "random")[0].eval(), size=SIZE))))
    with pytest.raises(CompressError, match=r"table .*table\.json: 21 convolutions and linear layers"):
        prune_stage.run(begun(table=str(path)))


def test_magnitude_pruning_reports_its_measured_speed(begun: Callable[..., RunContext]) -> None:
    outcome = prune_stage.run(begun(method="nncf", target="macs", sparsity=0.5, epochs=0))
    assert outcome.facts["measured_speed"] == {"fp32": pytest.approx(1.0), "int8": pytest.approx(1.0)}
    assert re.match(r"4\d% of the weights are zero; measured speed fp32 1\.00 x, int8 1\.00 x: ", outcome.summary)


def test_the_same_fraction_of_every_layer(begun: Callable[..., RunContext]) -> None:
    context = begun(target="ratio", keep=0.5, epochs=0)
    outcome = prune_stage.run(context)
    assert outcome.facts["target"] == "ratio" and "front" not in outcome.facts
    expected = prune_evenly(checkpoints.load_student(context, 5), keep=0.5, size=SIZE)[0].state_dict()
    found = checkpoints.load_state(context.root / checkpoints.PRUNED)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# The command line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target-ms", "0.4"], {"method": "channel", "target": "latency", "ms": 0.4, "keep": 0.6}),
        (["--keep", "0.5"], {"method": "channel", "target": "latency", "ms": 0.0, "keep": 0.5}),
        (["--target-ms", "2", "--set", "prune.rounds=1"], {"target": "latency", "ms": 2.0, "rounds": 1}),
        ([], {"method": "none", "target": "macs", "ms": 0.0}),
    ],
)
def test_options_stand_for_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "toy"\n[data]\npath = "shapes"\n[prune]\nmethod = "none"\n')
    asked: list[Recipe] = []
    monkeypatch.setattr(
        stages, "run_chain", lambda recipe, runs, more, until, yes: asked.append(load_recipe(recipe, more or ()))
    )
    done = CliRunner().invoke(app.app, ["prune", str(path), *options])
    assert done.exit_code == 0, done.output
    settings = msgspec.structs.asdict(asked[0].prune)
    assert {name: settings[name] for name in expected} == expected


def test_a_table_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models/recipe.toml"
    path.write_text('[run]\nname = "toy"\n[data]\npath = "shapes"\n')
    asked: list[Recipe] = []
    monkeypatch.setattr(
        stages, "run_chain", lambda recipe, runs, more, until, yes: asked.append(load_recipe(recipe, more or ()))
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app.app, ["prune", "models/recipe.toml", "--keep", "0.5", "--table", "table.json"])
    assert done.exit_code == 0, done.output
    assert asked[0].prune.table == str(tmp_path / "table.json")


def test_two_targets_at_once_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app.app, ["prune", str(tmp_path / "recipe.toml"), "--target-ms", "1", "--keep", "0.5"])
    assert done.exit_code == 2 and "exclude each other" in done.output
