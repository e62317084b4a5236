"""Where first weights come from, and whether they suit the images."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from timm.models import load_state_dict
from torch import Tensor

from eyas_host.models.factory import PixelClassifier, build
from eyas_host.models.weights import fit_to_images
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.stages.chain import STAGES
from eyas_host.support.errors import RecipeError, WeightsError
from eyas_host.train.check import check_networks
from tests.support import inside
from tests.support.paths import ROOT
from tests.support.shapes import SHAPES, draw_folder

NAME = "tf_mobilenetv3_small_minimal_100"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def donor() -> PixelClassifier:
    """A network for five classes."""
    torch.manual_seed(3)
    return build(NAME, 5, "random")[0]


@pytest.fixture(scope="module")
def of_imagenet() -> State:
    """A network for ImageNet's classes."""
    torch.manual_seed(4)
    return build(NAME, 1000, "random")[0].backbone.state_dict()


def start(path: Path, classes: int = 5, name: str = NAME) -> PixelClassifier:
    model, origin = build(name, classes, "file", weights_file=str(path))
    assert origin == "file"
    return model


def differing(model: PixelClassifier, state: State) -> set[str]:
    own = model.backbone.state_dict()
    assert own.keys() == state.keys()
    return {key for key, value in own.items() if value.shape != state[key].shape or not torch.equal(value, state[key])}


HEAD = {"classifier.weight", "classifier.bias"}


def test_weights_of_a_file_with_a_new_head(tmp_path: Path, of_imagenet: State) -> None:
    path = tmp_path / "imagenet.safetensors"
    safetensors.torch.save_file(of_imagenet, path)
    model = start(path)
    assert differing(model, of_imagenet) == HEAD
    assert model.mean.flatten().tolist() == pytest.approx([127.5] * 3)  # what timm records for this network


def test_a_head_for_as_many_classes_comes_along(tmp_path: Path, donor: PixelClassifier) -> None:
    path = tmp_path / "five.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.backbone.state_dict().items()}}, path)
    assert not differing(start(path), donor.backbone.state_dict())


def test_a_backbone_without_a_head(tmp_path: Path, donor: PixelClassifier) -> None:
    path = tmp_path / "backbone.safetensors"
    kept = {k: v for k, v in donor.backbone.state_dict().items() if k not in HEAD and "num_batches" not in k}
    safetensors.torch.save_file(kept, path)
    assert differing(start(path, classes=7), donor.backbone.state_dict()) == HEAD


def test_a_teacher_of_another_run_brings_its_normalisation(tmp_path: Path, donor: PixelClassifier) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(donor.state_dict() | {"mean": torch.full((1, 3, 1, 1), 99.0)}, path)
    model = start(path)
    assert not differing(model, donor.backbone.state_dict())
    assert model.mean.flatten().tolist() == [99.0] * 3 and torch.equal(model.std, donor.std)


def absent(path: Path, state: State) -> None:
    del path, state


def junk(path: Path, state: State) -> None:
    del state
    path.write_bytes(b"junk" * 100)


def other_things(path: Path, state: State) -> None:
    torch.save({"epoch": 3, "weights": state}, path)


def another_network(path: Path, state: State) -> None:
    del state
    torch.save(build("mobilenetv3_small_050", 5, "random")[0].backbone.state_dict(), path)


def another_width(path: Path, state: State) -> None:
    torch.save(state | {"conv_stem.weight": torch.zeros(8, 3, 3, 3)}, path)


def other_classes(path: Path, state: State) -> None:
    torch.save({k: v[:3] if k in HEAD else v for k, v in state.items()}, path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (absent, "no such file of weights"),
        (junk, "no weights can be read from it"),
        (other_things, "no weights can be read from it"),
        (another_network, f"weights of another network than {NAME}: "),
        (another_width, "1 of 206 tensors do not fit, e.g. conv_stem.weight is (8, 3, 3, 3) instead of (16, 3, 3, 3)"),
        (other_classes, "trained for 3 classes, the images have 5; to start from the rest, remove its head"),
    ],
)
def test_files_that_do_not_fit(
    write: Callable[[Path, State], None], words: str, tmp_path: Path, donor: PixelClassifier
) -> None:
    path = tmp_path / "w.pth"
    write(path, donor.backbone.state_dict())
    with pytest.raises(WeightsError) as caught:
        start(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Attack:
    """Unpickling it runs code, as a .pth from the internet may."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_a_file_of_weights_runs_no_code(
    suffix: str, zipped: bool, tmp_path: Path, donor: PixelClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where timm's own default allows it, as before its 1.0.26: that default is set here."""
    sign = inspect.signature(load_state_dict)
    unsafe = [False if name == "weights_only" else p.default for name, p in sign.parameters.items()][1:]
    monkeypatch.setattr(load_state_dict, "__defaults__", tuple(unsafe))
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    torch.save(
        {"state_dict": donor.backbone.state_dict(), "extra": Attack(trace)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(WeightsError) as caught:
        start(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not trace.exists()


def test_every_torch_file_is_read_without_running_code() -> None:
    """Each call of a loader that can unpickle says so itself, whatever its library's default is."""
    calls = 0
    for file in (ROOT / "host").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_state_dict"):
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
                assert safe == "True", f"{file}:{node.lineno}"
                calls += 1
    assert calls >= 4


def test_a_file_comes_after_the_hub_and_before_chance(
    tmp_path: Path, of_imagenet: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyas_host.models.hub.unreachable", lambda where: "no hub here")
    monkeypatch.setattr("eyas_host.models.hub.cached_weights", lambda where: None)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(of_imagenet, path)
    assert build(NAME, 5, "auto", weights_file=str(path), trained=True)[1] == "file"
    assert build(NAME, 5, "auto")[1] == "random"
    with pytest.raises(WeightsError, match=r"no hub here, .*; packaged: none for .*set weights_file"):
        build(NAME, 5, "auto", trained=True)


def test_a_mistake_through_the_command_line(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    another_network(tmp_path / "other.pth", {})
    settings = ("teacher.weights=file", "teacher.weights_file=other.pth")
    refused(tmp_path, "teach", settings, f"weights of another network than {NAME}: ")
    assert not (tmp_path / "runs/toy/teach/stage.json").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_feature_layers_that_came_after_the_teacher(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    quick = ("teacher.head_epochs=1", "teacher.epochs=0")
    assert eyas(tmp_path, "teach", *quick).code == 0
    wrong = 'student.feature_layers=[{ student = "layer1", teacher = "blocks.2" }]'
    refused(tmp_path, "distill", (*quick, wrong), "the student has no block 'layer1'; allowed: blocks.0, ")
    assert not list((tmp_path / "runs/toy/distill").glob("view-*"))


def write_recipe(place: Path) -> None:
    """Two classes of images and a recipe of small networks."""
    draw_folder(place / "images", labels=SHAPES[:2])
    (place / "recipe.toml").write_text(
        f'''[run]\nname = "toy"\n[data]\npath = "images"\n[image]\nsize = 32
        [teacher]\nmodel = "{NAME}"\nweights = "random"\n[student]\nmodel = "{NAME}"\nweights = "random"\n'''
    )


def refused(place: Path, verb: str, settings: tuple[str, ...], words: str) -> None:
    done = eyas(place, verb, *settings)
    assert done.code == 2 and "Traceback" not in done.err
    (complaint,) = [line for line in done.err.splitlines() if line.startswith("eyas: ")]
    assert words in complaint and done.err.endswith(complaint + "\n")


def eyas(place: Path, verb: str, *settings: str) -> inside.Done:
    return inside.eyas(place, verb, "recipe.toml", *(word for setting in settings for word in ("--set", setting)))


def test_a_changed_file_is_another_beginning(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"first")
    recipe = Recipe(
        run=RunSection(name="toy"),
        teacher=TeacherSection(weights_file=str(path)),
        student=StudentSection(weights_file=str(path)),
    )
    stages = [stage for stage in STAGES if stage.name in ("teach", "distill")]
    context = RunContext(recipe, tmp_path)
    before = [stage.sources(context) for stage in stages if stage.sources is not None]
    path.write_bytes(b"second")
    after = [stage.sources(context) for stage in stages if stage.sources is not None]
    assert len(before) == 2 and all(a != b for a, b in zip(before, after, strict=True))


# Do they suit the images?


def fit(network: PixelClassifier, name: str, origin: str = "hub", **image: object) -> tuple[str, str]:
    found = fit_to_images(network.backbone, name, origin, msgspec.convert(image, ImageSection))
    return found.note, " | ".join(found.warnings)


def test_what_weights_were_trained_on_is_said(network: PixelClassifier) -> None:
    note, warnings = fit(network, "mobilenetv3_small_100")
    assert "hub weights, trained at 224 px (bicubic), here 128 px (area)" in note
    assert "mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225" in note
    assert not warnings


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"size": 32}, "size = 32: net halves it five times"),
        ({"size": 96}, "size = 96: net was trained at 224 px"),
        ({"size": 480}, "size = 480: net was trained at 224 px"),
        ({"size": 224, "interpolation": "linear"}, "'linear' leaves pixels out where it shrinks; net was trained with"),
    ],
)
def test_images_that_do_not_suit(network: PixelClassifier, image: dict[str, object], words: str) -> None:
    warning = fit(network, "net", **image)[1]
    assert words in warning and "|" not in warning
    random = fit(network, "net", "random", **image)
    assert random == ("net: no weights, it starts from random ones", warning if image["size"] == 32 else "")


def test_both_networks_are_tried_at_the_recipes_size() -> None:
    recipe = Recipe(
        run=RunSection(name="toy"),
        image=ImageSection(size=64),
        teacher=TeacherSection(model="mixer_s32_224", weights="random"),
        student=StudentSection(model="mobilenetv3_small_050", weights="random"),
    )
    with pytest.raises(RecipeError, match=r"'mixer_s32_224' does not accept \[image\] size = 64"):
        check_networks(recipe, 3)
    flexible = msgspec.structs.replace(recipe, teacher=TeacherSection(model="vit_tiny_patch16_224", weights="random"))
    assert [one.note.partition(":")[0] for one in check_networks(flexible, 3)] == [
        "vit_tiny_patch16_224",
        "mobilenetv3_small_050",
    ]
